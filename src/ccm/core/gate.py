"""Conditional LoRA: W x + 1[x is COMP] dW x (paper, equation 4), over PEFT's LoRA layers.

PEFT has no adapter per token. Its layers hold the weights here but run closed, and a hook behind each of them adds
B A x to the rows of the COMP tokens, in place. Ordinary tokens are not touched, and no compute is spent on them.

The plan comes as a keyword argument of the attention module and is kept per layer and thread from there on. That is
inside the region that gradient checkpointing runs again, on whatever thread; a global would be stale there and give
zero gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from .attention import PLAN, Places, Plan


class Lora(NamedTuple):
    """An adapter of one projection.

    Attributes:
        down, up: A (r, d_in) and B (d_out, r).
        scaling: alpha / r.
    """

    down: Tensor
    up: Tensor
    scaling: float

    @classmethod
    def of(cls, module: nn.Module, adapter: str) -> Lora | None:
        """None where a projection has no adapter of this name."""
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            return None
        return cls(module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter])

    def __call__(self, x: Tensor) -> Tensor:
        """(alpha / r) B A x, in fp32."""
        return linear(linear(x.to(self.down.dtype), self.down) * self.scaling, self.up)


class _AddRows(torch.autograd.Function):
    """out[places] += delta, in place, for out (B, Q, d) as rows of a matrix; as an operation on a view of it, its
    gradient would be copied four times."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, delta: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places)
        out.flatten(0, 1).index_add_(0, places, delta)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return grad, grad.flatten(0, 1).index_select(0, places), None


class LayerGate(threading.local):
    """The gate of one decoder layer: which tokens of the pass that this thread runs the adapter applies to.

    Nothing is locked, so passes of several threads run side by side on one model. Copies of a model share its gates,
    as they share the threads.
    """

    def __init__(self, adapter: str):
        self.adapter = adapter
        self.places: Places | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGate:
        return self

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before a layer: which rows of this pass are COMP tokens."""
        plan: Plan | None = kwargs.get(PLAN)
        self.places = plan.gate if plan is not None and plan.adapter == self.adapter else None

    def behind(self, module: LoraLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """The hook behind one projection: out + 1[x is COMP] (alpha / r) B A x, in place."""
        own = Lora.of(module, self.adapter)
        assert own is not None

        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            places = self.places
            if places is None:
                return
            # (row, column) pairs would take three times as long, or more, forward and backward
            if flat := isinstance(places, Tensor):
                places = places.to(out.device)
            x = args[0].flatten(0, 1).index_select(0, places) if flat else args[0][:, places]
            delta = own(x).to(out.dtype)
            if flat:
                _AddRows.apply(out, delta, places)
            else:
                out[:, places].add_(delta)

        return add
