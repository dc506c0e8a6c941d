"""A memory as bytes for a store: safetensors, at a choice of precisions, checked before anything is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ...errors import ConfigError, MemoryFileError, UnknownNameError
from ...memory import KV, Memory, Row
from ...storage import memory_file
from ...storage.memory_file import COUNTERS, PARTS
from ...storage.memory_file import content_digest as digest_of

FORMAT = "ccm-snapshot/1"
DTYPES = ("float32", "bfloat16", "int8")
CONTIGUOUS = torch.contiguous_format

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in _FLOATS.items()}
_COUNTS = ("steps", "tokens", "dropped", "merged", "merged_segments")
#: Counters that snapshots may lack: they were not counted from the beginning.
_LATER = {"merged", "merged_segments"}
_LONGEST_HEADER = 1 << 22
# Layers, heads, tokens, channels: far above any model, far below what makes an empty tensor expensive.
_MOST = (4096, 4096, 1 << 24, 1 << 16)


def encode(memory: Memory, dtype: str = "float32") -> tuple[bytes, dict[str, Any]]:
    """A memory as safetensors bytes.

    Args:
        memory: any number of rows.
        dtype: ``float32`` keeps every bit; ``bfloat16`` halves fp32 tensors; ``int8`` quarters them, with one fp32
            scale per layer, head and channel of a row's sink, slots and window, shape (L, H, 1, D).

    Returns:
        the bytes and their metadata: ``fingerprint``, ``dtype``, ``nbytes`` and the relative ``error`` of keys and
        of values, ||x - stored x|| / ||x|| over all of them, measured on what :func:`decode` would return.

    Raises:
        UnknownNameError: no such dtype.
        MemoryFileError: NaN or infinite values, or values too large for this dtype.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, list(DTYPES))
    memory.check_finite()
    tensors: dict[str, Tensor] = {}
    squares = {"keys": [0.0, 0.0], "values": [0.0, 0.0]}
    for name, part, tensor in _tensors(memory):
        x = tensor.detach().cpu()
        if x.dtype not in _FLOATS.values():
            raise ConfigError(f"memory {name}: got {x.dtype}, expected one of {list(_FLOATS.values())}")
        stored = _pack(x, dtype)
        tensors |= {name + suffix: t.clone(memory_format=CONTIGUOUS) for suffix, t in stored.items()}
        back = _unpack(stored, x.dtype)
        if not torch.isfinite(back).all():
            raise MemoryFileError(f"memory {name}: values too large for {dtype}; store it as float32")
        squares[part][0] += (back.double() - x.double()).square().sum().item()
        squares[part][1] += x.double().square().sum().item()
    error = {part: math.sqrt(off / whole) if whole else 0.0 for part, (off, whole) in squares.items()}
    rows = [
        {name: getattr(row, name) for name in sorted(COUNTERS)}
        | {"dtypes": {part: str(getattr(row, part).keys.dtype).removeprefix("torch.") for part in PARTS}}
        for row in memory.rows
    ]
    metadata = {
        "format": FORMAT,
        "fingerprint": memory.fingerprint,
        "dtype": dtype,
        "error": json.dumps(error),
        "rows": json.dumps(rows),
    }
    metadata["digest"] = digest_of(tensors, metadata)
    data = safetensors.save(tensors, metadata)
    return data, {"fingerprint": memory.fingerprint, "dtype": dtype, "error": error, "nbytes": len(data)}


def decode(data: bytes, most: int = 1 << 28) -> tuple[Memory, dict[str, Any]]:
    """The memory in ``data``, on the CPU, in the dtypes that it had; trusted in nothing.

    Sizes, names, dtypes and shapes are compared before a tensor is made, so that what is allocated is a small
    multiple of ``len(data)``, whatever a header claims. Compare ``fingerprint`` before use, as
    ``Compressor.check`` does.

    Args:
        data: from :func:`encode`.
        most: largest number of bytes.

    Returns:
        the memory and its metadata, as :func:`encode` gives it.

    Raises:
        MemoryFileError: too large, not safetensors, of another format, damaged, or NaN inside.
    """
    memory, metadata = _decode(data, most, FORMAT)
    try:
        lost = json.loads(metadata["error"])
        numbers = all(type(lost[part]) is float and math.isfinite(lost[part]) for part in KV._fields)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _bad(f"{type(error).__name__}: {str(error)[:200]}") from error
    if not numbers:
        raise _bad("its error of quantization is not a number")
    return memory, {
        "fingerprint": memory.fingerprint,
        "dtype": metadata["dtype"],
        "error": lost,
        "nbytes": len(data),
    }


def decode_file(data: bytes, most: int = 1 << 28) -> tuple[Memory, dict[str, str]]:
    """The memory in the bytes of a memory or session file (``Memory.save``), trusted as little as by :func:`decode`.

    Returns:
        the memory and the file's metadata.

    Raises:
        MemoryFileError: as for :func:`decode`.
    """
    return _decode(data, most, memory_file.FORMAT)


def _decode(data: bytes, most: int, form: str) -> tuple[Memory, dict[str, str]]:
    if len(data) > most:
        raise MemoryFileError(f"a stored memory of {len(data)} bytes, the limit is {most}")
    metadata, specs = _header(data, form)
    try:
        rows = json.loads(metadata["rows"])
        if form == memory_file.FORMAT:  # as it is in memory; dtypes are those of the tensors
            for r, row in enumerate(rows):
                row["dtypes"] = {part: _NAMES[specs[f"{r}.{part}.keys"]["dtype"]] for part in PARTS}
        fingerprint, digest = metadata["fingerprint"], metadata.pop("digest")
        _check(rows, metadata.get("dtype", "float32"), specs)
        tensors = safetensors.load(data)
        if digest != digest_of(tensors, metadata):
            raise _bad("its digest differs")
        memory = Memory(tuple(_row(r, row, tensors) for r, row in enumerate(rows)), fingerprint)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _bad(f"{type(error).__name__}: {str(error)[:200]}") from error
    memory.check_finite()
    return memory, metadata


