"""Mean-pooled keys and values: the control that every trained compressor must beat.

Average pooling outperforms gist tokens in "Long Context In-Context Compression by Getting to the Gist of Gisting"
(Petrov et al., 2025), whose GistPool builds on it. Simplified: nothing is trained here. Keys are averaged off their
positions, and each mean takes the place of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..memory import KV
from ..reader import Reader
from .base import Method, Run, register


class MeanPoolRun(Run):
    """A segment is read beside what is kept, and its means are put behind that."""

    def __init__(self, reader: Reader, slots: int):
        super().__init__(reader)
        self.slots = slots

    def append(self, ids: Sequence[int]) -> None:
        (text,) = self.reader.read([list(ids)], self.memory)
        row = self.memory.rows[0]
        block = KV(*(pooled(part, min(self.slots, len(ids))) for part in text))
        self.keep(slots=KV.cat((row.slots, block)), steps=row.steps + 1, tokens=row.tokens + len(ids))


def pooled(states: Tensor, n: int) -> Tensor:
    """Means over n even chunks of time: (L, H, T, D) -> (L, H, n, D) in fp32."""
    over_time = states.float().transpose(2, 3).flatten(0, 1)
    means = torch.nn.functional.adaptive_avg_pool1d(over_time, n)
    return means.unflatten(0, states.shape[:2]).transpose(2, 3)


@register("mean-pool")
@dataclass(frozen=True)
class MeanPool(Method):
    """Means of keys and values, without training.

    Attributes:
        slots: means per segment; a shorter segment has one for each token.
    """

    slots: int = 4

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ConfigError(f"method {self.name}: slots is {self.slots}, expected at least 1")

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> MeanPoolRun:
        return MeanPoolRun(Reader(model), self.slots)
