"""A cache with room behind its entries, so that a new token is written there and nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

#: What transformers calls a cache, where a model takes it and where it gives it back.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
#: Tokens for which there is room once a layer has grown.
ROOM = 64


class Roomy(DynamicLayer):
    """Keys and values (B, H, K, D) of a layer, as the beginnings of larger tensors."""

    _layer_type = None  # transformers must not take it for its own
    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._room: tuple[Tensor, Tensor] | None = None
        self._shown: Tensor | None = None  # the keys that lie there

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, H, T, D) behind those that are held; returns all of them."""
        if torch.is_grad_enabled() or not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        held, new = self.keys.shape[2], key_states.shape[2]
        keys, values = self.reserve(new)
        keys.narrow(2, held, new).copy_(key_states)
        values.narrow(2, held, new).copy_(value_states)
        self.hold(keys, values, held + new)
        return self.keys, self.values

    def reserve(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Tensors that begin with what is held and have room for so many tokens behind it, without gradients."""
        length = self.keys.shape[2] + tokens
        if self._room is None or not self._fits(length):
            self._room = self._larger(self.keys, length + ROOM), self._larger(self.values, length + ROOM)
        return self._room

    def hold(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Hold the first ``length`` entries of tensors (B, H, K, D), and write what comes behind them there."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._room = keys, values
        self.keys = self._shown = keys.narrow(2, 0, length)
        self.values = values.narrow(2, 0, length)

    def back(self, tokens: int) -> None:
        """Let go of the newest tokens."""
        length = self.keys.shape[2] - tokens
        fits = self._shown is self.keys
        self.keys, self.values = self.keys.narrow(2, 0, length), self.values.narrow(2, 0, length)
        self._shown = self.keys if fits else None

    def _fits(self, length: int) -> bool:
        """Whether what is held lies where it was put, with room; beams and the like put other tensors in place."""
        room: Any = self._room
        writable = not room[0].is_inference() or torch.is_inference_mode_enabled()
        return self._shown is self.keys and room[0].shape[2] >= length and writable

    @staticmethod
    def _larger(states: Tensor, length: int) -> Tensor:
        batch, heads, held, size = states.shape
        room = states.new_empty(batch, heads, length, size)
        room[:, :, :held] = states
        return room


def roomy_cache() -> DynamicCache:
    """An empty cache of such layers."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = Roomy
    return cache
