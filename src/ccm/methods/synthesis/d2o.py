"""Evicted entries join the most similar that stays (D2O, Wan et al., ICLR 2025, arXiv 2406.13035).

What stays is what gathered most attention. An evicted entry whose key is at least as similar to its nearest as
evicted ones are on the mean joins it; the others go. Simplified: that threshold is made anew in every fold, and all
layers have the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.memory import KV, Row
from ..base import register
from ..selection.evict import Attended
from .merging import joined_to_nearest


@register("d2o")
@dataclass(frozen=True, kw_only=True)
class D2O(Attended):
    """Heavy hitters, others merged in (D2O, Wan et al., ICLR 2025, arXiv 2406.13035)."""

    queries: ClassVar[int] = -1
    made: ClassVar[str] = "merged"

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return self.seen(row, held, queries).sum(dim=(2, 3))

    def shortened(self, row: Row, held: KV, queries: Tensor | None) -> KV:
        stay = self.best(self.score(row, held, queries))
        keys = normalize(held.keys, dim=3)
        nearest = (keys @ normalize(held.take(stay).keys, dim=3).mT).amax(3) if self.tokens else keys[..., 0]
        evicted = torch.ones_like(nearest).scatter(2, stay, 0.0)
        least = (nearest * evicted).sum(2) / evicted.sum(2) - 1e-2  # the mean of one is that one
        weight = torch.where(evicted > 0, nearest.exp(), torch.e)
        return joined_to_nearest(held, stay, weight, least[..., None, None])
