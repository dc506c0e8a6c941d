"""Decoder layers of the common shape, taken apart:

    x += Attention(Norm(x));  x += MLP(Norm(x))

with norms of queries and keys, and norms behind both parts, where a family has them. Whether a model that is written
like this does nothing else is for a trial to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class Unfit(Exception):
    """The model has another shape."""


def misses(found: Tensor, right: Tensor) -> float:
    """By how many standard deviations of the logits these are others."""
    return float((found.float() - right.float()).abs().max() / right.float().std())


def check(error: float, most: float) -> None:
    """Raises Unfit where logits are missed by more than rounding."""
    if not error < most:
        raise Unfit(
            f"a step misses its logits by {error:.2g} standard deviations, at most {most:g} are rounding"
        )


@dataclass
class Norm:
    """An RMS norm: x / sqrt(mean x^2 + eps) * weight."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module | None) -> Norm | None:
        """Of a module: what it makes of ones is its weight, however it stores it."""
        if module is None:
            return None
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        own = next(module.parameters(), None)
        if eps is None or own is None or own.ndim != 1:
            raise Unfit(f"{type(module).__name__} is no RMS norm")
        ones = torch.ones(1, len(own), dtype=torch.float32, device=own.device)
        weight = module(ones)[0].float() * (1 + eps) ** 0.5
        return cls(weight.to(own.dtype), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        before, middle: norms before attention and before the MLP.
        after, end: norms of what attention and the MLP give, where a family has them.
        query_norm, key_norm: norms of heads.
        qkv, gate_up: projections that read the same input, one behind the other; a family may have joined them.
        out, down: projections at the end of attention and MLP.
        act: the activation of the gate.
        near: how far the layer sees; None: all.
        scale: of the scores.
    """

    before: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    after: Norm | None
    middle: Norm
    end: Norm | None
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    near: int | None
    scale: float

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """Raises Unfit, AttributeError, TypeError or RuntimeError for a layer that is written in another way."""
        attention, mlp = layer.self_attn, layer.mlp
        four = hasattr(layer, "pre_feedforward_layernorm")
        before = Norm.of(layer.input_layernorm)
        middle = Norm.of(layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm)
        if before is None or middle is None:
            raise Unfit("a layer has no norms")
        joined = getattr(attention, "qkv_proj", None), getattr(mlp, "gate_up_proj", None)
        return cls(
            before=before,
            query_norm=Norm.of(getattr(attention, "q_norm", None)),
            key_norm=Norm.of(getattr(attention, "k_norm", None)),
            after=Norm.of(layer.post_attention_layernorm) if four else None,
            middle=middle,
            end=Norm.of(layer.post_feedforward_layernorm) if four else None,
            qkv=(joined[0],) if joined[0] else (attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.o_proj,
            gate_up=(joined[1],) if joined[1] else (mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
            act=mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn,
            near=_distance(attention),
            scale=attention.scaling,
        )


def _distance(attention: Any) -> int | None:
    """Some families say it on the layer, others for all layers."""
    near = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return None if near is None or getattr(attention, "is_sliding", True) is False else int(near)
