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

    def whole(self) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0].entries.to(self.dtype)
        x = self.parts[0].entries.new_empty(self.shape, dtype=self.dtype)
        for entries, index in self.parts:
            x[:, :, index] = entries.to(self.dtype)
        return x


class Resting(KV):
    """Keys and values at rest, to be used like others. They are made anew for everyone who asks for them."""

    def __new__(cls, kv: KV) -> Resting:
        return tuple.__new__(cls, map(_Rested, kv))

    @property
    def _both(self) -> tuple[_Rested, _Rested]:
        keys, values = tuple.__iter__(self)
        return keys, values

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self._both[0].whole()

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._both[1].whole()

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
    left = torch.arange(x.shape[2], device=x.device)
    for dtype in _SMALL:
        small = x.to(dtype)
        same = _same(small.to(x.dtype), x)
        if bool(same.all()):
            yield _Part(small, left)
            return
        if bool(same.any()):
            yield _Part(small[:, :, same], left[same])
            x, left = x[:, :, ~same], left[~same]
    yield _Part(x, left)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """(N,): in which entries two tensors (L, H, N, D) have the same bits."""
    bits = torch.int32 if a.itemsize == 4 else torch.int64
    differ = a.view(bits) ^ b.view(bits)
    return (differ.amax((0, 1, 3)) == 0) & (differ.amin((0, 1, 3)) == 0)
