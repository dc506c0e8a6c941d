"""The one attention function that ``ccm`` registers with transformers.

It runs after rotary embedding and cache update. Without a plan it is the model's own backend, bit for bit. With a
:class:`ParallelPlan` it puts the states of the memory in front of the keys; with a :class:`RecurrentPlan` it
keeps a sliding window from dropping the memory. Then the model's own backend runs.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks import Blocks, cut
from .blocks import attend as in_blocks
from .pooling import Chunks, Pooling, chunks
from .rotary import Rotary, Tables, rotate, unrotate
from .rules import Rule
from .segments import Layout
from .visibility import parallel_mask, within_window

#: Keyword under which a plan travels from ``model(...)`` to every attention module, and its name on a cache.
PLAN = "ccm_plan"


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the float mask that every backend takes: 0 where visible, the lowest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


class Asked(NamedTuple):
    """What a layer asks of its keys in a pass.

    Attributes:
        queries: (B, Hq, Q, D), rotated.
        options: how it makes scores, by the names of transformers.
    """

    queries: Tensor
    options: dict[str, Any]


class Scoring(NamedTuple):
    """How a layer makes scores of queries and keys.

    Attributes:
        scaling: of every product.
        softcap: no score is larger; None: they are as they are.
        sliding: a raw token sees so many, itself included; None: all.
        sinks: (Hq,) learned scores that stand beside those of the keys.
    """

    scaling: float
    softcap: float | None
    sliding: int | None
    sinks: Tensor | None

    @classmethod
    def of(cls, asked: Asked) -> Scoring:
        options = {
            name: asked.options.get(name) for name in ("scaling", "softcap", "sliding_window", "s_aux")
        }
        scaling = options["scaling"] or asked.queries.shape[-1] ** -0.5
        sinks = options["s_aux"]
        sinks = None if sinks is None else sinks.detach()
        return cls(scaling, options["softcap"], options["sliding_window"], sinks)


class StatesDone(Exception):
    """Every layer's keys and values are in the cache, and the pass was for nothing else."""


#: Where the tokens with the adapter are in a pass: indices into (B Q), or the same columns of every row.
Places: TypeAlias = Tensor | slice


