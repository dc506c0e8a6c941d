"""A memory as a snapshot for a store, at a choice of precisions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ...core.memory import Memory
from ...errors import MemoryFileError
from ...files import memory_file
from ...files.memory_file import MOST, cuts
from ...files.memory_file import PRECISIONS as DTYPES

__all__ = ["DTYPES", "cuts", "decode", "encode"]


def encode(memory: Memory, dtype: str = "float32", means: Sequence[int] = ()) -> tuple[bytes, dict[str, Any]]:
    """A memory of any number of rows as bytes.

    Args:
        memory: of any number of conversations.
        dtype: of what is stored.
        means: of each row, how many of the first slots keep all bits at any dtype (``Method.means``).

    Returns:
        the bytes and their metadata: ``fingerprint``, ``dtype``, ``nbytes`` and the relative ``error`` of keys and
        of values, measured on what :func:`decode` would return.

    Raises:
        MemoryFileError: NaN or infinite values; or as :func:`ccm.files.memory_file.snapshot_bytes`.
    """
    memory.check_finite()
    rows = list(map(vars, memory.rows))
    data, found = memory_file.snapshot_bytes(rows, memory.fingerprint, dtype, means)
    return data, {"fingerprint": memory.fingerprint, **found, "nbytes": len(data)}


def decode(data: bytes, most: int = MOST) -> tuple[Memory, dict[str, Any]]:
    """The memory in what :func:`encode` gave, and its metadata; trusted in nothing.

    Raises:
        MemoryFileError: NaN or infinite values; or as :func:`ccm.files.memory_file.read`.
    """
    rows, metadata = memory_file.read(data, memory_file.SNAPSHOT, most)
    try:
        error = json.loads(metadata["error"])
        numbers = all(
            type(error[half]) is float and math.isfinite(error[half]) for half in ("keys", "values")
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        numbers = False
    if not numbers:
        raise MemoryFileError("this is no usable stored memory: its error of quantization is not a number")
    memory = Memory.of(rows, metadata)
    return memory, {
        "fingerprint": memory.fingerprint,
        "dtype": metadata["dtype"],
        "error": error,
        "nbytes": len(data),
    }
