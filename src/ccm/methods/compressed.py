"""CCM: finished segments are folded into slots by a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..compressor import Compressor
from ..errors import ConfigError
from .base import Method, Run, register


class CompressedRun(Run):
    """Sink, slots and recent window, folded by a compressor."""

    reader: Compressor

    def __init__(self, compressor: Compressor, **sizes: int | None):
        super().__init__(compressor)
        self.sizes = sizes

    def append(self, ids: Sequence[int]) -> None:
        self.memory = self.reader.compress([list(ids)], self.memory, **self.sizes)


@dataclass(frozen=True)
class Compressed(Method):
    """Any compressor behind the protocol. An option that is None is the adapter's own.

    Attributes:
        adapter: a shipped adapter's name, a folder or a hub id; empty is the one of the method's name.
        slots: slots per segment, the first k of the adapter's n.
        sink, window: raw tokens that stay, first and newest.
        rule: how blocks enter the memory, and its options.
    """

    adapter: str = ""
    slots: int | None = None
    sink: int | None = None
    window: int | None = None
    rule: str | None = None
    rule_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("sink", 0), ("window", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"method {self.name}: {name} is {value}, expected at least {least}")

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> CompressedRun:
        changes = {"rule": self.rule, "rule_options": self.rule_options} if self.rule else {}
        compressor = shared_compressor(model, self.adapter or self.name, **changes)
        if self.slots is not None and self.slots > compressor.config.slots:
            raise ConfigError(
                f"method {self.name}: slots is {self.slots}, the adapter has {compressor.config.slots} per segment"
            )
        return CompressedRun(compressor, slots=self.slots, sink=self.sink, window=self.window)


@register("ccm-concat")
@dataclass(frozen=True)
class CCMConcat(Compressed):
    """CCM-concat: n slots for every segment."""


@register("ccm-merge")
@dataclass(frozen=True)
class CCMMerge(Compressed):
    """CCM-merge: n slots in all."""


def shared_compressor(model: PreTrainedModel, adapter: str, **changes: Any) -> Compressor:
    """The compressor of a model and an adapter, loaded once and kept with the model."""
    known = model.__dict__.setdefault("_ccm_compressors", {})
    key = adapter, json.dumps(changes, sort_keys=True)
    if key not in known:
        known[key] = Compressor.from_pretrained(model, adapter, **changes)
    return known[key]
