"""What a file says it is, by its first bytes alone: torch is not needed for that."""

from __future__ import annotations

import json
from pathlib import Path

#: Most bytes of the JSON that a safetensors file begins with.
LONGEST_HEADER = 1 << 22


def format_of(path: Path) -> str:
    """The format that the header of a safetensors file names, such as "ccm-memory/3"; empty if it names none.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head = file.read(size) if size <= LONGEST_HEADER else b""
    try:
        return str(json.loads(head)["__metadata__"]["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
