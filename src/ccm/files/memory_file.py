"""A memory as bytes: safetensors, with a digest over everything in them, and trusted in nothing when they are read.

Two forms. A *file* holds a memory or a session as it is (``Memory.save``). A *snapshot* lies in a store, at a choice
of precisions (``serving.store.codec``).

A form is written in the lowest version that can say what there is, and read in every version up to :data:`NEWEST`:

    1    sink, slots and window of each row, and its counters
    2    and its notes
    3    a snapshot that holds entry behind entry, so that two versions of a memory have long parts in common; slots
         that are running means, which keep all bits, are apart
    3    a file, 4 a snapshot: and slots that are codes, which lie there as they are at any precision; how many tokens
         of the sink are pinned

A row is plain here: the fields of :class:`ccm.core.memory.Row` by name, a part of it as a pair of keys and values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.pages import blank
from ..errors import ConfigError, MemoryFileError, StorageError, UnknownNameError
from .kind import LONGEST_HEADER, format_of

FILE, SNAPSHOT = "ccm-memory", "ccm-snapshot"
NEWEST = {FILE: 3, SNAPSHOT: 4}
#: Precisions of a snapshot: all bits; half of fp32's, float16 unless a value is too large for it; a quarter with one
#: fp32 scale per layer, head and channel.
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
PARTS = ("sink", "slots", "window")
COUNTS = ("steps", "tokens", "dropped", "merged", "merged_segments", "pinned")
LISTS = ("segments", "recent", "notes")
#: Counters that a row may lack: they came later, and are 0 or empty then.
LATER = {"merged", "merged_segments", "notes", "pinned"}
#: What is not written where it is 0 or empty, so that older releases read it.
SPARED = ("notes", "pinned")
#: Most bytes of what comes from outside.
MOST = 1 << 28

_HALVES = ("keys", "values")
_LARGEST = torch.finfo(torch.float16).max
#: Slots of a snapshot that keep all bits, in front of the others.
_MEANS = "means"
#: Entries of a part of a snapshot, on average.
_PART = 4
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Of a memory at work: numbers, and codes in place of slots.
_HELD = _FLOATS | {"U8": torch.uint8}
_DTYPES = _HELD | {"I8": torch.int8}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Layers, heads, tokens, channels: far above any model, far below what makes an empty tensor expensive.
_MOST = (4096, 4096, 1 << 24, 1 << 16)

PlainRow = Mapping[str, Any]


# ------------------------------------------------------------------ write


def file_bytes(rows: Sequence[PlainRow], fingerprint: str, extra: Mapping[str, str]) -> bytes:
    """A memory file, with more metadata in it. The same memory gives the same bytes.

    Raises:
        ConfigError: a dtype that no file holds.
    """
    metadata = {"fingerprint": fingerprint, "rows": json.dumps([_counters(row) for row in rows]), **extra}
    return _written(FILE, rows, dict(_tensors(rows)), metadata)


def snapshot_bytes(
    rows: Sequence[PlainRow], fingerprint: str, precision: str, means: Sequence[int] = ()
) -> tuple[bytes, dict[str, Any]]:
    """A snapshot, and what became of it: ``dtype``, and the relative ``error`` of keys and of values.

    The error is ||x - stored x|| / ||x|| over all keys, and over all values.

    Args:
        rows, fingerprint: of the memory.
        precision: of its keys and values; float16 becomes float32 if a value is too large for it.
        means: of each row, how many of the first slots are running means, which keep all bits at any precision.

    Raises:
        UnknownNameError: no such precision.
        ConfigError: a dtype that no snapshot holds.
        MemoryFileError: values too large for this precision.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("dtype", precision, list(PRECISIONS))
    if precision == "float16" and any(x.abs().max() > _LARGEST for _, x in _tensors(rows) if x.numel()):
        precision = "float32"
    tensors: dict[str, Tensor] = {}
    squares = {half: [0.0, 0.0] for half in _HALVES}
    for name, x in _tensors(rows):
        r, part, _ = name.split(".")
        exact = means[int(r)] if means and part == "slots" and precision != "float32" else 0
        if exact:
            tensors[name.replace(part, _MEANS)] = _by_entry(x[:, :, :exact])
        stored = _packed(x[:, :, exact:], precision)
        back = torch.cat([x[:, :, :exact], _unpacked(stored, x.dtype)], dim=2)
        if not torch.isfinite(back).all():
            raise MemoryFileError(f"memory {name}: values too large for {precision}; store it as float32")
        tensors |= {name + suffix: _by_entry(t) for suffix, t in stored.items()}
        off_and_whole = squares[name.rpartition(".")[2]]
        off_and_whole[0] += (back.double() - x.double()).square().sum().item()
        off_and_whole[1] += x.double().square().sum().item()
    error = {half: math.sqrt(off / whole) if whole else 0.0 for half, (off, whole) in squares.items()}
    counters = [
        _counters(row) | {"dtypes": {part: str(row[part][0].dtype).removeprefix("torch.") for part in PARTS}}
        for row in rows
    ]
    metadata = {
        "fingerprint": fingerprint,
        "dtype": precision,
        "error": json.dumps(error),
        "rows": json.dumps(counters),
    }
    return _written(SNAPSHOT, rows, tensors, metadata), {"dtype": precision, "error": error}


def _counters(row: PlainRow) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in PARTS and (name not in SPARED or value)}


def _tensors(rows: Sequence[PlainRow]) -> Iterator[tuple[str, Tensor]]:
    for r, row in enumerate(rows):
        for part in PARTS:
            for half, tensor in zip(_HALVES, row[part], strict=True):
                name = f"{r}.{part}.{half}"
                if tensor.dtype not in _HELD.values():
                    raise ConfigError(
                        f"memory {name}: got {tensor.dtype}, expected one of {list(_HELD.values())}"
                    )
                yield name, tensor.detach().cpu().contiguous()


def _written(
    form: str, rows: Sequence[PlainRow], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> bytes:
    """As safetensors writes them, but for the order of the metadata, which is another one there every time."""
    coded = any(row["slots"][0].dtype == torch.uint8 for row in rows)
    pinned, noted = (any(row.get(name) for row in rows) for name in ("pinned", "notes"))
    version = NEWEST[form] if coded or pinned else 3 if form == SNAPSHOT else 2 if noted else 1
    metadata = {"format": f"{form}/{version}", **metadata}
    header: dict[str, Any] = {"__metadata__": {**metadata, "digest": content_digest(tensors, metadata)}}
    body, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # so that all are aligned
        tensor = tensors[name]
        body.append(_raw(tensor))
        start, end = end, end + len(body[-1])
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *body])


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of all metadata but the digest itself, and of all tensors."""
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(_raw(tensor))
    return sha.hexdigest()


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, as something that can be read like bytes and is no copy."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _by_entry(x: Tensor) -> Tensor:
    """From (L, H, N, D) to (N, L, H, D)."""
    return x.permute(2, 0, 1, 3).contiguous()


def cuts(data: bytes) -> tuple[int, ...]:
    """Where a snapshot may be cut into parts of about :data:`_PART` entries that other versions have as well.

    Entries decide by what is in them, so an entry more or less moves no other cut.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    view, found = memoryview(data), {start}
    for name, spec in json.loads(data[8:start]).items():
        if name == "__metadata__" or not (entries := spec["shape"][0]):
            continue
        begin, end = (start + offset for offset in spec["data_offsets"])
        size = (end - begin) // entries
        ends = range(begin + size, end, size)
        found |= {begin, *(at for at in ends if zlib.crc32(view[at - size : at]) % _PART == 0)}
    return tuple(sorted(found - {len(data)}))


# ------------------------------------------------------------------ precision


def _packed(x: Tensor, precision: str) -> dict[str, Tensor]:
    """One tensor (L, H, N, D) as it is stored, by suffix of its name; codes as they are."""
    if not x.is_floating_point():
        return {"": x}
    if precision == "int8":
        top = x.float().abs().amax(2, keepdim=True) if x.shape[2] else x.float()
        scale = (top / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return {"": (x.float() / scale).round().to(torch.int8), ".scale": scale}
    return {"": x if precision == "float32" else x.to(getattr(torch, precision))}


def _unpacked(stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    x = stored[""]
    if ".scale" in stored:
        return (x.float() * stored[".scale"]).to(dtype)
    # most of it is there for a moment alone: what a server has decoded rests in fewer bits
    return x if x.dtype == dtype else blank(x.new_empty(0, dtype=dtype), *x.shape).copy_(x)


def check_replaceable(path: Path) -> None:
    """Raises StorageError if a file is there that holds something else than a memory; an empty one holds nothing."""
    try:
        other = path.is_file() and path.stat().st_size > 0 and not format_of(path).startswith(f"{FILE}/")
    except OSError as error:
        raise StorageError(f"cannot look at {path}: {error.strerror or error}; give another name") from error
    if other:
        raise StorageError(
            f"{path} is there already and is no memory file, so it is left as it is: give another name, or delete it"
        )


# ------------------------------------------------------------------ read


def load(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of a memory file, and its metadata.

    Raises:
        MemoryFileError: no such file, or as :func:`read`.
    """
    try:
        with open(path, "rb") as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            del data[file.readinto(data) :]
        return read(data, FILE, len(data))
    except FileNotFoundError as error:
        raise MemoryFileError(f"no memory file at {path}") from error
    except OSError as error:
        raise MemoryFileError(f"{path}: {_bad(str(error))}") from error
    except MemoryFileError as error:
        raise MemoryFileError(f"{path}: {error}") from error


def read(data: bytes | bytearray, form: str, most: int = MOST) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows in ``data``, on the CPU, in the dtypes that they had, and the metadata; trusted in nothing.

    Sizes, names, dtypes and shapes are compared before a tensor is made, so that what is allocated is a small
    multiple of ``len(data)``, whatever a header claims. Values may be NaN, and the fingerprint that of another model.

    Args:
        data: what was written. A bytearray is not copied: it belongs to the rows from then on.
        form: :data:`FILE` or :data:`SNAPSHOT`.
        most: largest number of bytes.

    Raises:
        MemoryFileError: too large, not safetensors, of another form, written by a newer ccm, or damaged.
    """
    if len(data) > most:
        raise MemoryFileError(f"a stored memory of {len(data)} bytes, the limit is {most}")
    metadata, specs, version = _header(data, form)
    try:
        rows = json.loads(metadata["rows"])
        if form == FILE:  # as it is in memory: dtypes are those of the tensors
            for r, row in enumerate(rows):
                row["dtypes"] = {part: _name(specs[f"{r}.{part}.keys"]["dtype"]) for part in PARTS}
        digest = metadata.pop("digest")
        by_entry = form == SNAPSHOT and version > 2
        if by_entry:
            specs = {name: _as_row(spec) for name, spec in specs.items()}
        _check(rows, metadata["dtype"] if form == SNAPSHOT else "float32", specs, by_entry)
        tensors = _views(data, specs, by_entry)
        if digest != content_digest(tensors, metadata) or not isinstance(metadata["fingerprint"], str):
            raise _bad("it was changed after it was written (its digest differs)")
        if by_entry:
            tensors = {name: tensor.permute(1, 2, 0, 3) for name, tensor in tensors.items()}
        return [_row(r, row, tensors) for r, row in enumerate(rows)], metadata
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _bad(f"{type(error).__name__}: {str(error)[:200]}") from error


def _row(r: int, row: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    def unpacked(name: str, dtype: torch.dtype) -> Tensor:
        return _unpacked({s: tensors[name + s] for s in ("", ".scale") if name + s in tensors}, dtype)

    dtypes = {part: getattr(torch, name) for part, name in row.pop("dtypes").items()}
    parts = {part: [unpacked(f"{r}.{part}.{half}", dtypes[part]) for half in _HALVES] for part in PARTS}
    if f"{r}.{_MEANS}.keys" in tensors:
        exact = [tensors[f"{r}.{_MEANS}.{half}"] for half in _HALVES]
        parts["slots"] = [torch.cat(both, dim=2) for both in zip(exact, parts["slots"], strict=True)]
    parts["sink"] = [x.clone() for x in parts["sink"]]  # it stays for ever, what was read with it need not
    return {part: tuple(both) for part, both in parts.items()} | {
        name: tuple(value) if name in LISTS else value for name, value in row.items()
    }


def _views(data: bytes | bytearray, specs: Mapping[str, Any], by_entry: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as they are stored, without a copy of a bytearray.

    Args:
        data: the file.
        specs: of its tensors, shapes as (L, H, N, D).
        by_entry: whether they lie there as (N, L, H, D).
    """
    owned: Any = data
    if not isinstance(data, bytearray):
        owned = blank(torch.empty(0, dtype=torch.uint8), len(data)).numpy()
        memoryview(owned)[:] = data
    body = done = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, spec in sorted(specs.items(), key=lambda item: item[1]["data_offsets"]):
        layers, heads, tokens, channels = spec["shape"]
        shape = (tokens, layers, heads, channels) if by_entry else (layers, heads, tokens, channels)
        dtype, count = _DTYPES[spec["dtype"]], math.prod(shape)
        begin, done = done, done + count * dtype.itemsize
        if spec["data_offsets"] != [begin - body, done - body] or done > len(data):
            raise _bad(f"{name} is not where it should be")
        whole = {"dtype": dtype, "count": count, "offset": begin}
        flat = torch.frombuffer(owned, **whole) if count else torch.empty(0, dtype=dtype)
        found[name] = flat.view(shape)
    if done != len(data):
        raise _bad(f"there are {len(data) - done} bytes behind its tensors")
    return found


# ------------------------------------------------------------------ checks before anything is allocated


def _header(data: bytes | bytearray, form: str) -> tuple[dict[str, str], dict[str, Any], int]:
    """Metadata, tensor descriptions and version, from the JSON that a safetensors file begins with."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(LONGEST_HEADER, len(data) - 8):
        raise _bad("it is cut off, or no safetensors")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__")
        found = str(metadata.get("format"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _bad(f"its header is not one of safetensors ({type(error).__name__})") from error
    version = re.fullmatch(rf"{form}/([1-9]\d{{0,3}})", found)
    if version is None:
        raise _bad(f"its format is {found[:40]!r}, expected {form!r}")
    if int(version[1]) > NEWEST[form]:
        raise _newer(f"its format is {found!r}, this one reads up to '{form}/{NEWEST[form]}'")
    return metadata, header, int(version[1])


def _check(rows: Any, precision: Any, specs: dict[str, Any], apart: bool) -> None:
    """Raises if counters and tensors are not what is written here (KeyError and the like included)."""
    if precision not in PRECISIONS or not isinstance(rows, list) or not rows:
        raise _bad("dtype or rows are not as expected")
    expected = set()
    frame: tuple[int, ...] | None = None  # layers, heads and channels, the same everywhere
    known = {*COUNTS, *LISTS, "dtypes"}
    for r, row in enumerate(rows):
        if unknown := sorted(set(row) - known):
            raise _newer(f"row {r} counts {unknown[0][:40]!r}")
        if not known - LATER <= set(row) or set(row["dtypes"]) != set(PARTS):
            raise _bad(f"row {r} has other fields")
        if not all(_is_count(row.get(name, 0)) for name in COUNTS) or not all(
            isinstance(numbers, list) and all(map(_is_count, numbers))
            for numbers in (row.get(name, []) for name in LISTS)
        ):
            raise _bad(f"row {r} has impossible counters")
        for part in PARTS:
            shapes = set()
            stored = _stored(row["dtypes"][part], precision)
            for half in _HALVES:
                tensor = f"{r}.{part}.{half}"
                expected.add(tensor)
                shape = _shape(tensor, specs[tensor], stored)
                shapes.add(shape)
                if stored == "I8":
                    expected.add(f"{tensor}.scale")
                    layers, heads, tokens, channels = shape
                    scale = _shape(f"{tensor}.scale", specs[f"{tensor}.scale"], "F32")
                    if scale != (layers, heads, min(tokens, 1), channels):
                        raise _bad(f"the scale of {tensor} has another shape")
            if len(shapes) != 1:
                raise _bad(f"keys and values of row {r}, {part}, differ in shape")
            layers, heads, tokens, channels = shapes.pop()
            frame = frame or (layers, heads, channels)
            coded = part == "slots" and stored == "U8"  # as many bytes as a code makes of the channels
            if frame != (layers, heads, frame[2] if coded else channels) or coded != (stored == "U8"):
                raise _bad("layers, heads or channels differ between its parts")
            if part == "sink" and row.get("pinned", 0) > tokens:
                raise _bad(f"row {r}: more is pinned than its sink holds")
            if part == "window" and sum(row["segments"]) != tokens:
                raise _bad(f"row {r}: its segments are not its window")
        if apart and (exact := [f"{r}.{_MEANS}.{half}" for half in _HALVES])[0] in specs:
            expected |= set(exact)
            keys, values = (
                _shape(name, specs[name], _stored(row["dtypes"]["slots"], "float32")) for name in exact
            )
            if keys != values or (*keys[:2], keys[3]) != frame:
                raise _bad(f"the means of row {r} have another shape")
    if set(specs) != expected:
        raise _bad(f"it holds {len(specs)} tensors, expected {len(expected)}")


def _as_row(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor of a snapshot with its shape in the order of a row, (L, H, N, D)."""
    shape = spec["shape"]
    known = isinstance(shape, list) and len(shape) == 4
    return {**spec, "shape": [*shape[1:3], shape[0], shape[3]] if known else shape}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _name(code: str) -> str:
    """The name in torch of a dtype of safetensors."""
    return str(_HELD[code]).removeprefix("torch.")


def _stored(original: str, precision: str) -> str:
    """The dtype, in safetensors' words, in which a tensor lies there."""
    names = {_name(code): code for code in _HELD}
    kept = names[original]
    return (
        kept
        if kept == "U8"
        else {"float32": kept, "float16": "F16", "bfloat16": "BF16", "int8": "I8"}[precision]
    )


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


def _newer(how: str) -> MemoryFileError:
    return MemoryFileError(f"this memory was written by a newer ccm: {how}; read it with that version")
