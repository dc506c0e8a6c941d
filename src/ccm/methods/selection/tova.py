"""What the last query attends to (Oren et al., EMNLP 2024, arXiv 2401.06104).

A mean over all heads of a layer, asked once for every text rather than after every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Attended


@register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA(Attended):
    """What the last query attends to (Oren et al., EMNLP 2024, arXiv 2401.06104)."""

    queries: ClassVar[int] = 1

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return self.seen(row, held, queries).mean(dim=(1, 2, 3)).unsqueeze(1).expand(held.keys.shape[:3])
