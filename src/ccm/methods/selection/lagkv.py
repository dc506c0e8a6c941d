"""Entries that vary most, measured by what comes next (Liang et al., 2025, arXiv 2504.04704).

Entries are cut into parts of ``lag``. Channels of a part are scaled to the range that they have in the next part;
the deviation over channels ranks the entries of a part, and equal ranks stay in all of them. The last part stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Evict


@register("lagkv")
@dataclass(frozen=True, kw_only=True)
class LagKV(Evict):
    """What varies most beside what comes next (Liang et al., 2025, arXiv 2504.04704)."""

    lag: ClassVar[int] = 16

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        rank = torch.full(held.keys.shape[:3], float(self.lag), device=held.keys.device)
        parts = KV.cat((held, row.window.to(torch.float32)))
        if (count := parts.length // self.lag) > 1:
            deviation = self._deviation(parts.keys, count) + self._deviation(parts.values, count)
            ranked = deviation.argsort(-1).argsort(-1).flatten(2)[:, :, : held.length]
            rank[:, :, : ranked.shape[2]] = ranked.float()
        return rank

    def _deviation(self, states: Tensor, count: int) -> Tensor:
        """(L, H, N, D) -> (L, H, count - 1, lag)."""
        parts = states[:, :, : count * self.lag].unflatten(2, (count, self.lag))
        low, high = parts[:, :, 1:].aminmax(dim=3, keepdim=True)
        return ((parts[:, :, :-1] - low) / (high - low).clamp_min(1e-6)).std(-1).softmax(-1)
