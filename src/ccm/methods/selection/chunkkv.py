"""Chunks stay or go as a whole, so that phrases are not torn (ChunkKV, Liu et al., NeurIPS 2025, arXiv 2502.00299).

A chunk counts what the newest queries attend to in it. Chunks begin anew in every fold; with ``tokens`` a multiple of
the chunk's length, those that stayed are cut where they were. Simplified: no layer takes over the choice of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Attended


@register("chunkkv")
@dataclass(frozen=True, kw_only=True)
class ChunkKV(Attended):
    """Chunks that the newest text attends to (ChunkKV, Liu et al., NeurIPS 2025, arXiv 2502.00299)."""

    queries: ClassVar[int] = 32
    chunk: ClassVar[int] = 8

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        mean = self.seen(row, held, queries).mean(dim=(2, 3))
        padded = torch.nn.functional.pad(mean, (0, -held.length % self.chunk))
        sums = padded.unflatten(2, (-1, self.chunk)).sum(3)
        return sums.repeat_interleave(self.chunk, dim=2)[:, :, : held.length]
