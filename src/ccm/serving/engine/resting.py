"""Memories that nobody works on, in fewer bytes and without a loss: every entry in 16 bits if it is exact in them.

What comes from a store was rounded there, to float16. What a method has chosen of a bfloat16 model's own entries was
never finer than bfloat16. Such entries rest in these types, others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.memory import KV, Memory, Row
from ...core.pages import blank
from ...files.memory_file import PARTS

_SMALL = (torch.float16, torch.bfloat16)


class _Part(NamedTuple):
    """Entries (L, H, n, D) in one type, and which of all they are (n,)."""

    entries: Tensor
    index: Tensor


class _Rested:
    """A tensor (L, H, N, D) by its entries, each in the smallest type that gives its numbers back."""

    def __init__(self, x: Tensor):
        self.shape, self.dtype, self.parts = x.shape, x.dtype, list(_split(x))

    @property
    def held(self) -> int:
        return sum(part.entries.nbytes for part in self.parts)

    def layers(self, some: slice) -> Tensor:
        """What it was made from, (l, H, N, D), of some layers."""
        parts = [(entries[some].to(self.dtype), index) for entries, index in self.parts]
        if len(parts) == 1:
            return parts[0][0]
        first = parts[0][0]
        x = first.new_empty(*first.shape[:2], *self.shape[2:])
        for entries, index in parts:
            x[:, :, index] = entries
        return x


class Resting(KV):
    """Keys and values at rest, to be used like others. They are made anew for everyone who asks for them."""

    def __new__(cls, kv: KV) -> Resting:
        return tuple.__new__(cls, (_Rested(kv.keys), _Rested(kv.values)))

    @property
    def _both(self) -> tuple[_Rested, _Rested]:
        keys, values = tuple.__iter__(self)
        return keys, values

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self._both[0].layers(slice(None))

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._both[1].layers(slice(None))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        keys, values = (each.layers(slice(index, index + 1))[0] for each in self._both)
        return keys, values

    def __iter__(self) -> Iterator[Tensor]:
        yield self.keys
        yield self.values

    def __getitem__(self, index: Any) -> Any:
        return (self.keys, self.values)[index]

    def __reduce__(self) -> Any:
        return KV, (self.keys, self.values)

    @property
    def length(self) -> int:
        return self._both[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(each.shape.numel() * each.dtype.itemsize for each in self._both)

    @property
    def held(self) -> int:
        """Bytes at rest; ``nbytes`` are those of what is made from it."""
        return sum(each.held for each in self._both)


def rest(memory: Memory) -> Memory:
    """The same memory at rest, to be used like any other; itself where nothing would take fewer bytes."""
    return _with(memory, _at_rest)


def wake(memory: Memory) -> Memory:
    """The same memory with plain keys and values; itself if it has no others."""
    return _with(memory, lambda kv: KV(*kv) if isinstance(kv, Resting) else kv)


def held(memory: Memory) -> int:
    """Bytes that a memory takes, at rest or not."""
    parts = (getattr(row, part) for row in memory.rows for part in PARTS)
    return sum(kv.held if isinstance(kv, Resting) else kv.nbytes for kv in parts)


def _with(memory: Memory, change: Callable[[KV], KV]) -> Memory:
    rows = tuple(_row(row, change) for row in memory.rows)
    same = all(new is old for new, old in zip(rows, memory.rows, strict=True))
    return memory if same else replace(memory, rows=rows)


def _row(row: Row, change: Callable[[KV], KV]) -> Row:
    sink, slots, window = map(change, (row.sink, row.slots, row.window))
    same = sink is row.sink and slots is row.slots and window is row.window
    return row if same else replace(row, sink=sink, slots=slots, window=window)


def _at_rest(kv: KV) -> KV:
    if isinstance(kv, Resting) or not kv.length or kv.keys.itemsize <= 2:  # 16 bits, or codes
        return kv
    made = Resting(kv)
    return made if made.held < made.nbytes else kv


def _split(x: Tensor) -> Iterator[_Part]:
    whole, left = x, torch.arange(x.shape[2], device=x.device)
    for dtype in _SMALL:
        same = _exact(x, dtype)
        if bool(same.all()):
            yield _Part(_copied(x, dtype), left)
            return
        if bool(same.any()):
            yield _Part(_copied(x[:, :, same], dtype), left[same])
            x, left = x[:, :, ~same], left[~same]
    yield _Part(x if x is whole else _copied(x, x.dtype), left)


def _exact(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,): the entries whose every bit comes back from a type."""
    bits, same = torch.int32 if x.itemsize == 4 else torch.int64, x.new_ones(x.shape[2], dtype=torch.bool)
    for layer in x:  # one at a time: nothing else is as large as the whole
        differ = layer.to(dtype).to(x.dtype).view(bits) ^ layer.view(bits)
        same &= (differ.amax((0, 2)) == 0) & (differ.amin((0, 2)) == 0)
        if not bool(same.any()):  # most often the first layer tells
            break
    return same


def _copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    return blank(x.new_empty(0, dtype=dtype), *x.shape).copy_(x)
