"""What attention does beyond the model's own: a plan for every pass.

It acts after rotary embedding and cache update (``ccm.core.hooks`` brings it there). A :class:`ParallelPlan` puts the
states of the memory in front of the keys; a :class:`RecurrentPlan` keeps a sliding window from dropping the memory.
Then the model's own backend runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .blocks import TOGETHER, Blocks, cut
from .devices import moved
from .rotary import Rotary, Tables, rotate, unrotate
from .rule import Rule
from .segments import Layout
from .visibility import parallel_mask, within_window

#: Keyword under which a plan travels from ``model(...)`` to every attention module, and its name on a cache.
PLAN = "ccm_plan"


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the float mask that every backend takes: 0 where visible, the lowest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


class StatesDone(Exception):
    """Every layer's keys and values are in the cache, and the pass was for nothing else."""


class Asked(NamedTuple):
    """What a layer asks of its keys in a pass.

    Attributes:
        queries: (B, Hq, Q, D), rotated.
        options: how it makes scores, by the names of transformers.
    """

    queries: Tensor
    options: dict[str, Any]


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
        step: by which the layers run (``ccm.decoding.layers``); None: as the model has them.
    """

    adapter: str
    gate: Places | None
    stop_at: int = field(default=-1, kw_only=True)
    asked: dict[int, Asked] | None = field(default=None, kw_only=True)
    step: Any = field(default=None, kw_only=True)
    _elsewhere: dict[torch.device, Any] = field(default_factory=dict, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(part.device for part in vars(self).values() if isinstance(part, Tensor))

    def on(self, device: torch.device) -> Plan:
        """The plan for a layer that is on a device: itself, or one copy for all layers there."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            own = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
            self._elsewhere[device] = type(self)(**{name: moved(v, device) for name, v in own.items()})
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
class MaskedPlan(Plan):
    """A pass with a mask (B, 1, Q, K) of its own; ``together`` says how many blocks of queries run side by side."""

    together: ClassVar[int] = TOGETHER
    mask: Tensor
    _by_window: dict[int | None, Tensor] = field(default_factory=dict, kw_only=True)
    _blocks: dict[int, list[Blocks]] = field(default_factory=dict, kw_only=True)

    def blocks(self, mask: Tensor) -> list[Blocks]:
        if id(mask) not in self._blocks:
            self._blocks[id(mask)] = cut(mask, self.together)
        return self._blocks[id(mask)]

    def seen(self, sliding: int | None, query: Tensor, key: Tensor) -> Tensor:
        """The mask of a layer with this sliding window, or without one.

        Args:
            sliding: tokens that the layer sees.
            query: (B, Q) positions.
            key: (B, R) positions of the last R keys; those before are of the memory, which no window drops.
        """
        if sliding is None:
            return self.mask
        if sliding not in self._by_window:
            near = within_window(query, key, torch.zeros_like(key, dtype=torch.bool), sliding)
            far = torch.cat(
                [near.new_ones(*near.shape[:3], self.mask.shape[-1] - key.shape[1]), near], dim=-1
            )
            self._by_window[sliding] = self.mask.masked_fill(~far, torch.finfo(self.mask.dtype).min)
        return self._by_window[sliding]


@dataclass
class ParallelPlan(MaskedPlan):
    """The whole recursion in one pass: memory states are made from the COMP keys and put in front."""

    layout: Layout
    rule: Rule
    layer_types: list[str | None]
    comp_tables: dict[str | None, Tables]
    slot_tables: dict[str | None, Tables]
    text_tables: dict[str | None, Tables]
    query_tables: dict[str | None, Tables]
    held: int  # sink tokens of the row that has most

    @classmethod
    def build(
        cls, adapter: str, layout: Layout, rule: Rule, rotary: Rotary, dtype: torch.dtype
    ) -> ParallelPlan:
        """The plan of one pass over a layout, on its device."""
        groups, n = layout.comp_index.shape[1:]
        comp_position = layout.rope_position.gather(1, layout.comp_index.flatten(1))
        place = rule.placed(groups, n).place if groups else torch.empty(0, dtype=torch.long)
        slot_position = layout.sink.unsqueeze(1) + place.to(layout.sink.device)
        return cls(
            adapter=adapter,
            gate=(layout.comp >= 0).flatten().nonzero().squeeze(1) if groups else None,
            layout=layout,
            rule=rule,
            mask=additive(parallel_mask(layout, rule), dtype),
            layer_types=rotary.layer_types,
            comp_tables=rotary.tables(comp_position),
            slot_tables=rotary.tables(slot_position),
            text_tables=rotary.tables(layout.text_position) if layout.windowed else {},
            query_tables=rotary.tables(layout.position) if layout.windowed else {},
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
        states = rotate(states, *heads(self.slot_tables[kind])).to(key.dtype)
        contents = contents.to(value.dtype)
        memory = torch.cat([key[:, :, : self.held], states], dim=2)
        contents = torch.cat([value[:, :, : self.held], contents, value], dim=2)
        if not self.layout.windowed:
            return query, torch.cat([memory, key], dim=2), contents, self._mask(sliding)
        tables = self.text_tables[kind], self.query_tables[kind]
        query, key = in_two_frames(query, memory, key, *tables)
        return query, key, contents, self._mask(sliding)

    def _slots(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Position-free keys, and values, of the slots of all groups: (B, Hkv, G n, D), fp32."""
        tables = heads(self.comp_tables[self.layer_types[layer]])
        index = self.layout.comp_index.flatten(1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        return unrotate(key.gather(2, index), *tables), value.gather(2, index).float()

    def _mask(self, sliding: int | None) -> Tensor:
        position = self.layout.rope_position
        return self.seen(sliding, position, position)


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


def in_two_frames(
    query: Tensor, memory: Tensor, key: Tensor, text: Tables, canonical: Tables
) -> tuple[Tensor, Tensor]:
    """Query and keys where text and slots are at positions of their own: each half meets the keys of its frame.

    Args:
        query: (B, H, Q, D), in the frame of the text.
        memory: (B, Hkv, S, D) keys of sink and slots, in the canonical frame.
        key: (B, Hkv, K, D) of the text.
        text, canonical: tables of the queries.
    """
    size = key.shape[-1]
    keys = torch.cat([pad(memory, (0, size)), pad(key, (size, 0))], dim=2)
    return in_both_frames(query, text, canonical), keys


def in_both_frames(query: Tensor, text: Tables, canonical: Tables) -> Tensor:
    """Queries (B, H, Q, 2 D) for keys whose first half is that of slots and whose second half that of text."""
    turned = rotate(unrotate(query, *heads(text)), *heads(canonical)).to(query.dtype)
    return torch.cat([turned, query], dim=-1)


def heads(tables: Tables) -> Tables:
    """(B, T, R) -> (B, 1, T, R)."""
    return tables._replace(cos=tables.cos.unsqueeze(1), sin=tables.sin.unsqueeze(1))
