"""Conditional LoRA: W x + 1[x is COMP] dW x (paper, equation 4), over PEFT's LoRA layers.

PEFT has no adapter per token, so two hooks per projection make one: the input of ``lora_A`` is cut down to the
COMP tokens, the output of ``lora_B`` is put back at their places. Ordinary tokens get exactly zero, and no
compute is spent on them.

The plan comes as a keyword argument of the attention module and is kept per layer from there on. That is inside
the region that gradient checkpointing runs again; a global would be stale there and give zero gradients.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import PLAN, Plan
from .errors import ConfigError


class LayerGate:
    """The gate of one decoder layer: which tokens of the pass at hand the adapter applies to."""

    def __init__(self, adapter: str):
        self.adapter = adapter
        self.index: Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan: Plan | None = kwargs.get(PLAN)
        self.index = plan.gate if plan is not None and plan.adapter == self.adapter else None

    def take(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args  # (B, Q, D)
        self.shape, self.dtype = x.shape[:-1], x.dtype
        x = x.flatten(0, -2)
        x = x[:0] if self.index is None else x.index_select(0, self.index)
        return (x.to(module.weight.dtype),)

    def put(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        if self.index is None:
            return out.new_zeros(())
        full = out.new_zeros(self.shape.numel(), out.shape[-1], dtype=self.dtype)
        return full.index_copy(0, self.index, out.to(self.dtype)).view(*self.shape, -1)


def attach(model: PreTrainedModel, config: LoraConfig, adapter: str) -> list[nn.Parameter]:
    """Inject a closed conditional adapter into the model; returns its parameters, in fp32.

    Several adapters live side by side: all are active for PEFT, and the gate opens one at a time.

    Raises:
        ConfigError: no module of the model matches the target modules.
    """
    gates: dict[str, LayerGate] = {}
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            gate = LayerGate(adapter)
            module.register_forward_pre_hook(gate.read, with_kwargs=True)
            gates[name.rsplit(".", 1)[0] + "."] = gate
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
        module.set_adapter(list(module.lora_A))
        module.cast_input_dtype_enabled = False  # the gate casts, and only what passes
        gate = next(gate for prefix, gate in gates.items() if name.startswith(prefix))
        if adapter in module.lora_A:
            down, up = module.lora_A[adapter], module.lora_B[adapter]
            down.register_forward_pre_hook(gate.take)
            up.register_forward_hook(gate.put)
            parameters += [down.weight, up.weight]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters
