"""A tiny random model of the same kind as a given one: what a family does can be tried on it in a moment.

Class and config are the model's own, so layer types, scalings, rotary embeddings and the size of a head stay; widths,
experts and the vocabulary shrink, and windows become shorter than the texts that are tried.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError

VOCAB = 64
WINDOW = 6
#: Parameters that a tiny model may have.
LARGEST = 100_000_000
_SMALL = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "n_group": 1,
    "topk_group": 1,
}
_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "intermediate_size_mlp")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "top_k", "moe_topk")


def text_config(config: PretrainedConfig) -> Any:
    """The part of a config that describes the decoder of text; all of it, in most models."""
    return config.get_text_config(decoder=True)


def kv_heads(config: Any) -> int:
    """KV heads, from the config of a decoder."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: Any) -> int:
    """Numbers in a head, from the config of a decoder."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and their size, from a model's config."""
    config = text_config(config)
    return config.num_hidden_layers, kv_heads(config), head_size(config)


def shrunk(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a tiny model whose decoder has the first layers of this one."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    text = text_config(config)
    for name, part in vars(config).items():
        if isinstance(part, PretrainedConfig) and part is not text:
            _shrink_beside(name, part)
    grouped = kv_heads(text) < text.num_attention_heads
    size, before = head_size(text), text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if name in _SMALL and isinstance(value, int):
            setattr(text, name, _SMALL[name])
        elif name.startswith("linear_num_") and isinstance(value, int):
            setattr(text, name, 2)
        elif name.endswith(_WIDTHS) and isinstance(value, int):
            setattr(text, name, 32)
        elif name in _EXPERTS and isinstance(value, int):
            setattr(text, name, min(value, 4))
        elif name in _CHOSEN and isinstance(value, int):
            setattr(text, name, min(value, 2))
        elif isinstance(value, list | tuple) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    text.num_attention_heads = 2
    text.hidden_size = 2 * size
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = 1 if grouped else 2
    return config


def _shrink_beside(name: str, part: PretrainedConfig) -> None:
    """Make what stands beside the decoder, such as an encoder of images, small; it is not run."""
    for name in ("hidden_size", "intermediate_size"):
        if isinstance(getattr(part, name, None), int):
            setattr(part, name, 32)
    for name in ("num_hidden_layers", "depth", "num_attention_heads"):
        if isinstance(getattr(part, name, None), int):
            setattr(part, name, 2)


def build(model: PreTrainedModel, layers: int, backend: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A tiny model of the model's class and config, in fp32 and eval mode, with weights that make a difference."""
    config = shrunk(model.config, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            size = sum(p.numel() for p in type(model)._from_config(config).parameters())
        if size > LARGEST:
            raise UnsupportedModelError(
                f"no small model of its config can be made to try it on: it would have {size // 10**6} million "
                "parameters"
            )
        with torch.device("cpu"), torch.no_grad():
            twin = type(model)._from_config(config, dtype=torch.float32, attn_implementation=backend)
            for parameter in twin.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.7 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return twin.eval().requires_grad_(False)
