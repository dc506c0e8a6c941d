"""Conditional LoRA: W x + 1[x is COMP] dW x (paper, equation 4), over PEFT's LoRA layers.

PEFT has no adapter per token. Its layers hold the weights here but run closed, and a hook behind each of them adds
B A x to the rows of the COMP tokens, in place. Ordinary tokens are not touched, and no compute is spent on them.

The plan comes as a keyword argument of the attention module and is kept per layer and thread from there on. That is
inside the region that gradient checkpointing runs again, on whatever thread; a global would be stale there and give
zero gradients.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ..errors import ConfigError
from .attention import PLAN, Places, Plan


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
        plan: Plan | None = kwargs.get(PLAN)
        self.places = plan.gate if plan is not None and plan.adapter == self.adapter else None

    def behind(self, module: LoraLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """The hook behind one projection: out + 1[x is COMP] (alpha / r) B A x, in place."""
        down, up = module.lora_A[self.adapter].weight, module.lora_B[self.adapter].weight
        scaling = module.scaling[self.adapter]

        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            places = self.places
            if places is None:
                return
            # (row, column) pairs would take three times as long, or more, forward and backward
            if flat := isinstance(places, Tensor):
                places = places.to(out.device)
            x = args[0].flatten(0, 1).index_select(0, places) if flat else args[0][:, places]
            delta = linear(linear(x.to(down.dtype), down) * scaling, up).to(out.dtype)
            if flat:
                _AddRows.apply(out, delta, places)
            else:
                out[:, places].add_(delta)

        return add


def attach(
    model: PreTrainedModel, config: LoraConfig, adapter: str, attention: Sequence[str]
) -> list[nn.Parameter]:
    """Inject a closed conditional adapter into the model; returns its parameters, in fp32.

    Args:
        model: that carries it.
        config: of its LoRA.
        adapter: its name.
        attention: names of the model's attention modules.

    Several adapters live side by side, as do PEFT's own that were active before: those apply to all tokens.

    Raises:
        ConfigError: no module of the model matches the target modules, or one outside its layers does.
    """
    gates: dict[str, LayerGate] = {}
    for name in attention:
        gates[name.rsplit(".", 1)[0] + "."] = gate = LayerGate(adapter)
        model.get_submodule(name).register_forward_pre_hook(gate.read, with_kwargs=True)
    others = {p: p.requires_grad for n, p in model.named_parameters() if "lora_" in n}
    active = {n: list(m.active_adapters) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    try:
        with warnings.catch_warnings():  # PEFT warns that there is an adapter already; ours do not mix
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, model, adapter_name=adapter)
    except ValueError as error:
        raise ConfigError(f"target_modules {config.target_modules}: {error}") from error
    parameters: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        module.set_adapter(active.get(name, []))
        if adapter in module.lora_A:
            if module.lora_A[
                adapter
            ].weight.is_meta:  # as the layer below, which is on no device until it runs
                module.lora_A[adapter].to_empty(device=model.device)
                module.lora_B[adapter].to_empty(device=model.device)
                module.reset_lora_parameters(adapter, True)
            own = next((gate for prefix, gate in gates.items() if name.startswith(prefix)), None)
            if own is None:
                raise ConfigError(f"target_modules: {name} is in no layer with attention; leave it out")
            module.register_forward_hook(own.behind(module))
            parameters += [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for parameter, trained in others.items():  # PEFT freezes what is closed and thaws what is active
        parameter.requires_grad_(trained)
    return parameters
