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

from ..core.memory import KV, Memory, Row
from ..core.reader import Ids
from .base import Method, register
from .parts import RAW, Part, behind


@register("retrieve")
@dataclass(frozen=True, kw_only=True)
class Retrieve(Method):
    """Sink, window, and of the text between them the blocks that are asked for.

    A row's slots are all the text between, its notes the numbers of the blocks that the newest text asked for: what a
    prompt reads that is known by its memory alone.

    Attributes:
        tokens: entries that are read beside sink and window, in whole blocks.
        block: tokens of a block.
    """

    queries: ClassVar[int] = 32
    sink: int = 4
    window: int = 64
    tokens: int = 64
    block: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(tokens=0, block=1)

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        return KV.cat((row.slots, leaving.to(torch.float32)))

    def settled(
        self, rows: Sequence[Row], queries: Sequence[Tensor | None], room: int = 0
    ) -> tuple[Row, ...]:
        rows = super().settled(rows, queries, room)
        return tuple(
            replace(
                row,
                merged=0,
                merged_segments=0,
                notes=row.notes if asked is None else self._chosen(row, asked),
            )
            for row, asked in zip(rows, queries, strict=True)
        )

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        read = replace(memory, rows=tuple(map(self._read, memory.rows)))
        if ids is None or not any(row.slots.length for row in memory.rows):
            return read
        asked = self.reader.watch(ids, read, newest=self.queries)
        rows = (
            self._read(replace(row, notes=self._chosen(row, queries)))
            for row, (_, queries) in zip(memory.rows, asked, strict=True)
        )
        return replace(memory, rows=tuple(rows))

    def _chosen(self, row: Row, queries: Tensor) -> tuple[int, ...]:
        """The blocks that queries attend to most, in the order of the text."""
        keys, length = row.slots.keys.float(), row.slots.length
        if not length:
            return ()
        scaling = torch.tensor([scoring.scaling for scoring in self.reader.scoring], device=keys.device)
        asked = queries.unflatten(1, (keys.shape[1], -1)) * scaling.view(-1, 1, 1, 1, 1)
        mass = (asked @ keys.unsqueeze(2).mT).softmax(-1).mean(dim=(0, 1, 2, 3))
        blocks = torch.nn.functional.pad(mass, (0, -length % self.block)).view(-1, self.block).sum(1)
        best = blocks.topk(min(len(blocks), self.tokens // self.block)).indices
        return tuple(best.sort().values.tolist())

    def _read(self, row: Row) -> Row:
        """The row with its chosen blocks alone."""
        parts = [row.slots.slice(n * self.block, (n + 1) * self.block) for n in row.notes]
        return replace(row, slots=KV.cat([row.slots.slice(0, 0), *parts]))

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        """The blocks that were chosen, each as it was said; all of them where nothing was left out."""
        sink, between = row.sink.length, row.tokens - row.sink.length
        if row.slots.length == between:
            return behind(found, "slots", RAW, between, (sink, row.tokens))
        for number in row.notes:
            start, stop = sink + number * self.block, sink + min((number + 1) * self.block, between)
            found = behind(found, "slots", RAW, stop - start, (start, stop))
        return found

    def apart(self, row: Row) -> int:
        """All tokens so far: it is never full."""
        return row.tokens + row.window.length

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots + leaving

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "tokens": self.tokens, "block": self.block}
