"""Sentences that say what the text is about (SumBasic, Vanderwende et al., 2007): the oldest way to sum up.

A sentence counts the mean share that its words have of the text; once it is taken, its words count the square of what
they did, so that the next says something else. Words are token ids. The last sentence is cut to what fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.memory import Memory
from ..base import register
from .told import Told


@register("extractive")
@dataclass(frozen=True, kw_only=True)
class Extractive(Told):
    """Sentences with most of the text's words (SumBasic, Vanderwende et al., 2007)."""

    #: Tokens of a sentence at most; without a tokenizer, of each.
    LONGEST: ClassVar[int] = 24

    def chosen(self, old: Sequence[int], newest: Sequence[int], sink: Memory) -> Sequence[int]:
        share = {token: count / len(old) for token, count in Counter(old).items()}
        left, places = self.sentences(old), list[int]()
        while len(places) < self.tokens:
            best = max(left, key=lambda span: (sum(share[old[i]] for i in span) / len(span), span.start))
            left.remove(best)
            places += best
            share |= {old[i]: share[old[i]] ** 2 for i in best}
        return sorted(places[: self.tokens])

    def sentences(self, ids: Sequence[int]) -> list[range]:
        """Spans of the text that end where a sentence does."""
        spans, start = [], 0
        for i, token in enumerate(ids):
            ends = self.tokenizer is not None and self.tokenizer.decode([token]).rstrip(" ")[-1:] in ".!?\n"
            if ends or i + 1 - start == self.LONGEST or i + 1 == len(ids):
                spans.append(range(start, i + 1))
                start = i + 1
        return spans
