"""Reading from a memory: the base model, untouched, with the memory as past keys and values.

Compressor and reader are separate. Everything here works with the plain model and no adapter; whatever can take
a prefix of keys and values can stand in its place.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache, PreTrainedModel

from . import attention
from .attention import Asked, Scoring
from .errors import ConfigError
from .families import choose_backend, get_family
from .memory import KV, Memory, Row
from .rotary import Rotary, unrotate
from .storage.fingerprint import mismatch
from .threads import PerThread
from .twin import head_size, kv_heads, text_config

Ids: TypeAlias = Tensor | Sequence[Sequence[int]]


class Pass(NamedTuple):
    """What one pass over a memory leaves: its tokens, and the cache that it filled.

    Attributes:
        memory: that was read.
        ids, mask: (B, T) left-padded.
        cache: keys and values of the memory, then of the tokens.
        positions: (B, T) of the tokens.
    """

    memory: Memory
    ids: Tensor
    mask: Tensor
    cache: DynamicCache
    positions: Tensor

    def is_of(self, memory: Memory, ids: Tensor, mask: Tensor) -> bool:
        """Whether these tokens would run over this very memory again."""
        return self.memory is memory and torch.equal(self.ids, ids) and torch.equal(self.mask, mask)


class _Ahead(PerThread):
    """Whether this thread reads ahead, and the last pass for which it asked logits."""

    on: bool = False
    last: Pass | None = None


class Reader(nn.Module):
    """A causal language model that reads memories.

    Args:
        model: of a supported family (``ccm.families``). Its attention backend is wrapped, which changes no
            result.

    Raises:
        UnsupportedModelError: the family cannot carry a memory.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.family = get_family(model)
        self.model = model
        self.rotary = Rotary(model, self.family)
        self.devices = layer_devices(model, self.family.attention)
        self._ahead = _Ahead()
        attention.register()
        attention.carry(model)
        if not self.family.hands_on:
            attention.bridge(model, self.family.attention)
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
        ids, mask, order, memory = self._prepare(input_ids, memory, attention_mask)
        cache, call = self._over(memory, ids, mask)
        out = self.model(input_ids=ids, past_key_values=cache, **call).logits
        if self._ahead.on:
            self._ahead.last = Pass(memory, ids, mask, cache, call["position_ids"])
        back = order.argsort(1).unsqueeze(-1).expand_as(out)
        return out.gather(1, back)

    @torch.no_grad()
    def read(
        self, input_ids: Ids, memory: Memory | None = None, attention_mask: Tensor | None = None
    ) -> list[KV]:
        """Position-free keys and values of live tokens that read the memory, one (L, H, T, D) pair per row."""
        ids, mask, _, memory = self._prepare(input_ids, memory, attention_mask)
        return [raw for raw, _ in self._step(memory, ids, mask, None)]

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
        ids, mask, _, memory = self._prepare(input_ids, memory, attention_mask)
        seen: dict[int, Asked] = {}
        texts = self._step(memory, ids, mask, None, asked=seen)
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
            self._step(self.empty(), ids, ids == 0, None, asked=seen)
        return tuple(Scoring.of(seen[i]) for i in range(len(seen)))

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Within it, tokens whose logits were the last to be asked for do not run again when they are then read.

        A stream is scored segment by segment, each over the memory that it joins next. The keys and values are
        those of the pass that scored it, which stay until the next one.
        """
        self._ahead.on = True
        try:
            yield
        finally:
            self._ahead.on, self._ahead.last = False, None

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
        ids, mask, _, memory = self._prepare(input_ids, memory, attention_mask)
        settings = generate_kwargs.get("generation_config") or self.model.generation_config
        new = generate_kwargs.get("max_new_tokens") or settings.max_new_tokens or 0
        self._check_room(memory, ids.shape[1], new, "ask for fewer new tokens (max_new_tokens)")
        if not generate_kwargs.get("use_cache", True):
            raise ConfigError("use_cache: got False, expected True: the memory is read from the cache")
        cache, call = self._over(memory, ids, mask)
        setattr(cache, attention.PLAN, call.pop(attention.PLAN))
        return self.model.generate(ids, past_key_values=cache, **call, **generate_kwargs)

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

    def _step(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None,
        at: Tensor | None = None,
        keep: int | None = None,
        gate: slice | None = None,
        asked: dict[int, Asked] | None = None,
    ) -> list[tuple[KV, KV]]:
        """Run left-padded text (B, T), then embeddings (n, d) or (B, n, d), over the memory; the adapter acts on the
        columns of ``gate``; ``asked`` is filled as :class:`ccm.attention.Plan` says.

        Returns:
            per row the position-free KV of its text (of the first ``keep`` tokens), in the model's dtype, and of
            its COMP tokens, in fp32.
        """
        n = 0 if comp is None else comp.shape[-2]
        plain, last = comp is None and gate is None and asked is None, self._ahead.last
        if plain and last is not None and last.is_of(memory, ids, mask):
            cache, positions = last.cache, last.positions
        else:
            cache, positions = self._pass(memory, ids, mask, comp, at, gate, asked)
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
        at: Tensor | None,
        gate: slice | None,
        asked: dict[int, Asked] | None,
    ) -> tuple[DynamicCache, Tensor]:
        """One forward pass for its keys and values: the cache, and the positions (B, T + n) of what ran."""
        cache, call = self._over(memory, ids, mask, 0 if comp is None else comp.shape[-2], at, gate)
        embeds = self.model.get_input_embeddings()(ids)
        if comp is not None:
            embeds = torch.cat([embeds, comp.to(embeds.dtype).expand(len(ids), -1, -1)], dim=1)
        call[attention.PLAN].asked = asked
        if not torch.is_grad_enabled():  # what the last layer puts out is of no use here
            call[attention.PLAN].stop_at = len(self.family.attention) - 1
        with suppress(attention.StatesDone):
            self.body(inputs_embeds=embeds, past_key_values=cache, **call)
        return cache, call["position_ids"]

    def _over(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        n: int = 0,
        at: Tensor | None = None,
        gate: slice | None = None,
    ) -> tuple[DynamicCache, dict[str, Any]]:
        """Cache and call arguments to run left-padded tokens (B, T), then n COMP tokens, over a memory.

        ``at`` (B, 1) places the first COMP token; by default it follows the text. The adapter acts on the columns
        of ``gate``.
        """
        order = torch.arange(n, device=ids.device)
        cache, held, folded = memory.to_cache(self.rotary, self.model.dtype, self.devices)
        start = held.sum(1, keepdim=True)
        text_position = start + (mask.long().cumsum(1) - 1).clamp(min=0)
        comp_position = (start + mask.sum(1, keepdim=True) if at is None else at) + order
        position = torch.cat([text_position, comp_position], dim=1)
        valid = torch.cat([held, mask, mask.new_ones(len(ids), n)], dim=1)
        before = (held.long().cumsum(1) - 1).clamp(min=0)
        plan = attention.RecurrentPlan(
            adapter=self._adapter(),
            gate=self._gate(gate),
            key_position=torch.cat([before, position], dim=1),
            is_memory=torch.cat([folded, torch.zeros_like(position, dtype=torch.bool)], dim=1),
            valid=valid,
        )
        return cache, {"attention_mask": valid.long(), "position_ids": position, attention.PLAN: plan}

    def _adapter(self) -> str:
        return ""

    def _gate(self, gate: slice | None) -> slice | None:
        return gate

    def _prepare(
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
        self._check_room(memory, ids.shape[1])
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

    def _check_room(self, memory: Memory, text: int, new: int = 0, fewer: str = "") -> None:
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


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and their size, from a model's config."""
    config = text_config(config)
    return config.num_hidden_layers, kv_heads(config), head_size(config)


