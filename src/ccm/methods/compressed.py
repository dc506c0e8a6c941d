"""Finished segments are folded into slots by a trained adapter: CCM, and what its baselines share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
class Trained(Method):
    """An adapter of one kind behind the protocol.

    Attributes:
        kind: what the adapter makes slots from (``ccm.kinds``); others are refused.
        adapter: a shipped adapter's name, a folder or a hub id; empty is the one of the method's name.
        slots: slots per segment, the first k of the adapter's n; None is all of them.
    """

    kind: ClassVar[str] = "ccm"
    adapter: str = ""
    slots: int | None = None

    def __post_init__(self) -> None:
        self._check(("slots", 1))

    def _check(self, *options: tuple[str, int]) -> None:
        for name, least in options:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"method {self.name}: {name} is {value}, expected at least {least}")

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> CompressedRun:
        return CompressedRun(self.compressor(model), slots=self.slots)

    def compressor(self, model: PreTrainedModel, **changes: Any) -> Compressor:
        """The adapter on the model, with some settings changed; loaded once.

        Raises:
            ConfigError: there is no such adapter, it is of another kind, or it has fewer slots.
            MismatchError: it was trained for another model.
        """
        name = self.adapter or self.name
        compressor = shared_compressor(model, name, **changes)
        if (kind := compressor.config.kind) != self.kind:
            raise ConfigError(
                f"method {self.name}: adapter {name} is of kind {kind!r}, expected {self.kind!r}; give one that was "
                f"trained with compressor.kind={self.kind}"
            )
        if self.slots is not None and self.slots > compressor.config.slots:
            raise ConfigError(
                f"method {self.name}: slots is {self.slots}, the adapter has {compressor.config.slots} per segment"
            )
        return compressor


@dataclass(frozen=True)
class Compressed(Trained):
    """CCM's compressor. An option that is None is the adapter's own.

    Attributes:
        sink, window: raw tokens that stay, first and newest.
        rule: how blocks enter the memory, and its options.
    """

    sink: int | None = None
    window: int | None = None
    rule: str | None = None
    rule_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(("slots", 1), ("sink", 0), ("window", 0))

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> CompressedRun:
        changes = {"rule": self.rule, "rule_options": self.rule_options} if self.rule else {}
        return CompressedRun(
            self.compressor(model, **changes), slots=self.slots, sink=self.sink, window=self.window
        )


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
