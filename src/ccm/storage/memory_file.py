"""A memory as one safetensors file, with a digest over everything in it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import MemoryFileError
from ..memory import KV, Memory, Row
from .atomic import write_atomically

FORMAT = "ccm-memory/1"
PARTS = ("sink", "slots", "window")
#: What a row counts. A file may lack those that came later, which are 0 then.
COUNTERS = frozenset(field.name for field in fields(Row)) - {*PARTS, "notes"}


def save(memory: Memory, path: str | os.PathLike[str], extra: dict[str, str]) -> None:
    """See :meth:`ccm.Memory.save`."""
    write_atomically(Path(path), dumps(memory, extra))


def dumps(memory: Memory, extra: dict[str, str]) -> bytes:
    """What :func:`save` writes.

    Raises:
        MemoryFileError: the memory holds NaN.
    """
    memory.check_finite()
    tensors = {
        f"{r}.{name}.{part}": tensor.clone(memory_format=torch.contiguous_format)  # rows may share storage
        for r, row in enumerate(memory.rows)
        for name in PARTS
        for part, tensor in zip(("keys", "values"), getattr(row, name), strict=True)
    }
    counters = [{k: v for k, v in row.__dict__.items() if k in COUNTERS} for row in memory.rows]
    metadata = {
        "format": FORMAT,
        "fingerprint": memory.fingerprint,
        "rows": json.dumps(counters),
        **extra,
    }
    metadata["digest"] = content_digest(tensors, metadata)
    return to_bytes(tensors, metadata)


def load(path: str | os.PathLike[str]) -> tuple[Memory, dict[str, str]]:
    """See :meth:`ccm.Memory.load`."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise MemoryFileError(f"no memory file at {path}") from error
    except (SafetensorError, OSError) as error:
        raise MemoryFileError(
            f"{path} is not a readable memory file ({error}); restore it from a copy"
        ) from error
    found = metadata.get("format")
    if found != FORMAT:
        newer = ": a newer ccm wrote it" if str(found).startswith("ccm-memory/") else ""
        raise MemoryFileError(f"{path}: got format {found!r}, expected {FORMAT!r}{newer}")
    digest = metadata.pop("digest", None)
    if digest != content_digest(tensors, metadata):
        raise MemoryFileError(
            f"{path} was changed after it was written (digest differs); restore it from a copy"
        )
    rows = []
    for r, counters in enumerate(json.loads(metadata["rows"])):
        sink, slots, window = (
            KV(tensors[f"{r}.{name}.keys"], tensors[f"{r}.{name}.values"]) for name in PARTS
        )
        if unknown := sorted(set(counters) - COUNTERS):
            raise MemoryFileError(
                f"{path} was written by a newer ccm: it counts {', '.join(unknown)!r}; read it with that version"
            )
        counters = {k: tuple(v) if isinstance(v, list) else v for k, v in counters.items()}
        rows.append(Row(sink, slots, window, **counters))
    memory = Memory(tuple(rows), metadata["fingerprint"])
    memory.check_finite()
    return memory, metadata


def content_digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
