"""A method: of each segment, keep the tokens whose keys have the smallest norm (Devoto et al., EMNLP 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ccm.core.memory import KV, Row
from ccm.errors import ConfigError
from ccm.methods import Method, register


@register("low-norm")
@dataclass(frozen=True, kw_only=True)
class LowNorm(Method):
    """``tokens``: entries kept of each segment. Every layer and head has its own, in the order of the text."""

    whole: ClassVar[bool] = True  # segments leave the window one by one
    tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ConfigError(f"method {self.name}: tokens is {self.tokens}, expected at least 1")

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        norms = leaving.keys.norm(dim=-1)  # keys (L, H, T, D), without positions
        chosen = norms.topk(min(self.tokens, leaving.length), largest=False).indices.sort().values
        return KV.cat((row.slots, leaving.take(chosen)))

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots + min(self.tokens, leaving)
