"""Gisting of a fixed context (Mu et al., NeurIPS 2023): all that was said becomes n slots at once.

Whenever a segment arrives, the whole history c(1..t) is read again and compressed as one: an upper bound for what n
slots can hold, at a cost that grows with the history, as does what must be stored beside the slots to do it.
Simplified: the original tunes all weights; here a LoRA is trained, with the data, objective and steps of CCM, on
every prefix of a row in one parallel pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..memory import Memory
from ..reader import Ids
from .base import register, texts
from .compressed import Trained


@register("gisting")
@dataclass(frozen=True, kw_only=True)
class Gisting(Trained):
    """n slots in all, made anew from the whole history at every step. The history is in the row's notes."""

    kind: ClassVar[str] = "gisting"

    def fold(self, memory: Memory, ids: Ids, mask: Tensor | None = None, *, answered: bool = False) -> Memory:
        rows = []
        for row, text in zip(memory.rows, texts(ids, mask), strict=True):
            if not text:
                raise ConfigError("got an empty segment; give at least one token")
            history = (*row.notes, *text)
            (made,) = self.reader.compress([history], slots=self.slots).rows
            rows.append(replace(made, notes=history))
        return replace(memory, rows=tuple(rows))
