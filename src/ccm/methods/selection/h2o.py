"""Heavy hitters: the attention that entries have gathered (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

Gathered over the queries of the newest text alone, so that nothing but keys and values has to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Attended


@register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(Attended):
    """Heavy hitters: most attention gathered.

    Zhang et al., NeurIPS 2023, arXiv 2306.14048.
    """

    queries: ClassVar[int] = -1

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return self.seen(row, held, queries).sum(dim=(2, 3))
