"""Keys unlike the mean key stay (Park et al., 2025, arXiv 2504.15364), here compared off their places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ...core.memory import KV, Row
from ..base import register
from .evict import Evict


@register("keydiff")
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evict):
    """Keys unlike the mean key stay (Park et al., 2025, arXiv 2504.15364)."""

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        mean = normalize(held.keys, dim=-1).mean(dim=2, keepdim=True)
        return -cosine_similarity(held.keys, mean, dim=-1)
