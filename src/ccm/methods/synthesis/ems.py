"""Evict, then merge (EMS, Li et al., 2024, arXiv 2412.08521).

An entry counts by the attention of the newest queries and by that of all queries of the text, the larger share of the
two. Evicted entries join the one that stays whose key is most similar, weighted by what they count; those that are
unlike all of them, the paper's zero class, go. Simplified: the threshold is one number for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from ..selection.evict import Attended
from .merging import joined_to_nearest


@register("ems")
@dataclass(frozen=True, kw_only=True)
class EMS(Attended):
    """Entries that count, others merged in.

    They count by the attention of the newest queries, or of all. EMS, Li et al., 2024, arXiv 2412.08521.
    """

    queries: ClassVar[int] = -1
    made: ClassVar[str] = "merged"
    #: Newest queries that say what counts locally.
    LOCAL: ClassVar[int] = 32
    #: Cosine below which an evicted entry joins none.
    LEAST: ClassVar[float] = 0.6

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        seen = self.seen(row, held, queries).mean(2)  # (L, H, w, N)
        local, whole = seen[:, :, -self.LOCAL :].mean(2), seen.mean(2)
        return torch.maximum(*(part / part.sum(2, keepdim=True).clamp_min(1e-12) for part in (local, whole)))

    def shortened(self, row: Row, held: KV, queries: Tensor | None) -> KV:
        score = self.score(row, held, queries)
        return joined_to_nearest(held, self.best(score), score + 1e-6, torch.tensor(self.LEAST))
