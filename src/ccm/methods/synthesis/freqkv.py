"""Low frequencies over time (FreqKV, Kai et al., 2025, arXiv 2505.00570).

Keys, off their places, and values of N entries go through a cosine transform along the text. The n lowest
frequencies, transformed back over n places, are n entries that vary more slowly:

    y = sqrt(n / N) C_n^T C_N[:n] x          C_N: the orthonormal DCT-II of N places

Old text passes through it again in every fold, as in the paper, which also trains the model for it; nothing is
trained here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from ..selection.evict import Evict


@register("freqkv")
@dataclass(frozen=True, kw_only=True)
class FreqKV(Evict):
    """The low frequencies of many entries (FreqKV, Kai et al., 2025, arXiv 2505.00570)."""

    made: ClassVar[str] = "filtered"

    def shortened(self, row: Row, held: KV, queries: Tensor | None) -> KV:
        n, length = self.tokens, held.length
        forth, back = cosines(length, held.keys.device)[:n], cosines(n, held.keys.device).T
        low = (n / length) ** 0.5 * back @ forth
        return KV(low @ held.keys, low @ held.values)


def cosines(n: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II, (frequencies, places)."""
    place = torch.arange(n, device=device, dtype=torch.float32)
    matrix = torch.cos(math.pi / max(n, 1) * (place + 0.5) * place.unsqueeze(1)) * (2 / max(n, 1)) ** 0.5
    matrix[:1] /= 2**0.5
    return matrix
