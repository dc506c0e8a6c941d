"""Keys and values that others cannot stand for (CurDKV, Sengupta et al., 2025, arXiv 2509.15038).

The score is the leverage of an entry's key times that of its value, as a CUR decomposition picks rows of both: what
is kept should give the attention's output back, and not its weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .compactor import leverage
from .evict import Evict


@register("curdkv")
@dataclass(frozen=True, kw_only=True)
class CurDKV(Evict):
    """Keys and values with most leverage (CurDKV, Sengupta et al., 2025, arXiv 2509.15038)."""

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return leverage(held.keys) * leverage(held.values)
