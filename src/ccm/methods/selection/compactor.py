"""Keys that others cannot stand for (Compactor, Chari and Van Durme, 2025, arXiv 2507.08143).

An entry's leverage, k (K^T K + r I)^-1 k, is large where its key points where few others do. No query is asked, so it
does not matter what will be asked. Simplified: exact leverage in place of a sketch, and no attention term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Evict

#: Added to K^T K, as a share of the mean of its diagonal.
RIDGE = 0.3


@register("compactor")
@dataclass(frozen=True, kw_only=True)
class Compactor(Evict):
    """Keys with most leverage (Compactor, Chari and Van Durme, 2025, arXiv 2507.08143)."""

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return leverage(held.keys)


def leverage(states: Tensor) -> Tensor:
    """(L, H, N, D) -> (L, H, N), between 0 and 1: how much of a state only it can say.

    With fewer states than channels all of them could be said by themselves alone; the ridge tells them apart.
    """
    gram = states.mT @ states
    ridge = RIDGE * gram.diagonal(dim1=2, dim2=3).mean(2).clamp_min(1e-12)
    lifted = gram + ridge[..., None, None] * torch.eye(gram.shape[3], device=gram.device)
    return (states @ torch.linalg.inv(lifted) * states).sum(3)
