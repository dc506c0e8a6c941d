"""Clusters of keys (SubGen, Zandieh et al., 2024, arXiv 2402.06082).

Centres are chosen far from each other, one after the other (Gonzalez 1985); every entry joins the centre that its key
is nearest to. A cluster becomes one entry, the mean of its members, at the place of its centre. Simplified: a mean of
values stands for what the paper samples, and a cluster has no mass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from ..selection.evict import Evict, coarse


@register("subgen")
@dataclass(frozen=True, kw_only=True)
class SubGen(Evict):
    """Means of clusters of entries (SubGen, Zandieh et al., 2024, arXiv 2402.06082)."""

    made: ClassVar[str] = "pooled"

    def shortened(self, row: Row, held: KV, queries: Tensor | None) -> KV:
        centres = far_apart(held.keys, self.tokens)
        index = centres.unsqueeze(3).expand(-1, -1, -1, held.keys.shape[3])
        distance = torch.cdist(
            held.keys, held.keys.gather(2, index), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = coarse(distance).argmin(3)  # (L, H, N)
        member = torch.nn.functional.one_hot(nearest, self.tokens).to(held.keys.dtype).mT
        share = member / member.sum(3, keepdim=True).clamp_min(1)
        return KV(share @ held.keys, share @ held.values)


def far_apart(keys: Tensor, n: int) -> Tensor:
    """n of N keys (L, H, N, D): the newest, then always the one that is farthest from all. (L, H, n), sorted."""
    newest = keys.shape[2] - 1
    chosen = [keys.new_full(keys.shape[:2], newest, dtype=torch.long)] if n else []
    distance = (keys - keys[:, :, newest:]).norm(dim=3)
    for _ in range(n - 1):
        farthest = coarse(distance).argmax(2)
        chosen.append(farthest)
        at = farthest[:, :, None, None].expand(-1, -1, -1, keys.shape[3])
        distance = distance.minimum((keys - keys.gather(2, at)).norm(dim=3))
    if not chosen:
        return keys.new_empty((*keys.shape[:2], 0), dtype=torch.long)
    return torch.stack(chosen, 2).sort(2).values
