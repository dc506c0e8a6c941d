"""What is needed to repeat the text (Kim et al., NeurIPS 2025, arXiv 2505.23416).

Leaving text is read once more behind a request to repeat it. An entry counts as much as the query that attends to
it most. Simplified: only leaving text is repeated, so entries of older text count by what they do for that. The
ids of the window are in the row's notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Memory, Row
from ..base import register
from ..scores import weights
from .evict import Evict


@register("kvzip")
@dataclass(frozen=True, kw_only=True)
class KVzip(Evict):
    """What is needed to repeat the text (Kim et al., NeurIPS 2025, arXiv 2505.23416)."""

    asks: ClassVar[tuple[str, ...]] = ("words",)
    REQUEST: ClassVar[str] = "\n\nRepeat the previous context exactly.\n\n"

    def settled(self, rows: Sequence[Row], queries: Sequence[Tensor | None], window: int) -> tuple[Row, ...]:
        left = super().settled(rows, queries, window)
        return tuple(replace(row, notes=row.notes[len(row.notes) - row.window.length :]) for row in left)

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        left = len(row.notes) - row.window.length
        request = self._request()
        whole = replace(row, slots=held)
        again = [[*request, *row.notes[left - (held.length - row.slots.length) : left]]]
        ((text, asked),) = self.reader.watch(again, Memory((whole,), self.fingerprint()))
        parts = (whole.sink.keys, held.keys, whole.window.keys, text.keys)
        before = whole.sink.length
        keys = torch.cat([part.float() for part in parts], dim=2)
        found = weights(self.reader, asked[:, :, len(request) :], keys, memory=before + held.length)
        return found[..., before : before + held.length].amax(dim=(2, 3))

    def _request(self) -> Sequence[int]:
        """Nothing without a tokenizer: then the text is read twice."""
        return self.tokenizer.encode(self.REQUEST, add_special_tokens=False) if self.tokenizer else ()

    @property
    def behind(self) -> int:
        return len(self._request()) + 2 * self.longest
