"""Keys along the direction in which a head asks (Q-Filters, Godey et al., 2025, arXiv 2503.02812).

The queries of a head lie about one direction u, so what they give a key is about <k, u>. Here u is the mean of the
newest text's queries, off their places. The paper takes their first singular vector, found once on other text; on so
few queries that turns with rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...core.memory import KV, Row
from ..base import register
from .evict import Attended


@register("q-filters")
@dataclass(frozen=True, kw_only=True)
class QFilters(Attended):
    """Keys in the direction of the queries.

    Q-Filters, Godey et al., 2025, arXiv 2503.02812.
    """

    queries: ClassVar[int] = -1

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        assert queries is not None  # the method asks for them
        asked = queries.float().unflatten(1, (held.keys.shape[1], -1)).flatten(2, 3)  # (L, H, q, D)
        return (held.keys @ asked.mean(2).unsqueeze(3)).squeeze(3)
