"""The attention that text to come will give (Expected Attention, Devoto et al., 2025, arXiv 2510.00636).

Queries to come are taken for normal, with mean m and covariance C over the newest queries, put at places to come:

    E[exp(q k / sqrt(d))] = exp(m k / sqrt(d) + k C k / 2d)

That expected weight times the length of an entry's value is its score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ...core.rotary import rotate
from ..base import register
from ..scores import scoring
from .evict import Attended


@register("expected-attention")
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Attended):
    """What text to come should attend to.

    Expected Attention, Devoto et al., 2025, arXiv 2510.00636.
    """

    queries: ClassVar[int] = -1
    #: Distances behind the memory at which queries are expected, in tokens.
    AHEAD: ClassVar[tuple[int, ...]] = (1, 4, 16, 64, 256)

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        assert queries is not None  # the method asks for them
        reader, start = self.reader, row.sink.length
        end = start + held.length + row.window.length
        turned = [
            rotate(queries.float(), *reader.rotary.stacked(torch.full((queries.shape[2],), end + far)))
            for far in self.AHEAD
        ]
        asked = torch.cat(turned, 2).unflatten(1, (held.keys.shape[1], -1)).flatten(2, 3)  # (L, H, q, D)
        mean = asked.mean(2, keepdim=True)
        spread = asked - mean
        place = torch.arange(start, start + held.length, device=held.keys.device)
        keys = rotate(held.keys, *reader.rotary.stacked(place))
        scaling = torch.tensor([each.scaling for each in scoring(reader)], device=keys.device)
        scaling = scaling.view(-1, 1, 1)
        varied = (keys @ spread.mT).square().mean(3)  # k C k
        exponent = scaling * (keys @ mean.mT).squeeze(3) + scaling.square() * varied / 2
        return exponent.softmax(2) * held.values.norm(dim=3)