def _tensors(memory: Memory) -> Iterator[tuple[str, str, Tensor]]:
    for r, row in enumerate(memory.rows):
        for name in PARTS:
            for part, tensor in zip(("keys", "values"), getattr(row, name), strict=True):
                yield f"{r}.{name}.{part}", part, tensor


# ------------------------------------------------------------------ precision


def _pack(x: Tensor, dtype: str) -> dict[str, Tensor]:
    """One tensor (L, H, N, D) as it is stored, by suffix of its name."""
    if dtype == "int8":
        top = x.float().abs().amax(2, keepdim=True) if x.shape[2] else x.float()
        scale = (top / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return {"": (x.float() / scale).round().to(torch.int8), ".scale": scale}
    return {"": x.to(torch.bfloat16) if dtype == "bfloat16" else x}


def _unpack(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    x = stored[""]
    return (x.float() * stored[".scale"]).to(dtype) if ".scale" in stored else x.to(dtype)


def _row(r: int, row: dict[str, Any], tensors: dict[str, Tensor]) -> Row:
    def unpacked(name: str, dtype: torch.dtype) -> Tensor:
        return _unpack({s: tensors[name + s] for s in ("", ".scale") if name + s in tensors}, dtype)

    parts = {
        name: KV(
            *(unpacked(f"{r}.{name}.{part}", getattr(torch, row["dtypes"][name])) for part in KV._fields)
        )
        for name in PARTS
    }
    counters = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in COUNTERS}
    return Row(**parts, **counters)  # type: ignore[arg-type]


# ------------------------------------------------------------------ checks before anything is allocated


def _header(data: bytes, form: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensor descriptions, from the JSON that a safetensors file begins with."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_LONGEST_HEADER, len(data) - 8):
        raise _bad("it is cut off, or no safetensors")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _bad(f"its header is not one of safetensors ({type(error).__name__})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != form:
        raise _bad(f"its format is not {form!r}")
    return metadata, header


def _check(rows: Any, dtype: Any, specs: dict[str, Any]) -> None:
    """Raises if counters and tensors are not what :func:`encode` writes (KeyError and the like included)."""
    if dtype not in DTYPES or not isinstance(rows, list) or not rows:
        raise _bad("dtype or rows are not as expected")
    expected = set()
    frame: tuple[int, ...] | None = None  # layers, heads and channels, the same everywhere
    for r, row in enumerate(rows):
        if unknown := set(row) - {*COUNTERS, "dtypes"}:
            raise _bad(f"row {r} counts {sorted(unknown)[0][:40]!r}: a newer ccm wrote it, or it is damaged")
        if not {*COUNTERS, "dtypes"} - _LATER <= set(row) or set(row["dtypes"]) != set(PARTS):
            raise _bad(f"row {r} has other fields")
        if not all(_is_count(row.get(n, 0)) for n in _COUNTS) or not all(
            isinstance(row[n], list) and all(map(_is_count, row[n])) for n in ("segments", "recent")
        ):
            raise _bad(f"row {r} has impossible counters")
        for name in PARTS:
            shapes = set()
            stored = _stored(row["dtypes"][name], dtype)
            for part in KV._fields:
                tensor = f"{r}.{name}.{part}"
                expected.add(tensor)
                shape = _shape(tensor, specs[tensor], stored)
                shapes.add(shape)
                if dtype == "int8":
                    expected.add(f"{tensor}.scale")
                    layers, heads, tokens, channels = shape
                    scale = _shape(f"{tensor}.scale", specs[f"{tensor}.scale"], "F32")
                    if scale != (layers, heads, min(tokens, 1), channels):
                        raise _bad(f"the scale of {tensor} has another shape")
            if len(shapes) != 1:
                raise _bad(f"keys and values of row {r}, {name}, differ in shape")
            layers, heads, tokens, channels = shapes.pop()
            frame = frame or (layers, heads, channels)
            if frame != (layers, heads, channels):
                raise _bad("layers, heads or channels differ between its parts")
            if name == "window" and sum(row["segments"]) != tokens:
                raise _bad(f"row {r}: its segments are not its window")
    if set(specs) != expected:
        raise _bad(f"it holds {len(specs)} tensors, expected {len(expected)}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _stored(original: str, dtype: str) -> str:
    """The safetensors name of the dtype in which a tensor lies there."""
    names = {dtype: name for name, dtype in _NAMES.items()}
    return {"float32": names[original], "bfloat16": "BF16", "int8": "I8"}[dtype]


def _shape(tensor: str, spec: Any, dtype: str) -> tuple[int, int, int, int]:
    shape = spec["shape"]
    if spec["dtype"] != dtype:
        raise _bad(f"{tensor} has dtype {str(spec['dtype'])[:20]!r}, expected {dtype!r}")
    if len(shape) != 4 or not all(_is_count(n) and n <= most for n, most in zip(shape, _MOST, strict=True)):
        raise _bad(f"{tensor} has an impossible shape")
    layers, heads, tokens, channels = shape
    return layers, heads, tokens, channels


def _bad(why: str) -> MemoryFileError:
    return MemoryFileError(f"this is no usable stored memory: {why}; take another version or a backup")
