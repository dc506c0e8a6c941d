"""Small keys are attended to (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Evict


@register("key-norm")
@dataclass(frozen=True, kw_only=True)
class KeyNorm(Evict):
    """Small keys are attended to (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return -held.keys.norm(dim=-1)
