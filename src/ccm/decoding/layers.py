"""Layers that read copies of their weights in every pass over a memory, as decoding does.

A pass of a few tokens takes as long as reading the weights, and several times that with torch's products of float32.
The pass, its masks and its plan are the model's own. Only its layers run here, where the plan brings a step
(:attr:`ccm.core.attention.Plan.step`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.attention import PLAN, Plan
from ..core.gate import Lora
from ..core.room import CACHE
from ..core.rotary import rotate
from .products import Product

#: What a model hands on to a layer that runs here.
_HANDED = {PLAN, CACHE, "attention_mask", "position_embeddings"}


def install(layers: Iterable[nn.Module]) -> None:
    """Let decoder layers run by the step that a plan brings."""
    for layer in layers:
        layer.__dict__["forward"] = MethodType(_forward, layer)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    plan: Plan | None = kwargs.get(PLAN)
    if args or plan is None or plan.step is None or not kwargs.keys() >= _HANDED:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():  # as in decoding
        return _run(self.self_attn, plan, hidden_states, kwargs)


def _run(attention: Any, plan: Plan, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What the layer of an attention module makes of x (B, T, d)."""
    step, index = plan.step, attention.layer_idx
    layer, way = step.layers[index], step.rotary.way

    def attend(both: Tensor, value: Tensor) -> Tensor:
        cos, sin = (way.expand(table).unsqueeze(1) for table in kwargs["position_embeddings"])
        both = rotate(both.transpose(1, 2), cos, sin, way.pairs == "interleaved")
        query, key = both.split_with_sizes([step.heads, step.shared], dim=1)
        key, value = kwargs[CACHE].update(key, value.transpose(1, 2), index)
        call = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        options = {
            "dropout": 0.0,
            "scaling": layer.shape.scale,
            "sliding_window": layer.shape.near,
            PLAN: plan,
        }
        out, _ = call(attention, query, key, value, kwargs["attention_mask"], **options)
        return out.flatten(2)

    x, longer = step.lengthened(x)
    step.layer(layer, x, longer, attend, partial(_multiply, plan))
    return x


def _multiply(plan: Plan, product: Product, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What modules make of x (B, T, d), one behind the other, with the adapter of the plan where its gate is open."""
    out = product(x)
    if plan.gate is None:
        return out
    rows, places = out.flatten(0, 1), plan.gate
    if isinstance(places, slice):
        places = torch.arange(len(rows)).view(out.shape[:2])[:, places].flatten()
    tokens, start = x.flatten(0, 1).index_select(0, places), 0
    for module in modules:
        stop = start + module.out_features
        if own := Lora.of(module, plan.adapter):
            rows[:, start:stop].index_add_(0, places, own(tokens))
        start = stop
    return out
