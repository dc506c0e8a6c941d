"""Reading from a memory: the base model, untouched, with the memory as past keys and values.

Compressor and reader are separate. Everything here works with the plain model and no adapter; whatever can take
a prefix of keys and values can stand in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import ConfigError
from ..files.fingerprint import mismatch, model_fingerprint
from . import attention, hooks
from .families import choose_backend, get_family
from .live import Live, layer_devices
from .memory import KV, Memory, Row
from .rotary import Rotary, unrotate
from .scores import Asked, Scoring
from .twin import kv_shape

Ids: TypeAlias = Tensor | Sequence[Sequence[int]]


class Reader(nn.Module):
    """A causal language model that reads memories.

    Args:
        model: of a supported family (``ccm.core.families``). Its attention backend is wrapped, which changes no
            result.

    Raises:
        UnsupportedModelError: the family cannot carry a memory.
    """

    #: Name of the conditional adapter on the model; a reader has none.
    adapter = ""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.family = get_family(model)
        self.model = model
        self.rotary = Rotary(model, self.family.body, self.family.way, self.family.rotated)
        self.devices = layer_devices(model, self.family.attention)
        hooks.register()
        hooks.carry(model)
        if not self.family.hands_on:
            hooks.bridge(model, self.family.attention)
        model.set_attn_implementation("ccm_" + choose_backend(model, self.family))

    @torch.no_grad()
    def logits(
        self, input_ids: Ids, memory: Memory | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of live tokens that read the memory; no adapter takes part.

        Args:
            input_ids: (B, T) token ids.
            memory: of B conversations; None is an empty one.
            attention_mask: (B, T), 0 on padding at either side.
        """
        ids, mask, order, memory = self.prepare(input_ids, memory, attention_mask)
        _, call = self.live(memory).ahead(mask, self.adapter)
        out = self.model(input_ids=ids, **call).logits
        back = order.argsort(1).unsqueeze(-1).expand_as(out)
        return out.gather(1, back)

    @torch.no_grad()
    def read(
        self, input_ids: Ids, memory: Memory | None = None, attention_mask: Tensor | None = None
    ) -> list[KV]:
        """Position-free keys and values of live tokens that read the memory, one (L, H, T, D) pair per row."""
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        return [raw for raw, _ in self.step(memory, ids, mask, None)]

    @torch.no_grad()
    def watch(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        newest: int = -1,
    ) -> list[tuple[KV, Tensor]]:
        """As :meth:`read`, with the queries of the newest tokens; -1: of all.

        Returns:
            per row position-free keys and values (L, H, T, D), and position-free queries (L, Hq, w, D) in fp32.
        """
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        seen: dict[int, Asked] = {}
        texts = self.step(memory, ids, mask, None, asked=seen)
        start = torch.tensor([row.length for row in memory.rows], device=ids.device)
        result = []
        for r, (text, _) in enumerate(texts):
            first = 0 if newest < 0 else max(0, text.length - newest)
            queries = torch.stack(
                [
                    seen[i].queries[r, :, ids.shape[1] - text.length + first :].to(ids.device)
                    for i in range(len(seen))
                ]
            )
            at = start[r] + torch.arange(first, text.length, device=ids.device)
            result.append((text, unrotate(queries, *self.rotary.stacked(at))))
        return result

    @cached_property
    def scoring(self) -> tuple[Scoring, ...]:
        """How each layer makes scores of queries and keys."""
        seen: dict[int, Asked] = {}
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        with torch.no_grad():
            self.step(self.empty(), ids, ids == 0, None, asked=seen)
        return tuple(Scoring.of(seen[i]) for i in range(len(seen)))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` reading from a memory; the memory is not changed.

        Returns:
            what ``generate`` returns: (B, T + new) token ids, the prompt first, left-padded.

        Raises:
            ConfigError: memory, prompt and ``max_new_tokens`` together are longer than the model's context, or
                ``use_cache=False``.
        """
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        settings = generate_kwargs.get("generation_config") or self.model.generation_config
        new = generate_kwargs.get("max_new_tokens") or settings.max_new_tokens or 0
        self.check_room(memory, ids.shape[1], new, "ask for fewer new tokens (max_new_tokens)")
        if not generate_kwargs.get("use_cache", True):
            raise ConfigError("use_cache: got False, expected True: the memory is read from the cache")
        _, call = self.live(memory).ahead(mask, self.adapter)
        setattr(call["past_key_values"], attention.PLAN, call.pop(attention.PLAN))
        return self.model.generate(ids, **call, **generate_kwargs)

    def empty(self, batch: int = 1) -> Memory:
        """The memory of ``batch`` conversations before anything was said."""
        layers, heads, size = self.kv_shape()
        none = torch.empty(layers, heads, 0, size, device=self.model.device)
        raw = KV(none, none).to(self.model.dtype)
        return Memory((Row(sink=raw, slots=KV(none, none), window=raw),) * batch, self.fingerprint())

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

    # ------------------------------------------------------------------ one step

    def step(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None,
        keep: int | None = None,
        gate: slice | None = None,
        asked: dict[int, Asked] | None = None,
    ) -> list[tuple[KV, KV]]:
        """Run left-padded text (B, T), then embeddings (n, d) or (B, n, d), over the memory; the adapter acts on the
        columns of ``gate``; ``asked`` is filled as :class:`ccm.core.attention.Plan` says.

        Returns:
            per row the position-free KV of its text (of the first ``keep`` tokens), in the model's dtype, and of
            its COMP tokens, in fp32.
        """
        n = 0 if comp is None else comp.shape[-2]
        cache, positions = self._pass(memory, ids, mask, comp, gate, asked)
        result = []
        for r in range(len(ids)):
            text = mask[r].nonzero().squeeze(1)[:keep]
            new = torch.cat([text, torch.arange(n, device=ids.device) + ids.shape[1]])
            at = new + memory.length
            keys, values = (
                torch.stack(
                    [s[r].index_select(1, at.to(s.device)).to(ids.device) for s in layers]
                )  # (L, H, K, D)
                for layers in zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
            )
            kv = KV(unrotate(keys, *self.rotary.stacked(positions[r, new])), values)
            split = len(text)
            result.append((kv.slice(0, split).to(self.model.dtype), kv.slice(split).to(torch.float32)))
        return result

    def _pass(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None,
        gate: slice | None,
        asked: dict[int, Asked] | None,
    ) -> tuple[DynamicCache, Tensor]:
        """One forward pass for its keys and values: the cache, and the positions (B, T + n) of what ran."""
        embeds = self.model.get_input_embeddings()(ids)
        if comp is not None:
            embeds = torch.cat([embeds, comp.to(embeds.dtype).expand(len(ids), -1, -1)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(ids), comp.shape[-2])], dim=1)
        live, call = self.live(memory).ahead(mask, self.adapter, gate)
        call[attention.PLAN].asked = asked
        if not torch.is_grad_enabled():  # what the last layer puts out is of no use here
            call[attention.PLAN].stop_at = len(self.family.attention) - 1
        with suppress(attention.StatesDone):
            self.body(inputs_embeds=embeds, **call)
        return live.cache, call["position_ids"]

    def live(self, memory: Memory) -> Live:
        """A cache that holds the memory, for a pass over it."""
        return Live.over(memory, self.rotary, self.model.dtype, self.devices)

    def prepare(
        self, input_ids: Ids, memory: Memory | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Memory]:
        """Left-padded ids and bool mask (B, T), the order that moved them, and a memory that fits."""
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
        memory = self.empty(len(ids)) if memory is None else memory
        self.check(memory, len(ids))
        memory = memory.to(self.model.device, self.model.dtype)
        self.check_room(memory, ids.shape[1])
        order = mask.bool().long().argsort(dim=1, stable=True)
        return ids.gather(1, order), mask.bool().gather(1, order), order, memory

    def check_ids(self, ids: Tensor) -> None:
        words = self.model.get_input_embeddings().weight.shape[0]
        if int(ids.min()) < 0 or int(ids.max()) >= words:
            raise ConfigError(
                f"token ids {int(ids.min())} to {int(ids.max())} are outside the vocabulary of {words}; "
                "use the tokenizer of this model"
            )

    def check_length(
        self, length: int, advice: str = "split the text into shorter segments and fold them one by one"
    ) -> None:
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
