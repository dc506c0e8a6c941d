"""What a conversation holds after some turns, from the model's shape alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config import CompressorConfig
from ..errors import ConfigError
from ..families import get_family
from ..models import random_model
from ..rules import get_rule
from ..twin import kv_shape, text_config

#: Bits of a quantized weight: 4-bit ones share a float32 among 64, 8-bit ones one among a row.
BITS = {"4bit": 4.5, "8bit": 8}


@dataclass(frozen=True)
class Budget:
    """What one conversation may keep: slots a segment, raw tokens first and newest, and the longest segment."""

    slots: int
    sink: int
    window: int
    segment: int


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Attributes:
        layers, heads, size: of its keys and values; heads are KV heads.
        dtype: of the weights, of raw tokens and of the cache.
        parameters: their number.
        weight_bytes: of all of them.
        context: most positions.
    """

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    parameters: int
    weight_bytes: int
    context: int

    @classmethod
    def of(cls, config: Any, load_in: str | None = None) -> Shape:
        """From a transformers config, its layers quantized if that is asked for.

        Raises:
            UnsupportedModelError: the model cannot carry a memory.
        """
        model = random_model(config, "meta")
        get_family(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        nbytes = count * model.dtype.itemsize
        if load_in:
            head = model.get_output_embeddings()
            layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
            nbytes -= sum(m.weight.numel() * (8 * model.dtype.itemsize - BITS[load_in]) for m in layers) // 8
        context = text_config(config).max_position_embeddings
        return cls(*kv_shape(config), model.dtype, count, int(nbytes), context)

    def kv_bytes(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the keys and values of so many tokens or slots, in the model's type by default."""
        return 2 * self.layers * self.heads * self.size * (dtype or self.dtype).itemsize * tokens


@dataclass(frozen=True)
class Held:
    """What a memory holds.

    Attributes:
        sink, slots, window: their sizes.
        segments: token counts of the raw segments in the window, oldest first.
        folds: segments folded so far.
    """

    sink: int
    slots: int
    window: int
    segments: tuple[int, ...]
    folds: int

    @property
    def length(self) -> int:
        return self.sink + self.slots + self.window

    def nbytes(self, shape: Shape) -> int:
        """As ``Session.stats`` counts: slots are kept in fp32, raw tokens in the model's type."""
        return shape.kv_bytes(self.slots, torch.float32) + shape.kv_bytes(self.sink + self.window)


def after(turns: int, tokens: int, budget: Budget, config: CompressorConfig) -> Held:
    """The memory after so many turns of so many tokens each.

    Of all segments the newest that fit the window stay raw; those before them are folded, one by one.
    """
    turn = [min(budget.segment, tokens - start) for start in range(0, tokens, budget.segment)]
    total = turns * len(turn)
    raw: list[int] = []
    while len(raw) < total and sum(raw) + turn[-1 - len(raw) % len(turn)] <= budget.window:
        raw.append(turn[-1 - len(raw) % len(turn)])
    folds = total - len(raw)
    rule = get_rule(config.rule, **config.rule_options)
    return Held(
        sink=min(budget.sink, turn[0]) if folds else 0,
        slots=rule.size(folds, budget.slots),
        window=sum(raw),
        segments=tuple(reversed(raw)),
        folds=folds,
    )


def check_fits(held: Held, budget: Budget, shape: Shape) -> None:
    """Raises ConfigError unless the model's context has room for the memory, another segment and its COMP tokens."""
    needed = held.length + budget.segment + budget.slots
    if needed > shape.context:
        raise ConfigError(
            f"the memory would have {held.length} positions, with the next segment and its slots {needed}, and the "
            f"model's context is {shape.context}: plan fewer --slots or --turns, or an adapter whose rule is mean"
        )
