"""A model that can carry memories: what it is, and what fits it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..files.fingerprint import mismatch, model_fingerprint
from . import hooks
from .devices import layer_devices
from .families import Family, choose_backend, get_family
from .memory import KV, Memory, Row
from .rotary import Rotary
from .twin import kv_shape

Ids: TypeAlias = Tensor | Sequence[Sequence[int]]


class Carrier(nn.Module):
    """A causal language model, and what is known of it.

    Args:
        model: of a supported family (``ccm.core.families``). Its attention backend is wrapped, which changes no
            result.

    Raises:
        UnsupportedModelError: the family cannot carry a memory.
    """

    #: Name of the conditional adapter on the model; a reader has none.
    adapter = ""
    #: Whether an encoder reads and a decoder writes.
    two_sided: ClassVar[bool] = False

    def __new__(cls, model: PreTrainedModel | None = None, *args: Any, **kwargs: Any) -> Any:
        """Of an encoder-decoder, what ``ccm.encoder_decoder`` makes of the class."""
        two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return super().__new__(_with_encoder(cls) if two else cls)  # type: ignore[arg-type]

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.family, self.rotary = self.measured()
        self.devices = layer_devices(model, self.family.attention)
        hooks.register()
        hooks.carry(model)
        if not self.family.hands_on:
            hooks.bridge(model, self.family.attention)
        model.set_attn_implementation("ccm_" + choose_backend(model, self.family))

    def measured(self) -> tuple[Family, Rotary]:
        """What the model can do, and how its keys turn."""
        family = get_family(self.model)
        return family, Rotary(self.model, family.body, family.way, family.rotated)

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of full context takes in this model."""
        return 2 * math.prod(self.kv_shape()) * self.model.dtype.itemsize

    @property
    def body(self) -> nn.Module:
        """The decoder: from embeddings to last hidden states."""
        return self.model.get_submodule(self.family.body)

    @property
    def context(self) -> int:
        """Most positions of the model."""
        return self.family.context

    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, KV heads and their size."""
        return kv_shape(self.model.config)

    def fingerprint(self) -> str:
        """What a memory carries so that it is never read by another model."""
        return f"{model_fingerprint(self.model)}-none"

    def check(self, memory: Memory, batch: int | None = None) -> None:
        """Raises MismatchError if another model made the memory, ConfigError on a wrong batch size.

        What made it on this model, an adapter or a method, is of no importance to who reads it.
        """
        model = model_fingerprint(self.model)
        if memory.fingerprint.partition("-")[0] != model:
            raise mismatch(memory.fingerprint, model)
        if batch is not None and len(memory) != batch:
            raise ConfigError(f"got {batch} rows of tokens for a memory of {len(memory)} conversations")

    def empty(self, batch: int = 1) -> Memory:
        """The memory of ``batch`` conversations before anything was said."""
        layers, heads, size = self.kv_shape()
        none = torch.empty(layers, heads, 0, size, device=self.model.device)
        raw = KV(none, none).to(self.model.dtype)
        return Memory((Row(sink=raw, slots=KV(none, none), window=raw),) * batch, self.fingerprint())

    def tokens(self, input_ids: Ids, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and bool mask (B, T), on the model's device.

        Raises:
            ConfigError: they are no tokens of the model, or a row has none.
        """
        try:
            ids = torch.as_tensor(input_ids, device=self.model.device)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"input_ids: {error}; pad rows to one length, with an attention_mask"
            ) from error
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            raise ConfigError(
                f"input_ids: got shape {tuple(ids.shape)} of {ids.dtype}, expected (B, T) integers, T at least 1"
            )
        self.check_ids(ids)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
        if mask.shape != ids.shape or not bool(mask.any(1).all()):
            raise ConfigError(
                f"attention_mask: shape {tuple(mask.shape)} for ids {tuple(ids.shape)}, or an empty row"
            )
        return ids, mask.bool()

    def prepare(
        self, input_ids: Ids, memory: Memory | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Memory]:
        """Left-padded ids and bool mask (B, T), the order that moved them, and a memory that fits."""
        ids, mask = self.tokens(input_ids, attention_mask)
        memory = self.empty(len(ids)) if memory is None else memory
        self.check(memory, len(ids))
        memory = memory.to(self.model.device, self.model.dtype)
        self.check_room(memory, ids.shape[1])
        order = mask.long().argsort(dim=1, stable=True)
        return ids.gather(1, order), mask.gather(1, order), order, memory

    def check_ids(self, ids: Tensor) -> None:
        """Raises ConfigError for token ids, of any shape, outside the model's vocabulary."""
        words = self.model.get_input_embeddings().weight.shape[0]
        if int(ids.min()) < 0 or int(ids.max()) >= words:
            raise ConfigError(
                f"token ids {int(ids.min())} to {int(ids.max())} are outside the vocabulary of {words}; "
                "use the tokenizer of this model"
            )

    def check_length(
        self, length: int, advice: str = "split the text into shorter segments and fold them one by one"
    ) -> None:
        """Raises ConfigError for more positions than the model's context has."""
        if length > self.context:
            raise ConfigError(
                f"{length} positions are more than the model's context of {self.context}; {advice}"
            )

    def check_room(self, memory: Memory, text: int, new: int = 0, fewer: str = "") -> None:
        """Raises ConfigError unless a memory, live tokens and what comes behind them fit the model's context.

        ``fewer``: what to do if the last of them alone are too many.
        """
        held, length = memory.length, memory.length + text + new
        if fewer and held + text < self.context:
            self.check_length(length, f"{fewer}: {self.context - held - text} fit")
        elif held:
            full = f"the memory has {held} of them: give shorter segments, begin a new memory, or let a rule merge"
            self.check_length(length, f"{full} (mean, bounded)")
        else:
            self.check_length(length)


@cache
def _with_encoder(kind: type[Carrier]) -> type[Carrier]:
    # that package is built on this one, and loaded for who needs it
    made = importlib.import_module("..encoder_decoder.carrier", __package__).EncoderDecoder
    return type(kind.__name__, (made, kind), {"__doc__": kind.__doc__})
