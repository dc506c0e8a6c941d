"""The two ends of the yardstick: no context at all, and all of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.memory import KV, Memory, Row
from ..core.reader import Ids
from .base import Method, register, texts


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoContext(Method):
    """Nothing: recovered share 0.

    What is answered is read, and nothing stays of what leaves the window.
    """

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        return row.slots

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots

    @property
    def limit(self) -> int:
        return self.sink + self.window


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullContext(Method):
    """Everything raw: recovered share 1.

    One cache that grows with every token.

    An encoder reads in both directions: there a row's notes are the tokens of all that was said, which are read
    anew with every prompt, in one pass.
    """

    window: int = sys.maxsize

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        return KV.cat((row.slots, leaving.to(torch.float32)))

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots + leaving

    def heard(self, row: Row, ids: Sequence[int]) -> Row:
        return replace(row, notes=(*row.notes, *ids)) if self.reader.two_sided else row

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        if not any(row.notes for row in memory.rows):
            return memory
        prompts = [[]] * len(memory) if ids is None else texts(ids)
        rows = []
        for row, prompt in zip(memory.rows, prompts, strict=True):
            (read,) = self.reader.read([[*row.notes, *prompt]], replace(memory, rows=(row.bare,)))
            whole = read.slice(0, len(row.notes))
            rows.append(replace(row, sink=row.pins, slots=row.slots.slice(0, 0), window=whole))
        return replace(memory, rows=tuple(rows))
