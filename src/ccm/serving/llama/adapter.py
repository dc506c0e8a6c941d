"""A compressor's conditional adapter as a LoRA that llama.cpp reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from peft.tuners.lora import LoraLayer

from ...core.compressor import Compressor
from ...errors import ConfigError


def write(path: Path, compressor: Compressor, architecture: str, interleaved: bool) -> None:
    """Write the adapter as GGUF, scaled as PEFT scales it.

    Args:
        path: where to.
        compressor: whose adapter.
        architecture: of the model's GGUF file, such as "llama".
        interleaved: whether the halves of each head of queries and keys are interleaved in that file.

    Raises:
        ConfigError: it adapts a projection that the file does not have under a name of its own.
    """
    config = compressor.model.config.get_text_config(decoder=True)
    known = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    names = None if known is None else gguf.get_tensor_name_map(known, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": compressor.kv_shape()[1]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # the scale is in the weights
    for name, module in compressor.model.named_modules():
        if not isinstance(module, LoraLayer) or compressor.adapter not in module.lora_A:
            continue
        found = None if names is None else names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if found is None:
            raise ConfigError(
                f"the adapter changes {name}, which GGUF files of {architecture} models do not have"
            )
        down, up = (
            pair[compressor.adapter].weight.detach().float() for pair in (module.lora_A, module.lora_B)
        )
        up = up * module.scaling[compressor.adapter]
        count = heads.get(found.split(".")[2]) if interleaved else None
        if count:
            up = up.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(up.shape)
        writer.add_tensor(f"{found}.lora_a", _array(down))
        writer.add_tensor(f"{found}.lora_b", _array(up))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _array(weight: torch.Tensor) -> object:
    return weight.cpu().contiguous().numpy()
