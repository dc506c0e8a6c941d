"""All layers of the usual shape in one call, so that no Python runs between their operations.

What streams through the caches, which is the weights, leaves the interpreter's code and its objects cold: it took a
tenth of every token. TorchScript is what torch has against that without a compiler on the machine.

Attention in float32 is a product of matrices for the scores, and bags of embeddings for what they weigh: each query
head is a bag, of the rows of values that it sees, with its probabilities. FBGEMM's kernel for bags uses the wide
registers of every x86 processor, MKL's for small matrices those of Intel's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

_LAYERS = """
def layers(x: Tensor, longer: Tensor, qkv: List[Packed], out: List[Packed], gate_up: List[Packed], down: List[Packed],
           before: List[Tensor], middle: List[Tensor], keys: List[Tensor], values: List[Tensor], turn: Tensor,
           mask: Optional[Tensor], scale: float, bags: Optional[Tuple[Tensor, Tensor, Tensor, int]]) -> None:
    batch, shared, size = x.size(0), keys[0].size(1), keys[0].size(3)
    strides = values[0].stride()
    for i in range(len(qkv)):
        h = (x / torch.norm(longer, 2, [-1], True)).mul_(before[i])
        states = product(h, qkv[i]).view([batch, -1, size])
        both, value = states.split_with_sizes([states.size(1) - shared, shared], 1)
        query, key = torch.bmm(both, turn).split_with_sizes([both.size(1) - shared, shared], 1)
        keys[i].select(2, -1).copy_(key)
        values[i].select(2, -1).copy_(value)
        if bags is not None and values[i].stride() == strides:
            bias, rows, ends, last = bags
            query = query.reshape([batch * shared, -1, size])
            scores = torch.baddbmm(bias, query, keys[i].flatten(0, 1).transpose(1, 2), beta=1.0, alpha=scale)
            weights = torch.softmax(scores, -1).view([-1])
            table = values[i].as_strided([last, size], [size, 1])
            a = torch._embedding_bag_forward_only(table, rows, ends, False, 0, False, weights, True)[0]
        else:
            query = query.view([batch, shared, -1, size]).to(keys[i].dtype)
            a = torch._C._nn.scaled_dot_product_attention(query, keys[i], values[i], mask, 0.0, False, scale=scale)
        x.add_(product(a.reshape([batch, -1]).to(x.dtype), out[i]))
        h = (x / torch.norm(longer, 2, [-1], True)).mul_(middle[i])
        gate, up = product(h, gate_up[i]).chunk(2, -1)
        x.add_(product(torch._C._nn.silu(gate).mul_(up), down[i]))
"""
_PACKED = "__torch__.torch.classes.quantized.LinearPackedParamsBase"


class Script:
    """Layers that read copies of their weights (``ccm.decoding.step``), one behind the other."""

    def __init__(self, layers: Sequence[Any], call: Any):
        parts = [
            [getattr(layer, name).weights for layer in layers] for name in ("qkv", "out", "gate_up", "down")
        ]
        norms = [layer.before for layer in layers], [layer.middle for layer in layers]
        self._call, self._held = call, (*parts, *norms)
        self._scale, self._width = layers[0].shape.scale, layers[0].shape.out.in_features

    @classmethod
    def of(cls, layers: Sequence[Any]) -> Script | None:
        """None for layers with more norms, another activation or windows, and where torch has no such script."""
        first, probe = layers[0], torch.linspace(-4, 4, 64)
        for layer in layers:
            shape = layer.shape
            more = shape.query_norm or shape.key_norm or shape.after or shape.end
            alike = (shape.scale, layer.kind) == (first.shape.scale, first.kind) and shape.near is None
            if more or not alike or not torch.equal(shape.act(probe), silu(probe)):
                return None
        text = _LAYERS.replace("product(", f"torch.ops.{first.qkv.product}(").replace("Packed", _PACKED)
        try:
            call = torch.jit.CompilationUnit(text).layers
        except (AttributeError, RuntimeError):
            return None
        return cls(layers, call)

    def __call__(self, longer: Tensor, turn: Tensor, mask: Tensor | None, layers: Sequence[Any]) -> None:
        """Turn rows (B, d + 1), whose last number stays, into what the last layer gives.

        Args:
            turn: (B, D, D) the rotation.
            mask: (B, 1, 1, K + 1), or None.
            layers: of a cache of K entries, which take the tokens in.
        """
        for entries in layers:
            entries.hold(*entries.reserve(1), entries.keys.shape[2] + 1)
        keys, values = [e.keys for e in layers], [e.values for e in layers]
        bags = _bags(self._width, values[0], mask)
        self._call(longer[:, :-1], longer, *self._held, keys, values, turn, mask, self._scale, bags)


def _bags(width: int, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """How the query heads of all rows, ``width`` numbers each, see values (B, H, K, D) that lie as these do.

    Returns:
        what is added to the scores (B H, G, K); of each query head its rows in the table (N, D) that the values are
        part of, and where they begin; N. None for values that torch has no such kernel for.
    """
    batch, shared, length, size = values.shape
    *strides, row, one = values.stride()
    if values.dtype != torch.float32 or (row, one) != (size, 1) or any(stride % size for stride in strides):
        return None
    shape = batch, shared, width // (shared * size), length
    rows, heads = (stride // size for stride in strides)
    last = (batch - 1) * rows + (shared - 1) * heads + length
    seen = torch.arange(last, dtype=torch.int32).as_strided(shape, (rows, heads, 0, 1)).flatten()
    begins = torch.arange(0, len(seen) + 1, length, dtype=torch.int32)
    bias = (values.new_zeros(1) if mask is None else mask).expand(shape).flatten(0, 1)
    return bias, seen, begins, last
