"""Gisting of a fixed context (Mu et al., NeurIPS 2023): all that was said becomes n slots at once.

Whenever a segment arrives, the whole history c(1..t) is read again and compressed as one: an upper bound for what n
slots can hold, at a cost that grows with the history, as does what must be stored beside the slots to do it.
Simplified: the original tunes all weights; here a LoRA is trained, with the data, objective and steps of CCM, on
every prefix of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...core.memory import Memory
from ...core.reader import Ids
from ...core.segments import Layout
from ...errors import ConfigError
from ..base import Segment, register
from ..compressed import Trained
from .gisting_online import Alone
from .recurrent import Baseline


class Whole(Alone):
    """h(t) from all of c(1..t)."""

    kind = "gisting"
    rules = ("replace",)
    whole = True

    def lay_out(self, segments: Sequence[Sequence[Sequence[int]]], **sizes: int | None) -> Layout:
        layout = super().lay_out(segments, **sizes)
        longest = max(sum(map(len, row[:-1])) for row in segments)
        self.check_length(longest + layout.comp_index.shape[2])
        return layout

    def compress(self, input_ids: Ids, memory: Memory | None = None, *args: Any, **sizes: Any) -> Memory:
        if memory is not None and memory.steps:
            raise ConfigError(
                f"kind {self.kind!r} compresses a whole history at once; give all of it, without a memory"
            )
        return super().compress(input_ids, memory, *args, **sizes)


@register("gisting")
@dataclass(frozen=True, kw_only=True)
class Gisting(Trained):
    """n slots in all, made anew every step.

    They are made from the whole history, which is in the row's notes. Mu et al., NeurIPS 2023, arXiv 2304.08467.
    """

    made_by: ClassVar[type[Baseline]] = Whole
    asks: ClassVar[tuple[str, ...]] = ("adapter", "words")

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        rows = []
        for row, text in zip(memory.rows, segment.texts, strict=True):
            history = (*row.notes, *text)
            before = replace(memory, rows=(row.bare,))
            (made,) = self.reader.compress([history], before, slots=self.slots).rows
            rows.append(replace(made, notes=history))
        return replace(memory, rows=tuple(rows))
