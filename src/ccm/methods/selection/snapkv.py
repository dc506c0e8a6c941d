"""What the last 32 queries attend to, smoothed over neighbours (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from ...core.memory import KV, Row
from ..base import register
from .evict import Attended


@register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(Attended):
    """What the last 32 queries attend to.

    Their attention is smoothed over neighbours. Li et al., NeurIPS 2024, arXiv 2404.14469.
    """

    queries: ClassVar[int] = 32
    kernel: ClassVar[int] = 5

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        mean = self.seen(row, held, queries).mean(dim=(2, 3))
        return avg_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)