@dataclass
class Plan(ABC):
    """What one forward pass needs to know beyond its tokens.

    Attributes:
        adapter: name of the conditional adapter that is open.
        gate: where the tokens with the adapter are (COMP tokens, in general), or None when the pass has none.
        stop_at: layer after whose keys and values the pass ends; -1 runs it to its end.
        asked: filled with what each layer asks, for who wants to know.
    """

    adapter: str
    gate: Places | None
    stop_at: int = field(default=-1, kw_only=True)
    asked: dict[int, Asked] | None = field(default=None, kw_only=True)
    _elsewhere: dict[torch.device, Any] = field(default_factory=dict, kw_only=True)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors are."""

    def on(self, device: torch.device) -> Plan:
        """The plan for a layer that is on a device: itself, or one copy for all layers there."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            own = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
            self._elsewhere[device] = type(self)(**{name: _moved(v, device) for name, v in own.items()})
        return self._elsewhere[device]

    def blocks(self, mask: Any) -> list[Blocks]:
        """How to cut the queries so that each part meets few keys; empty: not at all."""
        return []

    @abstractmethod
    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Query (B, H, Q, D), key and value (B, Hkv, K, D) and mask as the backend shall see them."""


@dataclass
class ParallelPlan(Plan):
    """The whole recursion in one pass: memory states are made from the COMP keys and put in front."""

    layout: Layout
    rule: Rule
    mask: Tensor
    layer_types: list[str | None]
    comp_tables: dict[str | None, Tables]
    slot_tables: dict[str | None, Tables]
    text_tables: dict[str | None, Tables]
    query_tables: dict[str | None, Tables]
    pooling: Pooling | None
    chunks: Chunks | None
    held: int  # sink tokens of the row that has most
    _by_window: dict[int | None, Tensor] = field(default_factory=dict)
    _blocks: dict[int, list[Blocks]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @classmethod
    def build(
        cls,
        adapter: str,
        layout: Layout,
        rule: Rule,
        rotary: Rotary,
        dtype: torch.dtype,
        pooling: Pooling | None = None,
        conditional: bool = True,
    ) -> ParallelPlan:
        groups, n = layout.comp_index.shape[1:]
        comp_position = layout.rope_position
        parts = None
        if pooling is None:
            comp_position = comp_position.gather(1, layout.comp_index.flatten(1))
        elif groups:
            start, stop = layout.comp_index.flatten(1), layout.chunk_stop.flatten(1)
            parts = chunks(start, stop, layout.segment.shape[1])
        adapted = layout.adapted if conditional else layout.segment >= 0
        place = rule.placed(groups, n).place if groups else torch.empty(0, dtype=torch.long)
        slot_position = layout.sink.unsqueeze(1) + place.to(layout.sink.device)
        return cls(
            adapter=adapter,
            gate=adapted.flatten().nonzero().squeeze(1) if groups else None,
            layout=layout,
            rule=rule,
            mask=additive(parallel_mask(layout, rule), dtype),
            layer_types=rotary.layer_types,
            comp_tables=rotary.tables(comp_position),
            slot_tables=rotary.tables(slot_position),
            text_tables=rotary.tables(layout.text_position) if layout.windowed else {},
            query_tables=rotary.tables(layout.position) if layout.windowed else {},
            pooling=pooling,
            chunks=parts,
            held=int(layout.sink.max()),
        )

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        groups, n = self.layout.comp_index.shape[1:]
        if groups == 0:
            return query, key, value, self._mask(sliding)
        kind = self.layer_types[int(module.layer_idx)]
        # h(t): keys off their position, values as they are, then every Mem(t)
        blocks = (block.unflatten(2, (groups, n)) for block in self._slots(int(module.layer_idx), key, value))
        states, contents = (self.rule.columns(block) for block in blocks)
        states = rotate(states, *_heads(self.slot_tables[kind])).to(key.dtype)
        contents = contents.to(value.dtype)
        memory = torch.cat([key[:, :, : self.held], states], dim=2)
        contents = torch.cat([value[:, :, : self.held], contents, value], dim=2)
        if not self.layout.windowed:
            return query, torch.cat([memory, key], dim=2), contents, self._mask(sliding)
        # Text and slots live in two frames: the query is held in both, each half meets the keys of its frame.
        canonical = unrotate(query, *_heads(self.text_tables[kind]))
        canonical = rotate(canonical, *_heads(self.query_tables[kind])).to(query.dtype)
        query = torch.cat([canonical, query], dim=-1)
        memory = torch.cat([memory, torch.zeros_like(memory)], dim=-1)
        key = torch.cat([torch.zeros_like(key), key], dim=-1)
        return query, torch.cat([memory, key], dim=2), contents, self._mask(sliding)

    def _slots(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Position-free keys, and values, of the slots of all groups: (B, Hkv, G n, D), fp32."""
        tables = _heads(self.comp_tables[self.layer_types[layer]])
        if self.pooling is not None:
            return self.pooling(layer, self.chunks, unrotate(key, *tables), value)
        index = self.layout.comp_index.flatten(1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        return unrotate(key.gather(2, index), *tables), value.gather(2, index).float()

    def blocks(self, mask: Tensor) -> list[Blocks]:
        if id(mask) not in self._blocks:
            self._blocks[id(mask)] = cut(mask)
        return self._blocks[id(mask)]

    def _mask(self, sliding: int | None) -> Tensor:
        if sliding is None:
            return self.mask
        if sliding not in self._by_window:
            position = self.layout.rope_position
            width = position.shape[1]
            near = within_window(position, position, torch.zeros_like(position, dtype=torch.bool), sliding)
            far = torch.cat([near.new_ones(*near.shape[:3], self.mask.shape[-1] - width), near], dim=-1)
            self._by_window[sliding] = self.mask.masked_fill(~far, torch.finfo(self.mask.dtype).min)
        return self._by_window[sliding]


@dataclass
class RecurrentPlan(Plan):
    """One step over a cache. Only sliding-window layers need help: they measure distance by cache index.

    Attributes:
        key_position: (B, K) canonical position of each cached and new token at the first call; tokens that
            ``generate`` adds later follow on.
        is_memory: (B, K) sink tokens and slots, which no sliding window may drop.
        valid: (B, K) false on padding.
    """

    key_position: Tensor
    is_memory: Tensor
    valid: Tensor

    @property
    def device(self) -> torch.device:
        return self.valid.device

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        if sliding is None:
            return query, key, value, mask
        repeat = query.shape[0] // self.valid.shape[0]  # beams and returned sequences
        position, memory, valid = (
            t.repeat_interleave(repeat, dim=0) for t in (self.key_position, self.is_memory, self.valid)
        )
        if (new := key.shape[2] - position.shape[1]) > 0:
            later = position[:, -1:] + torch.arange(1, new + 1, device=position.device)
            position = torch.cat([position, later], dim=1)
            memory = torch.cat([memory, memory.new_zeros(memory.shape[0], new)], dim=1)
            valid = torch.cat([valid, valid.new_ones(valid.shape[0], new)], dim=1)
        width = query.shape[2]
        visible = within_window(position[:, -width:], position, memory, sliding) & valid[:, None, None]
        order = torch.arange(position.shape[1], device=position.device)
        visible = visible & (order <= order[-width:].unsqueeze(1))
        visible = visible | (order == order[-width:].unsqueeze(1))
        return query, key, value, additive(visible, query.dtype)


def carry(model: nn.Module) -> None:
    """Let a pass of the model find the plan that its cache carries: ``generate`` takes no argument for it."""
    if _bring_plan not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_bring_plan, with_kwargs=True)


