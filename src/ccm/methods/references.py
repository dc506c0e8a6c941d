"""The two ends of the yardstick: no context at all, and all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..errors import ConfigError
from ..memory import KV
from ..reader import Reader
from .base import Method, Run, register


class NoContextRun(Run):
    """Every segment is read on its own."""

    def append(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise ConfigError("got an empty segment; give at least one token")


class FullContextRun(Run):
    """One cache that grows with every token; nothing is computed twice."""

    def append(self, ids: Sequence[int]) -> None:
        (new,) = self.reader.read([list(ids)], self.memory)
        self.keep(window=KV.cat((self.memory.rows[0].window, new)))


@register("none")
@dataclass(frozen=True)
class NoContext(Method):
    """No memory: recovered share 0."""

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> Run:
        return NoContextRun(Reader(model))


@register("full")
@dataclass(frozen=True)
class FullContext(Method):
    """The raw keys and values of everything said: recovered share 1."""

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> Run:
        return FullContextRun(Reader(model))
