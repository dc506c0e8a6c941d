"""Rotary positions: put keys at a position, take them off it.

Memories hold *position-free* keys. A key gets its position when it is used, so slots can be merged in one
phase, moved, and kept for ever without rounding errors adding up.

A rotation turns pairs of numbers. Which pairs, and how the model writes its tables of angles, differs from family to
family: ``ccm.core.ways``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .ways import WAYS, Way, find, per_layer

__all__ = ["UNROTATED", "WAYS", "Rotary", "Tables", "Way", "rotate", "unrotate"]

#: Key of the tables of layers that do not rotate.
UNROTATED = "unrotated"


class Tables(NamedTuple):
    """cos and sin (..., T, R), and whether it is neighbours that they turn."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    """The other number of each pair, with the sign that a quarter of a turn gives it."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-b, a], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Put vectors at a position. x (..., T, D); cos, sin (..., T, R) with R <= D (partial rotary). fp32 inside."""
    size = cos.shape[-1]
    live = x[..., :size].float()
    out = (live * cos + _partners(live, interleaved) * sin).to(x.dtype)
    return out if size == x.shape[-1] else torch.cat([out, x[..., size:]], dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Take vectors off their position, the inverse of :func:`rotate`; always returns fp32.

    Families that scale their rotary embedding have cos^2 + sin^2 != 1, hence the division.
    """
    size = cos.shape[-1]
    live = x[..., :size].float()
    out = (live * cos - _partners(live, interleaved) * sin) / (cos * cos + sin * sin)
    return out if size == x.shape[-1] else torch.cat([out, x[..., size:].float()], dim=-1)


class Rotary:
    """Tables of cos and sin from the model's own rotary embedding, for every kind of layer it has."""

    def __init__(self, model: PreTrainedModel, body: str, way: Way, rotated: Sequence[bool]):
        self.module = find(model.get_submodule(body))
        self.dtype, self.way = model.dtype, way
        kinds = per_layer(self.module, model.config.get_text_config(decoder=True))
        self.layer_types = [kind if turns else UNROTATED for kind, turns in zip(kinds, rotated, strict=True)]

    @torch.no_grad()
    def tables(self, positions: Tensor) -> dict[str | None, Tables]:
        """For positions (..., T): cos and sin (..., T, R) in fp32, by layer type.

        They are rounded to the model's dtype on the way, as the model itself does.
        """
        flat = positions.reshape(1, -1)
        probe = torch.empty(0, dtype=self.dtype, device=positions.device)
        result: dict[str | None, Tables] = {}
        for kind in dict.fromkeys(self.layer_types):
            if kind == UNROTATED:
                continue
            found = self.module(probe, flat) if kind is None else self.module(probe, flat, kind)
            cos, sin = (self.way.expand(table.float()) for table in found)
            shape = (*positions.shape, cos.shape[-1])
            cos, sin = (table.view(shape).to(positions.device) for table in (cos, sin))
            result[kind] = Tables(cos, sin, self.way.pairs == "interleaved")
        if UNROTATED in self.layer_types:
            like = next(iter(result.values()))
            result[UNROTATED] = like._replace(cos=torch.ones_like(like.cos), sin=torch.zeros_like(like.sin))
        return result

    def stacked(self, positions: Tensor) -> Tables:
        """For positions (T,): cos and sin (L, 1, T, R), one per layer, to rotate (L, H, T, D) at once."""
        tables = self.tables(positions)
        cos, sin = (torch.stack([tables[k][i] for k in self.layer_types]).unsqueeze(1) for i in (0, 1))
        return Tables(cos, sin, self.way.pairs == "interleaved")
