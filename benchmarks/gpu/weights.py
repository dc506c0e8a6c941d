"""Quantized weights travel as the blocks of a GGUF file, and become the floats that the library makes of them.

The blocks are stored by columns (all first bytes, all second bytes, …), which compress better, and in the order of
the model's own tensors. So what unpacks them needs torch and safetensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

#: Bytes of a block of 32 weights: a scale in float16, in Q4_1 an offset as well, and the quantized weights.
BLOCKS = {"Q4_1": 20, "Q8_0": 34}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def pack(gguf_file: Path, config: Any) -> bytes:
    """A Llama's blocks of Q4_1 and Q8_0, and its other tensors as they are."""
    from gguf import GGUFReader

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: dict[str, Tensor] = {}
    blocks: dict[str, list[Tensor]] = {kind: [] for kind in BLOCKS}
    layout = []
    for tensor in GGUFReader(gguf_file).tensors:
        *layer, short, _ = tensor.name.split(".")  # such as blk.3.attn_q.weight
        name = f"model.{f'layers.{layer[1]}.' if layer else ''}{NAMES[short]}.weight"
        data, kind = torch.from_numpy(tensor.data.copy()), tensor.tensor_type.name
        if short in heads:  # llama.cpp pairs the two halves of a head, row by row
            data = data.unflatten(0, (heads[short], -1, 2)).transpose(1, 2).flatten(0, 2)
        if kind in BLOCKS:
            layout.append([name, kind, *reversed(tensor.shape.tolist())])
            blocks[kind].append(data.reshape(-1, BLOCKS[kind]))
        else:
            tensors[name] = data.float().contiguous()
    tensors |= {kind: torch.cat(parts).T.contiguous() for kind, parts in blocks.items() if parts}
    return save(tensors, {"layout": json.dumps(layout)})


def unpack(packed: Path) -> dict[str, Tensor]:
    """The weights by name, in float32."""
    with safe_open(packed, framework="np") as file:
        layout = json.loads(file.metadata()["layout"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = {kind: np.ascontiguousarray(arrays.pop(kind).T) for kind in BLOCKS if kind in arrays}
    used = dict.fromkeys(stored, 0)
    for name, kind, rows, columns in layout:
        count = rows * columns // 32
        part = stored[kind][used[kind] : used[kind] + count]
        arrays[name] = _floats(kind, part).reshape(rows, columns)
        used[kind] += count
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _floats(kind: str, blocks: np.ndarray) -> np.ndarray:
    """(blocks, bytes) to (blocks, 32)."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return blocks[:, 2:].view(np.int8) * scale
    offset = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    halves = blocks[:, 4:]
    floats = np.concatenate((halves & 15, halves >> 4), 1) * scale
    floats += offset
    return floats


def write_model(folder: Path, packed: Path | None) -> None:
    """Give a folder with a model's config its weights: the packed ones, or random ones."""
    if packed:
        tensors = unpack(packed)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
