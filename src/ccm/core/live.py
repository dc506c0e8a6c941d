"""Living keys and values: what a model has read, over what memories, of conversations of any length side by side.

row 0     .  .  .  M  M  M  a  a  a        . padding, M memory, a and b tokens that were read
row 1     M  M  M  M  M  .  b  b  b        columns are in the order in which they came, not by position
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .attention import PLAN, RecurrentPlan
from .memory import KV, Memory, Row
from .pages import blank
from .room import CACHE, ROOM, Roomy, roomy_cache
from .rotary import Rotary, unrotate


@dataclass(frozen=True)
class Live:
    """Keys and values of B rows, and where they are.

    Attributes:
        cache: (B, H, K, D) per layer.
        position: (B, K) canonical positions.
        is_memory: (B, K) sink tokens and slots.
        valid: (B, K) false on padding.
    """

    cache: DynamicCache
    position: Tensor
    is_memory: Tensor
    valid: Tensor

    @classmethod
    def over(
        cls, memory: Memory, rotary: Rotary, dtype: torch.dtype, devices: Sequence[torch.device] = ()
    ) -> Live:
        """Rows that have read nothing yet but their memories, left-padded.

        Args:
            memory: of B conversations.
            rotary, dtype: of the model that reads it.
            devices: of its layers, if they are on several.
        """
        width = memory.length
        device = memory.rows[0].sink.keys.device
        valid = torch.zeros(len(memory), width, dtype=torch.bool, device=device)
        is_memory = torch.zeros_like(valid)
        for r, row in enumerate(memory.rows):
            valid[r, width - row.length :] = True
            is_memory[r, width - row.length : width - row.window.length] = True
        cache = roomy_cache()
        if width:
            for keys, values in _side_by_side(memory, rotary, dtype, devices):
                layer = Roomy()
                layer.hold(keys, values, width)
                cache.layers.append(layer)
        return cls(cache, (valid.long().cumsum(1) - 1).clamp(min=0), is_memory, valid)

    def __len__(self) -> int:
        return len(self.valid)

    def ahead(
        self, mask: Tensor, adapter: str = "", gate: slice | None = None
    ) -> tuple[Live, dict[str, Any]]:
        """What a model is called with to read tokens behind these, and the rows after it.

        The call fills this very cache, which must not be used again but by the rows after it.

        Args:
            mask: (B, T), false on padding, which is at the left.
            adapter: name of the conditional adapter that acts on the columns of ``gate``.
        """
        position = self.valid.sum(1, keepdim=True) + (mask.long().cumsum(1) - 1).clamp(min=0)
        after = Live(
            self.cache,
            torch.cat([self.position, position], dim=1),
            torch.cat([self.is_memory, torch.zeros_like(mask)], dim=1),
            torch.cat([self.valid, mask], dim=1),
        )
        plan = RecurrentPlan(adapter, gate, after.position, after.is_memory, after.valid)
        call = {"attention_mask": after.valid.long(), "position_ids": position, PLAN: plan}
        return after, {CACHE: self.cache, **call}

    def grown(self) -> Live:
        """The rows with all that ``generate`` has put into the cache behind them since, a token of each at a time."""
        new = self.cache.get_seq_length() - self.valid.shape[1]
        return self.ahead(self.valid.new_ones(len(self), new))[0]

    def read(self, r: int, held: int, rotary: Rotary) -> KV:
        """Position-free keys and values (L, H, T, D) of what a row has read behind its memory, in the cache's type.

        Args:
            r: the row.
            held: entries of its memory.
            rotary: of the model.
        """
        kv = self.taken(r, self.valid[r].nonzero().squeeze(1)[held:], rotary)
        return KV(kv.keys.to(kv.values.dtype), kv.values)

    def taken(self, r: int, columns: Tensor, rotary: Rotary) -> KV:
        """Position-free keys, in fp32, and values (L, H, T, D) of some columns (T,) of a row."""
        device = columns.device
        keys, values = (
            torch.stack([s[r].index_select(1, columns.to(s.device)).to(device) for s in states])
            for states in zip(*((layer.keys, layer.values) for layer in self.cache.layers), strict=True)
        )
        return KV(unrotate(keys, *rotary.stacked(self.position[r, columns])), values)

    def select(self, rows: Sequence[int]) -> Live:
        """Some of the rows; columns that are padding in all of them go."""
        chosen = torch.tensor(rows, device=self.valid.device)
        valid = self.valid[chosen]
        columns = valid.any(0).nonzero().squeeze(1)
        cache = roomy_cache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = (
                states.index_select(0, chosen.to(states.device)).index_select(2, columns.to(states.device))
                for states in (layer.keys, layer.values)
            )
            cache.update(keys, values, index)
        position, is_memory = self.position[chosen][:, columns], self.is_memory[chosen][:, columns]
        return Live(cache, position, is_memory, valid[:, columns])


def _side_by_side(
    memory: Memory, rotary: Rotary, dtype: torch.dtype, devices: Sequence[torch.device]
) -> list[tuple[Tensor, Tensor]]:
    """All rows as past keys and values of each layer, left-padded, with room behind them: (B, H, m + ROOM, D).

    One layer of one row at a time is copied there, so that nothing else is as large as a memory. Every layer has
    tensors of its own, which can go without the others.
    """
    like, width = memory.rows[0].sink.keys, memory.length
    shape = len(memory), like.shape[1], width + ROOM, like.shape[3]
    whole = []
    for layer in range(len(like)):
        none = torch.empty(0, dtype=dtype, device=devices[layer] if devices else like.device)
        whole.append((blank(none, *shape), blank(none, *shape)))
    rows: dict[int, tuple[Row, list[int]]] = {}  # a memory that many options read is placed once
    for r, row in enumerate(memory.rows):
        rows.setdefault(id(row), (row, []))[1].append(r)
    for row, those in rows.values():
        for made, placed in zip(whole, row.layers(rotary, dtype), strict=True):
            for states, own in zip(made, placed, strict=True):
                there = own.to(states.device)
                for r in those:
                    states[r, :, width - row.length : width] = there
    return whole
