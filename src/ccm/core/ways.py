"""Ways to rotate: how the families write the tables of their rotary embeddings, and where these are."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError


class Way(NamedTuple):
    """How a family rotates.

    Attributes:
        pairs: "halves" or "interleaved".
        table: where the model's tables hold each angle once: "first" half, "even" columns, or "whole".
    """

    pairs: str = "halves"
    table: str = "first"

    def expand(self, table: Tensor) -> Tensor:
        """The model's own table (..., W) as one to rotate with, (..., R)."""
        once = table
        if self.table != "whole":
            once = table[..., ::2] if self.table == "even" else table[..., : table.shape[-1] // 2]
        if self.pairs == "interleaved":
            return once.repeat_interleave(2, dim=-1)
        return torch.cat([once, once], dim=-1)


#: Every way that is known, the usual one first.
WAYS = tuple(Way(pairs, table) for table in ("first", "even", "whole") for pairs in ("halves", "interleaved"))


def find(body: nn.Module) -> nn.Module:
    """The rotary embedding of a decoder.

    Raises:
        UnsupportedModelError: it has none, or one whose angles change with the length of the text.
    """
    module: nn.Module | None = getattr(body, "rotary_emb", None)
    if module is None:
        raise UnsupportedModelError(
            f"{type(body).__name__} has no rotary embedding to place slots with; expected a causal language model "
            "that has one, such as a Llama, Qwen, Mistral or Gemma"
        )
    if kinds := [k for k in ("dynamic", "longrope") if k in str(getattr(module, "rope_type", ""))]:
        raise UnsupportedModelError(
            f"rotary embedding {kinds[0]!r} is not supported: its frequencies change with the length of the "
            "text, so keys cannot be moved; load the model with another rope_type in its config"
        )
    return module


def per_layer(module: nn.Module, config: Any) -> list[str | None]:
    """For each layer the name of its tables: its layer type where there is a table for each, else None."""
    if "layer_type" in inspect.signature(module.forward).parameters:
        return list(config.layer_types)
    return [None] * config.num_hidden_layers
