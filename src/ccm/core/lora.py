"""PEFT's LoRA layers in a model, closed, each with its gate (``ccm.core.gate``) behind it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from . import gate


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
    gates: dict[str, gate.LayerGate] = {}
    for name in attention:
        gates[_layer(name)] = own = gate.LayerGate(adapter)
        model.get_submodule(name).register_forward_pre_hook(own.read, with_kwargs=True)
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
            down, up = module.lora_A[adapter], module.lora_B[adapter]
            if down.weight.is_meta:  # as the layer below, which is on no device until it runs
                down.to_empty(device=model.device)
                up.to_empty(device=model.device)
                module.reset_lora_parameters(adapter, True)
            found = next((each for prefix, each in gates.items() if name.startswith(prefix)), None)
            if found is None:
                raise ConfigError(f"target_modules: {name} is in no layer with attention; leave it out")
            module.register_forward_hook(found.behind(module))
            parameters += [down.weight, up.weight]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for parameter, trained in others.items():  # PEFT freezes what is closed and thaws what is active
        parameter.requires_grad_(trained)
    return parameters


def _layer(attention: str) -> str:
    """Beginning of the names of all that is in the layer of an attention module: up to its number."""
    return re.match(r".*?\.\d+\.", attention)[0]  # type: ignore[index]
