"""StreamingLLM (Xiao et al., ICLR 2024): a few first tokens as attention sink, and the newest ones.

Keys and values stay as they were computed; keys are placed by their rank in the cache, not in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..errors import ConfigError
from ..memory import KV
from ..reader import Reader
from .base import Method, Run, register


class StreamingRun(Run):
    """A rolling cache: a segment reads what is kept, joins it, and pushes the oldest tokens out."""

    def __init__(self, reader: Reader, sink: int, window: int):
        super().__init__(reader)
        self.most_sink = sink
        self.sink, self.window = sink, window
        self.held = self.memory.rows[0].window  # first tokens that may be a sink, then the newest

    def append(self, ids: Sequence[int]) -> None:
        (new,) = self.reader.read([list(ids)], self.memory)
        self.held = KV.cat((self.held, new))
        self._trim()

    def resize(self, entries: int) -> None:
        """Keep at most so many tokens from now on, sink included; a budget below 8 has one sink token."""
        sink = min(entries, self.most_sink, self.most_sink if entries >= 8 else 1)
        if (sink, entries - sink) != (self.sink, self.window):
            self.sink, self.window = sink, entries - sink
            self._trim()

    def _trim(self) -> None:
        held, length = self.held, self.held.length
        self.keep(
            sink=held.slice(0, self.sink),
            window=held.slice(max(min(self.sink, length), length - self.window)),
        )
        first = held.slice(0, self.most_sink)  # the sink grows again with the budget
        self.held = KV.cat((first, held.slice(max(first.length, length - self.window))))


@register("streaming-llm", "window")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Sink and recent tokens.

    Attributes:
        sink: first tokens that stay.
        window: newest tokens that stay.
    """

    sink: int = 4
    window: int = 252

    def __post_init__(self) -> None:
        for name in ("sink", "window"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method {self.name}: {name} is {getattr(self, name)}, expected at least 0")

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> StreamingRun:
        return StreamingRun(Reader(model), self.sink, self.window)
