"""What one does with transformers alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from transformers import DynamicCache

from ...core.room import CACHE
from ...core.twin import kv_shape
from ...errors import ConfigError
from ...models.load import load_model
from ..sizes import ANSWER, ENTRIES
from .base import Contender, Setting, Turn


class _Transformers(Contender):
    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.model, _ = load_model(setting.model, setting.dtype, setting.device)
        self._runs(self.model)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    def prefill(self, ids: list[int]) -> float:
        began = self.clock()
        self._read(DynamicCache(), [ids])
        return self.clock() - began

    def _read(self, cache: DynamicCache, ids: list[list[int]]) -> torch.Tensor:
        """The likeliest next token of each row, (B, 1)."""
        out = self.model(input_ids=torch.tensor(ids, device=self.device), logits_to_keep=1, **{CACHE: cache})
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _write(self, cache: DynamicCache, ids: list[list[int]]) -> list[float]:
        """Write answers behind the given tokens, and read their last token; when each token came."""
        token, times = self._read(cache, ids), []
        for _ in range(ANSWER):
            times.append(self.clock())
            token = self._read(cache, token.tolist())
        return times


class Full(_Transformers):
    """A cache of everything said, in transformers."""

    name = "full cache"
    crowd = 16

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.cache = DynamicCache()

    def take(self, ids: list[int]) -> None:
        self.cache = DynamicCache()
        layers, heads, size = kv_shape(self.model.config)
        for index in range(layers):
            states = (torch.randn(1, heads, len(ids), size) for _ in range(2))
            self.cache.update(*(each.to(self.device, self.dtype) for each in states), index)

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        length = self.cache.get_seq_length()
        began = self.clock()
        times = self._write(self.cache, [ids + head])
        ended = self.clock()
        self.cache.crop(length - self.cache.get_seq_length())  # by so many
        return Turn.of(began, times, ended)

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = (states.repeat(count, 1, 1, 1) for states in (layer.keys, layer.values))
            cache.update(keys, values, index)
        began = self.clock()
        self._write(cache, [ids + head] * count)
        return self.clock() - began

    @property
    def kv_bytes(self) -> int:
        return sum(states.nbytes for layer in self.cache.layers for states in (layer.keys, layer.values))


class Resend(_Transformers):
    """The whole conversation read again at every turn, in transformers."""

    name = "resend"
    crowd = 0
    #: Newest tokens that are sent; None: all.
    newest: ClassVar[int | None] = None

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.ids: list[int] = []

    def take(self, ids: list[int]) -> None:
        self.ids = ids

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        sent = self.ids if self.newest is None else self.ids[-self.newest :]
        began = self.clock()
        times = self._write(DynamicCache(), [sent + ids + head])
        return Turn.of(began, times, self.clock())

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        raise ConfigError(f"{self.name} is not measured with many at once")

    @property
    def kv_bytes(self) -> int:
        return 0


class Window(Resend):
    """The newest tokens read again at every turn."""

    name = "window"
    reach = 100_000
    newest = ENTRIES
