"""Tiny GGUF files, as a converter writes them from a model of transformers and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from ccm.core.twin import head_size


def write_gguf(path: Path, model: Any, tokenizer: Any, architecture: str = "llama") -> None:
    """The model in float32, with the tokenizer and its chat template."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words]
    )
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    known = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = _in_pairs(name, parameter.data, config) if architecture == "llama" else parameter.data
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_pairs(name: str, weight: Tensor, config: Any) -> Tensor:
    """Rows of queries and keys are stored in pairs, as llama.cpp rotates them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if f".{part}." in name:
            pairs = weight.reshape(count, 2, -1, weight.shape[1])
            return pairs.transpose(1, 2).reshape(weight.shape)
    return weight
