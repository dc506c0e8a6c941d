"""Retrieval: all that was said is kept, in blocks, and a prompt reads those blocks that its queries ask for.

As in InfLLM (Xiao et al., NeurIPS 2024, arXiv 2402.04617), queries and keys are compared off their places, so that
distance does not count. Simplified: all layers and heads read the same blocks, those that have most of their
attention. What is read is bounded, and what is kept is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Memory, Row
from ...core.reader import Ids
from ..base import register
from ..parts import RAW, Part, behind
from ..references import FullContext
from ..scores import scoring


@register("retrieve")
@dataclass(frozen=True, kw_only=True)
class Retrieve(FullContext):
    """Everything; the blocks asked for are read.

    A row's slots are all the text between, its notes the numbers of the blocks that the newest text asked for: what a
    prompt reads that is known by its memory alone.

    Attributes:
        tokens: entries that are read beside sink and window, in whole blocks.
        block: tokens of a block.
    """

    queries: ClassVar[int] = 32
    most: ClassVar[str] = "tokens"
    sink: int = 4
    window: int = 64
    tokens: int = 64
    block: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(block=1, tokens=self.block)

    def settled(self, rows: Sequence[Row], queries: Sequence[Tensor | None], window: int) -> tuple[Row, ...]:
        return tuple(map(self._noted, super().settled(rows, queries, window), queries))

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        rows = memory.rows
        if ids is not None and any(row.slots.length for row in rows):
            asked = self.reader.watch(ids, self.recall(memory), newest=self.queries)
            rows = tuple(map(self._noted, rows, [queries for _, queries in asked]))
        return replace(memory, rows=tuple(map(self._read, rows)))

    def _noted(self, row: Row, queries: Tensor | None) -> Row:
        """The row with the blocks that queries attend to most, in the order of the text."""
        if queries is None or not row.slots.length:
            return row
        keys = row.slots.keys.float()
        scaling = torch.tensor([how.scaling for how in scoring(self.reader)], device=keys.device)
        asked = queries.unflatten(1, (keys.shape[1], -1)) * scaling.view(-1, 1, 1, 1, 1)
        mass = (asked @ keys.unsqueeze(2).mT).softmax(-1).mean(dim=(0, 1, 2, 3))
        blocks = torch.stack([block.sum() for block in mass.split(self.block)])
        best = blocks.topk(min(len(blocks), self.tokens // self.block)).indices
        return replace(row, notes=tuple(best.sort().values.tolist()))

    def _read(self, row: Row) -> Row:
        """The row with its chosen blocks alone."""
        parts = [row.slots.slice(n * self.block, (n + 1) * self.block) for n in row.notes]
        return replace(row, slots=KV.cat([row.slots.slice(0, 0), *parts]))

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        """The blocks that were chosen, each as it was said; all of them where nothing was left out."""
        sink, between = row.sunk, row.tokens - row.sunk
        if row.slots.length == between:
            return behind(found, "slots", RAW, between, (sink, row.tokens))
        for number in row.notes:
            start, stop = sink + number * self.block, sink + min((number + 1) * self.block, between)
            found = behind(found, "slots", RAW, stop - start, (start, stop))
        return found

    @property
    def limit(self) -> None:
        """None: everything is kept, and ``tokens`` of it are read."""
        return None

    def apart(self, row: Row) -> int:
        """All tokens so far: it is never full."""
        return row.seen