def is_spread(model: PreTrainedModel) -> bool:
    """Whether its layers are on several devices, or on none until they run."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def layer_devices(model: PreTrainedModel, attention: Sequence[str]) -> list[torch.device]:
    """Where the keys and values of each layer are; empty if that is the same place for all.

    Raises:
        ConfigError: the embeddings are on no device.
    """
    if not is_spread(model):
        return []
    if model.device.type == "meta":
        raise ConfigError(
            "the device map keeps the embeddings on no device: give them one, such as 0 or 'cpu'"
        )
    held = [next(model.get_submodule(name.rsplit(".", 1)[0]).parameters()).device for name in attention]
    return [model.device if device.type == "meta" else device for device in held]  # those run on the first


def base_name(model: PreTrainedModel) -> str:
    """The model's name without any folder of this machine."""
    return Path(model.config._name_or_path).name or type(model).__name__


def shape_fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the model's shape."""
    config = text_config(model.config)
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    shape = [getattr(config, name, None) for name in (*names, "vocab_size")]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:8]


def model_fingerprint(model: PreTrainedModel) -> str:
    """Shape and a sample of the weights, hashed once; the same in fp32 and bf16."""
    known = model.__dict__.get("_ccm_fingerprint")
    if known is None:
        with torch.no_grad():
            samples = (
                _plain(model, name)[sampled_rows(len(parameter)), :16]
                for name, parameter in model.named_parameters()
                if "lora_" not in name and parameter.ndim == 2
            )
            known = model.__dict__["_ccm_fingerprint"] = fingerprint_of(model, samples)
    return known


def _plain(model: nn.Module, name: str) -> Tensor:
    """A parameter of which rows can be taken: torchao's quantized ones as floats, those on no device from where they
    are kept."""
    module = model.get_submodule(name.rpartition(".")[0])
    with align_module_device(module):
        parameter = module.get_parameter(name.rpartition(".")[2])
        return parameter.dequantize() if is_traceable_wrapper_subclass(parameter) else parameter.data


def sampled_rows(rows: int) -> slice:
    """The rows of a weight matrix whose first 16 columns are hashed."""
    return slice(None, None, max(1, rows // 4))


def fingerprint_of(model: PreTrainedModel, samples: Iterable[Tensor]) -> str:
    """The fingerprint of a model of this shape with these samples of its matrices, in its order."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return f"{shape_fingerprint(model)}.{sha.hexdigest()[:16]}"
