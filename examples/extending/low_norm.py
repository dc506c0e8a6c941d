"""A method: of each segment, keep the tokens whose keys have the smallest norm (Devoto et al., EMNLP 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ccm.errors import ConfigError
from ccm.memory import KV
from ccm.methods import Method, Run, register
from ccm.reader import Reader


class LowNormRun(Run):
    """Every layer and head keeps its own choice; kept entries stand in the order of the text."""

    def __init__(self, reader: Reader, tokens: int):
        super().__init__(reader)
        self.tokens = tokens

    def append(self, ids: Sequence[int]) -> None:
        (new,) = self.reader.read([list(ids)], self.memory)  # keys and values (L, H, T, D), position-free
        norms = new.keys.norm(dim=-1)
        chosen = norms.topk(min(self.tokens, len(ids)), largest=False).indices.sort().values
        kept = KV(*(part.take_along_dim(chosen.unsqueeze(-1), dim=2) for part in new))
        self.keep(window=KV.cat((self.memory.rows[0].window, kept)))


@register("low-norm")
@dataclass(frozen=True)
class LowNorm(Method):
    """``tokens``: entries kept of each segment."""

    tokens: int = 4

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"method {self.name}: tokens is {self.tokens}, expected at least 1")

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> LowNormRun:
        return LowNormRun(Reader(model), self.tokens)
