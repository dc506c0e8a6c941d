"""Learned slots, and beside them entries that are fitted to attention.

A trained adapter keeps what it was trained on, such as told facts, better than the text itself does. On text of any
other kind, entries that are fitted without training are ahead of it (docs/decisions.md, measured). So each gets a
part of the bytes. What is fitted is how the text was attended to beside the learned slots, so it goes where they say
little; and they stay as they were learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.folding import put
from ...core.memory import KV, Memory, Row
from ...core.window import overflow
from ..base import Method, Segment, register
from ..parts import Part, behind
from ..synthesis.attention_matching import asked
from ..synthesis.matching import match
from .base import Hybrid


@register("slots-and-matching")
@dataclass(frozen=True, kw_only=True)
class SlotsAndMatching(Hybrid):
    """Few slots, and fitted entries.

    CCM's slots (Kim et al., ICLR 2024, arXiv 2312.03414) grow with the text, and beside them stand entries of
    Attention Matching (arXiv 2602.16284), a fixed number. A row's slots are [learned | fitted], and its notes are the
    number of the fitted ones.

    Attributes:
        fitted: entries behind the learned slots, from the first text that is longer.
    """

    queries: ClassVar[int] = -1
    adapter: str = "ccm-broad"
    slots: int | None = 1
    fitted: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(fitted=1)

    @staticmethod
    def _reads(row: Row) -> bool:
        return len(row.notes) <= 1 and sum(row.notes) <= row.slots.length

    # ------------------------------------------------------------------ write

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        return Method.folded(self, memory, segment)

    @property
    def _together(self) -> bool:
        return False  # each segment is read behind what was fitted to the last one

    def settled(self, rows: Sequence[Row], queries: Sequence[Tensor | None], window: int) -> tuple[Row, ...]:
        rows = list(rows)
        while full := [r for r, row in enumerate(rows) if overflow(row.segments, window)]:
            learned = [replace(rows[r], slots=_split(rows[r])[0]) for r in full]
            oldest = [replace(row, window=row.window.slice(0, row.segments[0])) for row in learned]
            none = torch.empty(len(full), 0, dtype=torch.long, device=self.reader.model.device)
            memory = Memory(tuple(oldest), self.fingerprint())
            new = self.reader.blocks(memory, none, none.bool(), self.slots or 0)
            for r, row, (_, block) in zip(full, learned, new, strict=True):
                after = put(row, block, self.reader.rule, self.sink)
                leaving = row.window.slice(after.sink.length - row.sink.length, row.segments[0])
                entries = self._matched(after, _split(rows[r])[1], leaving, queries[r])
                slots = KV.cat((after.slots, entries.to(torch.float32)))
                rows[r] = replace(after, slots=slots, notes=(entries.length,))
        return tuple(rows)

    def _matched(self, row: Row, old: KV, leaving: KV, queries: Tensor | None) -> KV:
        """The fitted entries (L, H, n, D) beside a row of learned slots, from the old ones and what leaves."""
        held = KV.cat((old, leaving.to(torch.float32)))
        if held.length <= self.fitted:
            return held
        front = KV.cat((row.sink.to(torch.float32), row.slots))
        beside = replace(row, sink=front, slots=old)
        return match(self.reader, beside, held, self.fitted, asked(self.reader, self.tokenizer, queries))

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        learned, entries = _split(row)
        found = super()._between(replace(row, slots=learned), found, lengths)
        return behind(found, "slots", "fitted", entries.length, (row.sunk, row.tokens))

    # ------------------------------------------------------------------ sizes

    def size(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        sink, slots, window = super().size(lengths)
        gone = sum(lengths) - window - sink
        return sink, slots + min(self.fitted, gone), window

    def noted(self, row: Row, tokens: int) -> Row:
        learned = self.reader.rule.size(row.steps, self.slots or 0)
        return replace(row, notes=(row.slots.length - learned,) if row.steps else ())

    @property
    def _room(self) -> int:
        return self._beside(self.fitted) // (self.slots or 1)

    @property
    def limit(self) -> int | None:
        most = super().limit
        return None if most is None else most + self.fitted


def _split(row: Row) -> tuple[KV, KV]:
    """The learned slots of a row, and the fitted ones."""
    learned = row.slots.length - (row.notes[0] if row.notes else 0)
    return row.slots.slice(0, learned), row.slots.slice(learned)
