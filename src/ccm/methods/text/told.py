"""Old text as fewer tokens of it: which ones, says the method; the model reads them anew behind the sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Memory, Row
from ..base import Method


@dataclass(frozen=True, kw_only=True)
class Told(Method):
    """A fixed number of tokens of the text between sink and window.

    A row's slots are the keys and values of these tokens, read without what stood between them. Its notes are the ids
    of [slots | window].

    Attributes:
        tokens: that stay.
    """

    asks: ClassVar[tuple[str, ...]] = ("words",)
    made: ClassVar[str] = "retold"
    most: ClassVar[str] = "tokens"
    window: int = 64
    tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(tokens=0)

    def chosen(self, old: Sequence[int], newest: Sequence[int], sink: Memory) -> Sequence[int]:
        """Places of ``tokens`` ids, in the order of the text.

        Args:
            old: more ids than that: those chosen before, then those that leave the window.
            newest: ids of the text read last.
            sink: what they are read behind.
        """
        raise NotImplementedError

    def settled(self, rows: Sequence[Row], queries: Sequence[Tensor | None], window: int) -> tuple[Row, ...]:
        return tuple(self._settled(row, row.window.length - window) for row in rows)

    def _settled(self, row: Row, over: int) -> Row:
        if over <= 0:
            return row
        newest = row.notes[len(row.notes) - row.segments[-1] :]
        gone = row.window.slice(0, over)
        sinking = self._sinking(row, gone)
        row = self._left(row, gone, sinking)
        between = len(row.notes) - row.window.length
        old, live = row.notes[:between], row.notes[between:]
        old = (*old[: row.slots.length], *old[row.slots.length + sinking :])
        return self.told(row, old, live, newest)

    def told(self, row: Row, old: Sequence[int], live: Sequence[int], newest: Sequence[int]) -> Row:
        """The row with slots and notes of what is chosen; ``live`` are the ids of its window."""
        if len(old) > self.tokens:
            old = [old[i] for i in self.chosen(old, newest, self._behind(row))]
        return self._counted(replace(row, slots=self.read(row, old), notes=(*old, *live)))

    def read(self, row: Row, ids: Sequence[int]) -> KV:
        """Keys and values (L, H, T, D) of tokens behind the row's sink alone, in fp32."""
        if not ids:
            return row.slots.slice(0, 0)
        (kv,) = self.reader.read([list(ids)], self._behind(row))
        return kv.to(torch.float32)

    def _behind(self, row: Row) -> Memory:
        """The row's sink alone."""
        nothing = row.slots.slice(0, 0)
        return Memory((replace(row, slots=nothing, window=nothing),), self.fingerprint())
