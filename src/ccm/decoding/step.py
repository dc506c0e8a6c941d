"""One token of every row behind what they have read, with few operations.

The model's own layers, as tensors, without modules, hooks and adapters, none of which acts on the tokens of answers.
Other passes run these layers too (``ccm.decoding.layers``); ``script`` has them once more, for TorchScript.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..core.attention import RecurrentPlan, additive
from ..core.families import get_family
from ..core.pages import give_back
from ..core.rotary import Rotary, rotate
from ..core.twin import head_size, kv_heads, text_config
from .products import Product, product
from .script import Script
from .shape import LayerShape, Norm, Unfit

#: Of queries and keys (..., H + Hkv, D), unrotated, and values (..., Hkv, D): what is read (..., H D).
Attend: TypeAlias = Callable[[Tensor, Tensor], Tensor]
#: What a product, which stands for modules, makes of its input.
Multiply: TypeAlias = Callable[[Product, Sequence[nn.Module], Tensor], Tensor]


@dataclass
class _Layer:
    """One decoder layer, ready to run.

    Attributes:
        shape: what it was read from.
        qkv, out, gate_up, down: its products.
        before, middle: weights (d,) of the norms in front of its parts.
        act: the activation of the gate.
        kind: which tables of angles it has.
    """

    shape: LayerShape
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    before: Tensor
    middle: Tensor
    act: Callable[[Tensor], Tensor]
    kind: str | None


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
        self.packed = weights is not None
        #: What products take and give; copies float32.
        self.given = self.dtype if weights is None else torch.float32
        config = text_config(model.config)
        self.size, self.heads, self.shared = head_size(config), config.num_attention_heads, kv_heads(config)
        self.units = torch.eye(self.size, dtype=self.given, device=model.device)
        self.embed = model.get_input_embeddings()
        self.layers: list[_Layer] = []
        if self.packed:
            give_back()  # or copies lie there, in small pages
        try:
            last = Norm.of(model.get_submodule(family.body).norm)
            if last is None:
                raise Unfit("it ends without a norm")
            self.eps = last.eps
            for name, kind in zip(family.attention, self.rotary.layer_types, strict=True):
                shape = LayerShape.of(model.get_submodule(name.rsplit(".", 1)[0]))
                qkv, out, gate_up, down = (
                    product(each, weights) for each in (shape.qkv, [shape.out], shape.gate_up, [shape.down])
                )
                for norm in (shape.query_norm, shape.key_norm, shape.after, shape.end):
                    if norm:
                        norm.weight = norm.weight.to(self.given)
                before, middle = self._weight(shape.before), self._weight(shape.middle)
                act = getattr(shape.act, "forward", shape.act)  # a module's, without looking for hooks
                self.layers.append(_Layer(shape, qkv, out, gate_up, down, before, middle, act, kind))
            self.last = self._weight(last)
            self.head = product([model.get_output_embeddings()], weights)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise Unfit(f"its layers are written in another way ({error})") from error
        self.script = Script.of(self.layers) if self.packed else None
        self.near = list(dict.fromkeys(layer.shape.near for layer in self.layers))

    def _weight(self, norm: Norm) -> Tensor:
        """The weight (d,) of a norm that divides by the length of a row, not by its root mean square."""
        if norm.eps != self.eps:
            raise Unfit("its norms differ")
        return norm.weight.float() * len(norm.weight) ** 0.5

    def __call__(self, ids: Tensor, position: Tensor, valid: Tensor, plan: RecurrentPlan, cache: Any) -> Any:
        """The model's output, with logits (B, 1, V).

        Args:
            ids, position: (B, 1).
            valid: (B, K + 1), 0 on padding.
            plan: of the pass.
            cache: of K entries; it takes the tokens in.
        """
        if not self.packed:
            return self._run(ids, position, valid, plan, cache)
        # without this torch asks the packed weights of each product for a __torch_function__, and they throw
        with torch._C.DisableTorchFunctionSubclass():
            return self._run(ids, position, valid, plan, cache)

    def _run(self, ids: Tensor, position: Tensor, valid: Tensor, plan: RecurrentPlan, cache: Any) -> Any:
        return self.output(self.through(ids, *self.tables(position, valid, plan), cache.layers))

    def tables(
        self, position: Tensor, valid: Tensor, plan: RecurrentPlan
    ) -> tuple[dict[str | None, Tensor], dict[int | None, Tensor | None]]:
        """Rotations (B, D, D) by kind of layer, and masks (B, 1, 1, K + 1) by how far a layer sees."""
        # a rotation as a matrix is what it makes of the unit vectors
        units = self.units.expand(len(position), -1, -1)
        turns = {kind: rotate(units, *tables) for kind, tables in self.rotary.tables(position).items()}
        return turns, {near: self._mask(near, valid, plan) for near in self.near}

    def through(self, ids: Tensor, turns: Any, masks: Any, layers: Sequence[Any]) -> Tensor:
        """The logits (B, V): tokens (B, 1) go through layers whose keys and values take them in."""
        x, longer = self.lengthened(self.embed(ids[:, 0]).float())
        if self.script is not None:
            self.script(longer, turns[self.layers[0].kind], masks[None], layers)
        else:
            for layer, entries in zip(self.layers, layers, strict=True):
                attend = partial(self._attend, layer, turns[layer.kind], masks[layer.shape.near], entries)
                self.layer(layer, x, longer, attend, _alone)
        return self.head(self._normed(x, longer, self.last))

    def lengthened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (..., d) as a part of longer ones (..., d + 1), whose length is sqrt(d (mean x^2 + eps))."""
        end = x.new_full((*x.shape[:-1], 1), (x.shape[-1] * self.eps) ** 0.5)
        longer = torch.cat([x, end], dim=-1)
        return longer[..., :-1], longer

    def layer(self, layer: _Layer, x: Tensor, longer: Tensor, attend: Attend, multiply: Multiply) -> None:
        """Turn rows, as :meth:`lengthened` gives them, into what a layer gives."""
        shape, heads, shared = layer.shape, self.heads, self.shared
        states = multiply(layer.qkv, shape.qkv, self._normed(x, longer, layer.before))
        states = states.view(*x.shape[:-1], -1, self.size)
        both, value = states.split_with_sizes([heads + shared, shared], dim=-2)
        if shape.query_norm and shape.key_norm:
            query, key = both.split_with_sizes([heads, shared], dim=-2)
            both = torch.cat([shape.query_norm(query), shape.key_norm(key)], dim=-2)
        a = multiply(layer.out, (shape.out,), attend(both, value))
        x.add_(shape.after(a) if shape.after else a)
        h = multiply(layer.gate_up, shape.gate_up, self._normed(x, longer, layer.middle))
        gate, up = h.chunk(2, dim=-1)
        h = multiply(layer.down, (shape.down,), layer.act(gate).mul_(up))
        x.add_(shape.end(h) if shape.end else h)

    def _normed(self, x: Tensor, longer: Tensor, weight: Tensor) -> Tensor:
        h = (x / vector_norm(longer, dim=-1, keepdim=True)).mul_(weight)
        return h if self.given == torch.float32 else h.to(self.given)

    @staticmethod
    def output(logits: Tensor) -> Any:
        """What a model gives."""
        return CausalLMOutputWithPast(logits=logits.unsqueeze(1))

    def _attend(
        self, layer: _Layer, turn: Tensor, mask: Tensor | None, entries: Any, both: Tensor, value: Tensor
    ) -> Tensor:
        query, key = torch.bmm(both, turn).split_with_sizes([self.heads, self.shared], dim=1)
        keys, values = entries.update(key.unsqueeze(2), value.unsqueeze(2))
        # the query heads of a key head are the rows of one matrix
        query = query.view(len(query), self.shared, -1, self.size).to(self.dtype)
        out = scaled_dot_product_attention(query, keys, values, mask, scale=layer.shape.scale)
        return out.reshape(len(out), -1).to(self.given)

    def _mask(self, near: int | None, valid: Tensor, plan: RecurrentPlan) -> Tensor | None:
        """(B, 1, 1, K + 1), as the layers with this window have it; None where all is seen."""
        if near is None and bool(valid.all()):
            return None
        mask = additive(valid[:, None, None].bool(), self.dtype)
        like = mask.new_empty(len(valid), 1, 1, 1), mask.new_empty(len(valid), 1, valid.shape[1], 1)
        mask = plan.extend(nn.Identity(), like[0], like[1], like[1], mask, near)[3]
        return mask if bool(mask.any()) else None


def _alone(product: Product, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    return product(x)
