"""Products of weights with one token: as the model has them, or from a smaller copy of them.

Decoding reads every weight once a token, so a copy of half the bytes is read in half the time. The copies are packed
for torch's own kernels of x86 processors, which take and give float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.pages import ask_for_large
from .shape import Unfit

#: (B, d_in) -> (B, d_out)
Product: TypeAlias = Callable[[Tensor], Tensor]


class Packed:
    """A product from a copy.

    Attributes:
        product: torch's operation.
        weights: what it takes beside the input.
    """

    def __init__(self, product: Any, weights: Any):
        self.product, self.weights = product, weights
        self._call = getattr(product, "_op", product)  # its call looks for what tracers pass, in Python

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._call(x, self.weights)
        return out


def copy_bytes(rows: int, columns: int) -> int:
    """Of the float16 copy of a matrix, whose columns torch's kernels pad to multiples of 512."""
    return 2 * rows * (-(-columns // 512) * 512)


def product(modules: Sequence[nn.Module], weights: str | None) -> Product:
    """Of projections that read the same input: their outputs, one behind the other.

    Args:
        modules: linear layers, maybe with closed adapters on them.
        weights: None: as they are; "float16" or "int8": from a copy.

    Raises:
        Unfit: an adapter acts on all tokens, or a copy is wanted of what is no plain linear layer.
    """
    bases = [_base(module) for module in modules]
    if weights is None:
        each = [_own(base) for base in bases]
        return each[0] if len(each) == 1 else lambda x: torch.cat([own(x) for own in each], dim=-1)
    if any(type(base) is not nn.Linear or type(base.weight) is not nn.Parameter for base in bases):
        raise Unfit(f"{type(bases[0]).__name__} is no plain linear layer")
    ask_for_large()
    weight = torch.cat([base.weight for base in bases]).float()
    bias = None
    if any(base.bias is not None for base in bases):
        none = [base.weight.new_zeros(len(base.weight)) for base in bases]
        bias = torch.cat([n if b.bias is None else b.bias for b, n in zip(bases, none, strict=True)]).float()
    return packed(weight, bias, weights)


def packed(weight: Tensor, bias: Tensor | None, weights: str) -> Packed:
    """x W^T + b from a copy of W (d_out, d_in). Raises Unfit if that cannot hold it."""
    ops = torch.ops.quantized
    if weights == "float16":
        if float(weight.abs().max()) > torch.finfo(torch.float16).max:
            raise Unfit("some of its weights are too large for float16")
        return Packed(ops.linear_dynamic_fp16, ops.linear_prepack_fp16(weight, bias))
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    rounded = (weight / scale.unsqueeze(1)).round().to(torch.int8)
    zero = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch means to give these tensors up, and has no other for its int8 products
        kept = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0)
    return Packed(ops.linear_dynamic, ops.linear_prepack(kept, bias))


def _base(module: nn.Module) -> Any:
    """The layer below the adapters, none of which may be open."""
    if not isinstance(module, LoraLayer):
        return module
    if module.active_adapters and not module.disable_adapters:
        raise Unfit("an adapter acts on all tokens")
    return module.base_layer


def _own(base: Any) -> Product:
    if type(base) is nn.Linear:
        return lambda x: linear(x, base.weight, base.bias)
    made: Product = base
    return made