def _bring_plan(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    # named "cache" since transformers 5.24
    cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
    if (plan := getattr(cache, PLAN, None)) is None:
        return None
    # for beams and returned sequences ``generate`` repeats the tokens, but not the cache
    if cache.layers and (repeat := len(kwargs["input_ids"]) // len(cache.layers[0].keys)) > 1:
        cache.batch_repeat_interleave(repeat)
    return args, {**kwargs, PLAN: plan}


def _moved(value: Any, device: torch.device) -> Any:
    """A part of a plan, with all tensors inside, on another device."""
    if isinstance(value, Tensor | Layout):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _heads(tables: Tables) -> Tables:
    """(B, T, R) -> (B, 1, T, R)."""
    return tables._replace(cos=tables.cos.unsqueeze(1), sin=tables.sin.unsqueeze(1))


def _grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v, the query heads of a key head as the rows of one matrix.

    A processor takes a third to a fifth of the time of torch's fused attention for it, above all backward in
    bfloat16 (docs/experiments.md). Scores are rounded to the type of the model: for training, not for measuring.
    Queries come in blocks, so the weights that are kept for the gradient are small.
    """
    batch, heads, width, _ = query.shape
    groups = key.shape[1]
    rows = (query * scaling).reshape(batch, groups, -1, query.shape[3])
    scores = (rows @ key.transpose(2, 3)).view(batch, groups, -1, width, key.shape[2])
    weights = (scores + mask.unsqueeze(2)).softmax(-1)
    out = weights.view(batch, groups, -1, key.shape[2]) @ value
    return out.view(batch, heads, width, -1).transpose(1, 2), None


def _wrap(
    backend: Callable[[nn.Module], Callable[..., Any]], on_cpu: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """An attention function that lets the plan of the pass, if any, act before the backend.

    ``on_cpu`` takes the place of the backend in training on a processor.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        ccm_plan: Plan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        run = backend(module)
        if ccm_plan is None:
            return run(module, query, key, value, attention_mask, **kwargs)
        if ccm_plan.asked is not None:
            ccm_plan.asked[int(module.layer_idx)] = Asked(query, kwargs)
        if module.layer_idx == ccm_plan.stop_at:
            raise StatesDone
        ccm_plan = ccm_plan.on(query.device)
        query, key, value, mask = ccm_plan.extend(
            module, query, key, value, attention_mask, kwargs.get("sliding_window")
        )
        trained = isinstance(ccm_plan, ParallelPlan) and torch.is_grad_enabled()
        if on_cpu and trained and query.is_cpu and not kwargs.get("dropout"):
            run = on_cpu
        blocks = ccm_plan.blocks(mask)
        if not blocks:
            return run(module, query, key, value, mask, **kwargs)
        return in_blocks(run, module, query, key, value, blocks, **kwargs), None

    return attend


class _Carrier(tuple[Tensor, ...]):
    """Position embeddings, and a plan."""

    plan: Plan


def bridge(model: PreTrainedModel, attention: Sequence[str]) -> None:
    """Bring the plan to attention modules whose layers hand on nothing but what they know.

    It goes along with the position embeddings, which every layer hands on. So it travels with the pass, whatever
    thread that is on, and is there again when gradient checkpointing runs a layer once more.
    """
    if model.__dict__.get("_ccm_bridge"):
        return
    model.__dict__["_ccm_bridge"] = True

    def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if (plan := kwargs.get(PLAN)) is None:
            return None
        carrier = _Carrier(kwargs["position_embeddings"])
        carrier.plan = plan
        return args, {**kwargs, "position_embeddings": carrier}

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, PLAN: getattr(kwargs["position_embeddings"], "plan", None)}

    for name in attention:
        model.get_submodule(name.rsplit(".", 1)[0]).register_forward_pre_hook(put, with_kwargs=True)
        model.get_submodule(name).register_forward_pre_hook(take, with_kwargs=True)


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    """The family's own eager attention, with its soft-capping."""
    return sys.modules[type(module).__module__].eager_attention_forward


def register() -> None:
    """Register both backends and their mask functions (without one, transformers drops causality)."""
    AttentionInterface.register("ccm_sdpa", _wrap(lambda module: ALL_ATTENTION_FUNCTIONS["sdpa"], _grouped))
    AttentionInterface.register("ccm_eager", _wrap(_own_eager))
    AttentionMaskInterface.register("ccm_sdpa", sdpa_mask)
    AttentionMaskInterface.register("ccm_eager", eager_mask)
