"""A batch whose rows come and go, in tensors with room for more: who joins is copied, and nobody else.

            first                end
    row 0     .  M  M  M  a  a  a  .  .   . room, M memory, a and b tokens that were read
    row 1     .  .  M  M  M  b  b  .  .
    room      .  .  .  .  .  .  .  .  .

A row that joins ends where all others end, and tokens are written behind that. The last row takes the place of one
that leaves. Rows that there is no room for double the room. Columns in front come with a row that is wider than all
before it. What is moved is moved layer by layer, so that the old and the new of one layer alone are there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .live import Live
from .pages import blank
from .room import ROOM


class Batch:
    """Rows that read and write side by side.

    Args:
        live: the first rows. Their cache is the batch's from then on, and lies where it is until others join.

    Attributes:
        live: all rows. Who runs a pass over them puts the rows after it in its place.
    """

    def __init__(self, live: Live):
        self.live = live
        self._room: list[tuple[Tensor, Tensor]] = []  # of each layer (rows, H, columns, D)
        self._first = 0

    def __len__(self) -> int:
        return len(self.live)

    @property
    def _width(self) -> int:
        return self.live.valid.shape[1]

    @property
    def _end(self) -> int:
        return self._first + self._width

    def reserve(self, tokens: int) -> None:
        """Make sure that there is room for so many tokens more in every row."""
        if self._room and self._end + tokens > self._room[0][0].shape[2]:
            self._move(len(self), self._width)

    def join(self, live: Live) -> None:
        """Put rows behind those that are there: (B, H, K, D) of each layer is copied, and leaves their cache."""
        old, rows, width = len(self), len(self) + len(live), live.valid.shape[1]
        wide = max(self._width, width)
        if not self._room or rows > len(self._room[0][0]) or self._end < wide:
            self._move(rows, wide)
        begin, end = self._end - width, self._end
        for room in self._room:
            layer = live.cache.layers.pop(0)
            for states, new in zip(room, (layer.keys, layer.values), strict=True):
                states[old:rows, :, begin:end] = new
        self._first = end - wide
        self.live = Live(self.live.cache, *self._both(live, wide))
        self._hold()

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Let rows go, but not all of them.

        Returns:
            of each row that is left, which one it was.
        """
        order = list(range(len(self)))
        stay = len(order) - len(rows)
        holes = [row for row in rows if row < stay]
        for hole, last in zip(holes, [row for row in order[stay:] if row not in rows], strict=True):
            order[hole] = last
        order = order[:stay]
        if not self._room:
            self._move(len(self), self._width)
        for states in (states for room in self._room for states in room):
            for hole in holes:
                states[hole, :, self._first : self._end] = states[order[hole], :, self._first : self._end]
        live = self.live
        position, is_memory, valid = (part[order] for part in (live.position, live.is_memory, live.valid))
        unused = int(valid.any(0).long().argmax())
        self.live = Live(live.cache, position[:, unused:], is_memory[:, unused:], valid[:, unused:])
        self._first += unused
        self._hold()
        if 4 * stay <= len(self._room[0][0]):
            self._move(2 * stay, self._width)
        return order

    def _both(self, live: Live, wide: int) -> list[Tensor]:
        """Positions and the like of the batch and of rows behind it, (B, K) each."""
        names = ("position", "is_memory", "valid")
        pairs = [(getattr(self.live, name), getattr(live, name)) for name in names]
        return [torch.cat([pad(part, (wide - part.shape[1], 0)) for part in pair]) for pair in pairs]

    def _move(self, rows: int, wide: int) -> None:
        """Move to tensors of so many columns, and of rows enough: twice as many as before if these are too few."""
        there = len(self._room[0][0]) if self._room else 0
        if there < rows:
            more = max(rows, 2 * there)
        else:
            more = rows if 4 * len(self) <= there else there
        front = wide - self._width
        first = front + ROOM if front else 0
        last = first + self._width
        made = []
        self._room = []  # until all have moved, every layer lies where it is
        for layer in self.live.cache.layers:
            pair = []
            for held in (layer.keys, layer.values):
                # zeros: what is masked must be numbers all the same
                room = blank(held, more, held.shape[1], last + ROOM, held.shape[3])
                room[: len(held), :, first:last] = held
                pair.append(room)
            made.append((pair[0], pair[1]))
            self._show(layer, made[-1], first)
        self._room, self._first = made, first

    def _hold(self) -> None:
        """Let the cache have what lies between the first and the last column of the rows that are taken."""
        for layer, room in zip(self.live.cache.layers, self._room, strict=True):
            self._show(layer, room, self._first)

    def _show(self, layer: Any, room: tuple[Tensor, Tensor], first: int) -> None:
        keys, values = (states[: len(self), :, first:] for states in room)
        layer.hold(keys, values, self._width)
