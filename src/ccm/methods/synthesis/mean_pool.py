"""Mean-pooled keys and values: the control that every trained compressor must beat.

Average pooling outperforms gist tokens in "Long Context In-Context Compression by Getting to the Gist of Gisting"
(Petrov et al., 2025), whose GistPool builds on it. Simplified: nothing is trained here. Keys are averaged off their
positions, and each mean takes the place of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import Method, register
from ..parts import Part, behind


@register("mean-pool")
@dataclass(frozen=True, kw_only=True)
class MeanPool(Method):
    """Means of keys and values a segment.

    Attributes:
        slots: means per segment; a shorter segment has one for each token.
    """

    whole: ClassVar[bool] = True
    made: ClassVar[str] = "pooled"
    slots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(slots=1)

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        n = min(self.slots, leaving.length)
        return KV.cat((row.slots, KV(*(pooled(part, n) for part in leaving))))

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots + min(self.slots, leaving)

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        """As many means for every segment as it has tokens, and no more than there are slots for one."""
        parts, start, left = found, 0, row.sunk
        for length in lengths[: row.steps]:
            sunk = min(left, length)  # the sink takes the first tokens
            means = min(self.slots, length - sunk)
            parts = behind(parts, "slots", self.made, means, (start + sunk, start + length))
            start, left = start + length, left - sunk
        if start == row.tokens and parts and parts[-1].entries[1] == row.sink.length + row.slots.length:
            return parts
        return super()._between(row, found, lengths)


def pooled(states: Tensor, n: int) -> Tensor:
    """Means over n even chunks of time: (L, H, T, D) -> (L, H, n, D) in fp32."""
    over_time = states.float().transpose(2, 3).flatten(0, 1)
    means = torch.nn.functional.adaptive_avg_pool1d(over_time, n)
    return means.unflatten(0, states.shape[:2]).transpose(2, 3)
