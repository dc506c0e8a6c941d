"""Layers that read copies of their weights in every pass over a memory, as decoding does.

A pass of a few tokens takes as long as reading the weights, and several times that with torch's products of float32.
The pass, its masks and its plan are the model's own. Only its layers run here, where the plan brings a step
(:attr:`ccm.core.attention.Plan.step`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
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
    shape = layer.shape

    # with this number behind it the length of a row is sqrt(d (mean x^2 + eps))
    end = x.new_full((*x.shape[:-1], 1), (x.shape[-1] * step.eps) ** 0.5)
    longer = torch.cat([x, end], dim=-1)
    x = longer[..., :-1]

    def normed(weight: Tensor) -> Tensor:
        return (x / vector_norm(longer, dim=-1, keepdim=True)).mul_(weight)

    states = _product(layer.qkv, shape.qkv, normed(layer.before), plan)
    states = states.unflatten(-1, (-1, step.size)).transpose(1, 2)
    heads = shape.out.in_features // step.size
    shared = (states.shape[1] - heads) // 2
    both, value = states.split_with_sizes([heads + shared, shared], dim=1)
    if shape.query_norm and shape.key_norm:
        query, key = both.split_with_sizes([heads, shared], dim=1)
        both = torch.cat([shape.query_norm(query), shape.key_norm(key)], dim=1)
    cos, sin = (way.expand(table).unsqueeze(1) for table in kwargs["position_embeddings"])
    both = rotate(both, cos, sin, way.pairs == "interleaved")
    query, key = both.split_with_sizes([heads, shared], dim=1)
    key, value = kwargs[CACHE].update(key, value, index)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    options = {"dropout": 0.0, "scaling": shape.scale, "sliding_window": shape.near, PLAN: plan}
    out, _ = attend(attention, query, key, value, kwargs["attention_mask"], **options)
    a = _product(layer.out, [shape.out], out.flatten(2), plan)
    x.add_(shape.after(a) if shape.after else a)

    gate, up = _product(layer.gate_up, shape.gate_up, normed(layer.middle), plan).chunk(2, dim=-1)
    a = _product(layer.down, [shape.down], layer.act(gate).mul_(up), plan)
    return x.add_(shape.end(a) if shape.end else a)


def _product(product: Product, modules: Sequence[nn.Module], x: Tensor, plan: Plan) -> Tensor:
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
