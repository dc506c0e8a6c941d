"""Rotary positions: put keys at a position, take them off it.

Memories hold *position-free* keys. A key gets its position when it is used, so slots can be merged in one
phase, moved, and kept for ever without rounding errors adding up.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError

Tables = tuple[Tensor, Tensor]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Put vectors at a position. x (..., T, D); cos, sin (..., T, R) with R <= D (partial rotary). fp32 inside."""
    size = cos.shape[-1]
    live = x[..., :size].float()
    out = (live * cos + _rotate_half(live) * sin).to(x.dtype)
    return out if size == x.shape[-1] else torch.cat([out, x[..., size:]], dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Take vectors off their position, the inverse of :func:`rotate`; always returns fp32.

    Families that scale their rotary embedding have cos^2 + sin^2 != 1, hence the division.
    """
    size = cos.shape[-1]
    live = x[..., :size].float()
    out = (live * cos - _rotate_half(live) * sin) / (cos * cos + sin * sin)
    return out if size == x.shape[-1] else torch.cat([out, x[..., size:].float()], dim=-1)


class Rotary:
    """Tables of cos and sin from the model's own rotary embedding, for every kind of layer it has."""

    def __init__(self, model: PreTrainedModel):
        module: nn.Module | None = getattr(model.base_model, "rotary_emb", None)
        if module is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no rotary embedding to place slots with")
        self.module = module
        if kinds := [k for k in ("dynamic", "longrope") if k in str(getattr(self.module, "rope_type", ""))]:
            raise UnsupportedModelError(
                f"rotary embedding {kinds[0]!r} is not supported: its frequencies change with the length of the "
                "text, so keys cannot be moved; load the model with another rope_type in its config"
            )
        self.dtype = model.dtype
        per_type = "layer_type" in inspect.signature(self.module.forward).parameters
        layers = model.config.num_hidden_layers
        self.layer_types: list[str | None] = list(model.config.layer_types) if per_type else [None] * layers

    @torch.no_grad()
    def tables(self, positions: Tensor) -> dict[str | None, Tables]:
        """For positions (..., T): cos and sin (..., T, R) in fp32, by layer type.

        They are rounded to the model's dtype on the way, as the model itself does.
        """
        flat = positions.reshape(1, -1)
        probe = torch.empty(0, dtype=self.dtype, device=positions.device)
        result: dict[str | None, Tables] = {}
        for kind in dict.fromkeys(self.layer_types):
            cos, sin = self.module(probe, flat) if kind is None else self.module(probe, flat, kind)
            shape = (*positions.shape, cos.shape[-1])
            result[kind] = (
                cos.float().view(shape).to(positions.device),
                sin.float().view(shape).to(positions.device),
            )
        return result

    def stacked(self, positions: Tensor) -> Tables:
        """For positions (T,): cos and sin (L, 1, T, R), one per layer, to rotate (L, H, T, D) at once."""
        tables = self.tables(positions)
        return (
            torch.stack([tables[kind][0] for kind in self.layer_types]).unsqueeze(1),
            torch.stack([tables[kind][1] for kind in self.layer_types]).unsqueeze(1),
        )
