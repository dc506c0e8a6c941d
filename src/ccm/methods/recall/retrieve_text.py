"""Retrieval over the words themselves: the newest text chooses blocks of old text, and the model reads them anew.

Blocks are ranked as search engines rank documents (BM25, Robertson et al., 1994), with token ids as words. It is what
memory servers for agents do, without an index. What is read is bounded; of all text the ids are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ...core.memory import Row
from ..base import register
from ..text.told import Told

_Word = TypeVar("_Word", int, str)


@register("retrieve-text")
@dataclass(frozen=True, kw_only=True)
class RetrieveText(Told):
    """Old text by the words of the newest (BM25, Robertson et al., 1994).

    A row's notes are the ids of [all text behind the sink | window], its slots those of the chosen blocks.

    Attributes:
        block: tokens of a block.
    """

    block: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(block=1)

    def _settled(self, row: Row, over: int) -> Row:
        newest = row.notes[len(row.notes) - row.segments[-1] :]
        if over > 0:
            before = len(row.notes) - row.window.length
            gone = row.window.slice(0, over)
            sinking = self._sinking(row, gone)
            row = self._left(row, gone, sinking)
            row = replace(row, notes=(*row.notes[:before], *row.notes[before + sinking :]))
        old = row.notes[: len(row.notes) - row.window.length]
        read = [old[i] for span in self.found(old, newest) for i in span]
        return replace(row, slots=self.read(row, read))

    def found(self, old: Sequence[int], newest: Sequence[int]) -> list[range]:
        """Blocks of ``tokens`` tokens in all, in the order of the text; the one that counts least is cut."""
        spans = [range(s, min(s + self.block, len(old))) for s in range(0, len(old), self.block)]
        words = [Counter(old[i] for i in span) for span in spans]
        counts = bm25(words, newest)
        ranked = sorted(range(len(spans)), key=lambda b: (counts[b], b), reverse=True)
        left, chosen = self.tokens, []
        for b in ranked:
            if left > 0:
                chosen.append(spans[b][:left])
                left -= len(chosen[-1])
        return sorted(chosen, key=lambda span: span.start)

    def apart(self, row: Row) -> int:
        """All tokens so far: it is never full."""
        return row.seen


def bm25(
    blocks: Sequence[Counter[_Word]], asked: Sequence[_Word], k: float = 1.5, b: float = 0.75
) -> list[float]:
    """How well each block answers: sum over words of idf(w) n (k + 1) / (n + k (1 - b + b length / mean length))."""
    mean = sum(map(Counter.total, blocks)) / max(1, len(blocks))
    held = Counter(word for block in blocks for word in block)

    def count(block: Counter[_Word]) -> float:
        worn = k * (1 - b + b * block.total() / mean)
        return sum(
            math.log(1 + (len(blocks) - held[word] + 0.5) / (held[word] + 0.5)) * n * (k + 1) / (n + worn)
            for word in sorted(set(asked))
            if (n := block[word])
        )

    return [count(block) for block in blocks]
