"""One token of every row behind what they have read, with few operations.

The model's own layers, as tensors, without modules, hooks and adapters, none of which acts on the tokens of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ..core.attention import RecurrentPlan, additive, heads
from ..core.families import get_family
from ..core.head import head_of
from ..core.rotary import Rotary, Tables, rotate
from ..core.twin import head_size, text_config
from .products import Product, packed, product
from .shape import LayerShape, Norm, Unfit


@dataclass
class _Layer:
    shape: LayerShape
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    kind: str | None


class _Head(nn.Module):
    """The last product."""

    def __init__(self, of: Product):
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Step:
    """A model's decoding step.

    Args:
        model: of a family that carries memories.
        weights: None, or "float16" or "int8" for copies (``ccm.decoding.products``).

    Raises:
        Unfit: the model has another shape.
    """

    def __init__(self, model: PreTrainedModel, weights: str | None = None):
        family = get_family(model)
        self.rotary = Rotary(model, family.body, family.way, family.rotated)
        self.dtype = model.dtype
        self.size = head_size(text_config(model.config))
        self.embed = model.get_input_embeddings()
        # copies take and give float32
        self.stream = self.dtype if weights is None else torch.float32
        self.layers: list[_Layer] = []
        try:
            for name, kind in zip(family.attention, self.rotary.layer_types, strict=True):
                shape = LayerShape.of(model.get_submodule(name.rsplit(".", 1)[0]))
                qkv, out, gate_up, down = (
                    product(each, weights) for each in (shape.qkv, [shape.out], shape.gate_up, [shape.down])
                )
                self.layers.append(_Layer(shape, qkv, out, gate_up, down, kind))
            norm = Norm.of(model.get_submodule(family.body).norm)
            if norm is None:
                raise Unfit("it ends without a norm")
            self.norm = norm
        except (AttributeError, TypeError, RuntimeError) as error:
            raise Unfit(f"its layers are written in another way ({error})") from error
        for each in self._norms():
            each.weight = each.weight.to(self.stream)
        self.near = list(dict.fromkeys(layer.shape.near for layer in self.layers))
        self.top = _top(model, weights)

    @property
    def kinds(self) -> list[tuple[int | None, str | None]]:
        """Of each layer how far it sees, and which tables of angles it has."""
        return [(layer.shape.near, layer.kind) for layer in self.layers]

    def _norms(self) -> Sequence[Norm]:
        shapes = [layer.shape for layer in self.layers]
        found = [
            n for s in shapes for n in (s.before, s.query_norm, s.key_norm, s.after, s.middle, s.end) if n
        ]
        return [*found, self.norm]

    def __call__(self, ids: Tensor, position: Tensor, valid: Tensor, plan: RecurrentPlan, cache: Any) -> Any:
        """The model's output, with logits (B, 1, V).

        Args:
            ids, position: (B, 1).
            valid: (B, K + 1), 0 on padding.
            plan: of the pass.
            cache: of K entries; it takes the tokens in.
        """
        x = self.embed(ids[:, 0]).to(self.stream)
        tables = {kind: self._turn(heads(found)) for kind, found in self.rotary.tables(position).items()}
        masks = {near: self._mask(near, valid, plan) for near in self.near}
        for layer, entries in zip(self.layers, cache.layers, strict=True):
            shape = layer.shape
            a = layer.out(
                self._attention(layer, shape.before(x), tables[layer.kind], masks[shape.near], entries)
            )
            x = x + (shape.after(a) if shape.after else a)
            gate, up = layer.gate_up(shape.middle(x)).chunk(2, dim=-1)
            h = layer.down(shape.act(gate) * up)
            x = x + (shape.end(h) if shape.end else h)
        own: Any = type(self.top).forward
        return own(self.top, inputs_embeds=self.norm(x).unsqueeze(1), use_cache=False)

    def _attention(
        self, layer: _Layer, x: Tensor, turn: Product, mask: Tensor | None, entries: Any
    ) -> Tensor:
        batch, shared = len(x), entries.keys.shape[1]
        states = layer.qkv(x).view(batch, -1, self.size)
        both, value = states[:, :-shared], states[:, -shared:]
        shape = layer.shape
        if shape.query_norm and shape.key_norm:
            query, key = both[:, :-shared], both[:, -shared:]
            both = torch.cat([shape.query_norm(query), shape.key_norm(key)], dim=1)
        both = turn(both.unsqueeze(2)).to(self.dtype)
        keys, values = entries.update(both[:, -shared:], value.unsqueeze(2).to(self.dtype))
        # the query heads of a key head are the rows of one matrix
        query = both[:, :-shared].reshape(batch, shared, -1, self.size)
        out = scaled_dot_product_attention(query, keys, values, mask, scale=shape.scale)
        return out.reshape(batch, -1).to(self.stream)

    def _turn(self, tables: Tables) -> Product:
        """The rotation of (B, H, 1, D); in three operations where it turns whole halves."""
        cos, sin, interleaved = tables
        half = self.size // 2
        if interleaved or cos.shape[-1] != self.size:
            return lambda x: rotate(x, *tables)
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        return lambda x: torch.addcmul(x * cos, x.roll(half, -1), signed)

    def _mask(self, near: int | None, valid: Tensor, plan: RecurrentPlan) -> Tensor | None:
        """(B, 1, 1, K + 1), as the layers with this window have it; None where all is seen."""
        mask = additive(valid[:, None, None].bool(), self.dtype)
        like = mask.new_empty(len(valid), 1, 1, 1), mask.new_empty(len(valid), 1, valid.shape[1], 1)
        mask = plan.extend(nn.Identity(), like[0], like[1], like[1], mask, near)[3]
        return mask if bool(mask.any()) else None


def _top(model: PreTrainedModel, weights: str | None) -> PreTrainedModel:
    """The model behind its last norm, its own way; the head from a copy as well."""
    top = head_of(model)
    head = model.get_output_embeddings()
    names = [name for name, module in model._modules.items() if module is head]
    if weights is not None:
        if len(names) != 1 or type(head) is not nn.Linear:
            raise Unfit("its head is no plain linear layer")
        bias = None if head.bias is None else head.bias.float()
        top._modules[names[0]] = _Head(packed(head.weight.float(), bias, weights))
    return top
