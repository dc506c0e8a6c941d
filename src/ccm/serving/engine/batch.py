"""Conversations of any length side by side: one padded batch that rows join and leave between two steps.

row 0     .  .  .  M  M  M  a  a  a        . padding, M memory, a and b tokens of prompt and answer
row 1     M  M  M  M  M  .  b  b  b        columns are in the order in which they came, not by position
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from ...attention import PLAN, RecurrentPlan
from ...memory import Memory
from ...reader import Reader


@dataclass(frozen=True)
class Batch:
    """Keys and values of B rows, and where they are.

    Attributes:
        reader: the model that they belong to.
        cache: (B, H, K, D) per layer.
        position: (B, K) canonical positions.
        is_memory: (B, K) sink tokens and slots.
        valid: (B, K) false on padding.
    """

    reader: Reader
    cache: DynamicCache
    position: Tensor
    is_memory: Tensor
    valid: Tensor

    @classmethod
    def over(cls, reader: Reader, memory: Memory) -> Batch:
        """Rows that have read nothing yet but their memories."""
        cache, valid, is_memory = memory.to_cache(reader.rotary, reader.model.dtype, reader.devices)
        return cls(reader, cache, (valid.long().cumsum(1) - 1).clamp(min=0), is_memory, valid)

    def __len__(self) -> int:
        return len(self.valid)

    def run(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Batch, Tensor]:
        """Read tokens; this batch's own cache goes on into the new one and must not be used again.

        Args:
            ids: (B, T) token ids.
            mask: (B, T), false on padding, which is at the left.

        Returns:
            the rows with these tokens behind them, and the logits (B, V) after the last one.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        start = self.valid.sum(1, keepdim=True)
        position = (start + mask.long().cumsum(1) - 1).clamp(min=0)
        after = Batch(
            self.reader,
            self.cache,
            torch.cat([self.position, position], dim=1),
            torch.cat([self.is_memory, torch.zeros_like(mask)], dim=1),
            torch.cat([self.valid, mask], dim=1),
        )
        plan = RecurrentPlan(
            adapter=self.reader.adapter,
            gate=None,
            key_position=after.position,
            is_memory=after.is_memory,
            valid=after.valid,
        )
        out = self.reader.model(
            input_ids=ids,
            past_key_values=self.cache,
            attention_mask=after.valid.long(),
            position_ids=position,
            logits_to_keep=1,
            **{PLAN: plan},
        )
        return after, out.logits[:, -1]

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the rows; columns that are padding in all of them go."""
        chosen = torch.tensor(rows, device=self.valid.device)
        valid = self.valid[chosen]
        columns = valid.any(0).nonzero().squeeze(1)
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = (
                states.index_select(0, chosen.to(states.device)).index_select(2, columns.to(states.device))
                for states in (layer.keys, layer.values)
            )
            cache.update(keys, values, index)
        return Batch(
            self.reader,
            cache,
            self.position[chosen][:, columns],
            self.is_memory[chosen][:, columns],
            valid[:, columns],
        )

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Rows of several batches that have all read something."""
        if len(batches) == 1:
            return batches[0]
        width = max(batch.valid.shape[1] for batch in batches)
        short = [width - batch.valid.shape[1] for batch in batches]
        cache = DynamicCache()
        for index in range(len(batches[0].cache.layers)):
            layers = [batch.cache.layers[index] for batch in batches]
            keys, values = (
                torch.cat([pad(states, (0, 0, n, 0)) for states, n in zip(parts, short, strict=True)])
                for parts in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
            )
            cache.update(keys, values, index)
        position, is_memory, valid = (
            torch.cat([pad(getattr(batch, name), (n, 0)) for batch, n in zip(batches, short, strict=True)])
            for name in ("position", "is_memory", "valid")
        )
        return Batch(batches[0].reader, cache, position, is_memory, valid)
