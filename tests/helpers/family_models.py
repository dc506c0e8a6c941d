"""Tiny models of many families, with the traits of real configurations.

What makes a family different is kept: partial rotary embeddings and their scalings, layers that slide or do not
rotate, scaled and capped logits, multipliers, norms of queries and keys, biases, tied embeddings, experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers as hf
from packaging.version import Version

from ccm.models.load import _auto_class

SLIDING = 6
#: The first transformers in which the family attends as the others do; in older ones it is refused.
SINCE = {"nemotron": "5.13"}
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_FULL, _SLIDES = "full_attention", "sliding_attention"


def _rope(kind: str = "default", **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **options}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_LLAMA3["original_max_position_embeddings"] = 64
_YARN = _rope("yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64)


class Traits(NamedTuple):
    """A config class and its settings; ``without`` are those of the common shape that it does not take."""

    config: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    without: tuple[str, ...] = ()


FAMILIES: dict[str, Traits] = {
    "llama": Traits("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mistral": Traits("MistralConfig", {"sliding_window": SLIDING, "head_dim": 16}),
    "ministral": Traits(
        "MinistralConfig",
        {"sliding_window": SLIDING, "layer_types": [_SLIDES, _FULL, _SLIDES], "rope_parameters": _rope()},
    ),
    "ministral3": Traits(
        "Ministral3Config",
        {
            "rope_parameters": {
                **_YARN,
                "rope_type": "yarn",
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2": Traits("Qwen2Config", {"tie_word_embeddings": True}, ("head_dim",)),
    "qwen3": Traits("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2_moe": Traits(
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 32, "norm_topk_prob": False, "mlp_only_layers": [0]},
        ("head_dim",),
    ),
    "qwen3_moe": Traits("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "olmo": Traits("OlmoConfig", {"clip_qkv": 2.0}, ("head_dim",)),
    "olmo2": Traits("Olmo2Config", {}, ("head_dim",)),
    "olmo3": Traits(
        "Olmo3Config",
        {"sliding_window": SLIDING, "layer_types": [_SLIDES, _SLIDES, _SLIDES, _FULL], "num_hidden_layers": 4}
        | {"rope_parameters": {_FULL: {**_YARN, "attention_factor": 1.2}, _SLIDES: _rope()}},
        ("head_dim",),
    ),
    "olmoe": Traits(
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": None},
        ("head_dim",),
    ),
    "flex_olmo": Traits("FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}, ("head_dim",)),
    "gemma": Traits("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Traits(
        "Gemma2Config",
        {
            "sliding_window": SLIDING,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "layer_types": [_SLIDES, _FULL, _SLIDES],
        },
    ),
    "gemma3_text": Traits(
        "Gemma3TextConfig",
        {
            "sliding_window": SLIDING,
            "query_pre_attn_scalar": 12,
            "num_hidden_layers": 6,
            "layer_types": [_SLIDES] * 5 + [_FULL],
            "rope_parameters": {_FULL: _rope("linear", factor=8.0) | {"rope_theta": 1e6}, _SLIDES: _rope()},
        },
    ),
    "vaultgemma": Traits(
        "VaultGemmaConfig",
        {"sliding_window": SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "phi": Traits("PhiConfig", {"rope_parameters": _rope(partial_rotary_factor=0.5)}, ("head_dim",)),
    "phi3": Traits(
        "Phi3Config",
        {"sliding_window": SLIDING, "rope_parameters": _rope(partial_rotary_factor=0.75)},
        ("head_dim",),
    ),
    "gpt_neox": Traits(
        "GPTNeoXConfig",
        {"rope_parameters": _rope(partial_rotary_factor=0.5), "use_parallel_residual": True},
        ("head_dim", "num_key_value_heads"),
    ),
    "starcoder2": Traits("Starcoder2Config", {"sliding_window": SLIDING, "use_bias": True}, ("head_dim",)),
    "mixtral": Traits("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "seed_oss": Traits(
        "SeedOssConfig", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}
    ),
    "apertus": Traits("ApertusConfig", {"rope_parameters": _LLAMA3}, ("head_dim",)),
    "arcee": Traits("ArceeConfig", {"rope_parameters": _YARN}),
    "cohere": Traits("CohereConfig", {"logit_scale": 0.0625, "use_qk_norm": True}, ("head_dim",)),
    "cohere2": Traits(
        "Cohere2Config",
        {
            "logit_scale": 0.25,
            "sliding_window": SLIDING,
            "num_hidden_layers": 4,
            "layer_types": [_SLIDES, _SLIDES, _SLIDES, _FULL],
        },
    ),
    "granite": Traits(
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
        },
        ("head_dim",),
    ),
    "granitemoe": Traits(
        "GraniteMoeConfig",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        ("head_dim",),
    ),
    "granitemoeshared": Traits(
        "GraniteMoeSharedConfig",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
        ("head_dim",),
    ),
    "glm": Traits("GlmConfig", {"rope_parameters": _rope(partial_rotary_factor=0.5), "attention_bias": True}),
    "glm4": Traits(
        "Glm4Config", {"rope_parameters": _rope(partial_rotary_factor=0.5), "attention_bias": True}
    ),
    "glm4_moe": Traits(
        "Glm4MoeConfig",
        {
            "rope_parameters": _rope(partial_rotary_factor=0.5),
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
        },
    ),
    "helium": Traits("HeliumConfig", {}),
    "ernie4_5": Traits("Ernie4_5Config", {"use_bias": True}),
    "ernie4_5_moe": Traits(
        "Ernie4_5_MoeConfig",
        {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}
        | {"moe_num_shared_experts": 1},
        ("head_dim",),
    ),
    "smollm3": Traits(
        "SmolLM3Config",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "rope_parameters": _rope() | {"rope_theta": 5e6},
        },
        ("head_dim",),
    ),
    "exaone4": Traits(
        "Exaone4Config",
        {
            "sliding_window": SLIDING,
            "sliding_window_pattern": 4,
            "num_hidden_layers": 4,
            "layer_types": [_SLIDES, _SLIDES, _SLIDES, _FULL],
            "rope_parameters": _LLAMA3,
        },
        ("head_dim",),
    ),
    "gpt_oss": Traits(
        "GptOssConfig",
        {
            "sliding_window": SLIDING,
            "layer_types": [_SLIDES, _FULL, _SLIDES],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
    "stablelm": Traits(
        "StableLmConfig",
        {"rope_parameters": _rope(partial_rotary_factor=0.25), "use_qkv_bias": True, "qk_layernorm": True}
        | {"use_parallel_residual": True},
        ("head_dim",),
    ),
    "nemotron": Traits("NemotronConfig", {"rope_parameters": _rope(partial_rotary_factor=0.5)}),
    "persimmon": Traits(
        "PersimmonConfig",
        {"rope_parameters": _rope(partial_rotary_factor=0.5), "qk_layernorm": True},
        ("head_dim", "num_key_value_heads"),
    ),
    "afmoe": Traits(
        "AfmoeConfig",
        {
            **_EXPERTS,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "sliding_window": SLIDING,
            "num_hidden_layers": 4,
            "layer_types": [_SLIDES, _SLIDES, _SLIDES, _FULL],
        },
    ),
    "hyperclovax": Traits("HyperCLOVAXConfig", {"logits_scaling": 4.0, "attention_multiplier": 0.25}),
    "cwm": Traits("CwmConfig", {"sliding_window": SLIDING, "rope_parameters": _LLAMA3}),
    "minimax_m2": Traits(
        "MiniMaxM2Config",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
        },
    ),
    "jais2": Traits("Jais2Config", {}),
    "gemma3": Traits("Gemma3Config"),
    "mistral3": Traits("Mistral3Config"),
}

#: Families that are refused, and what was measured.
REFUSED: dict[str, tuple[Traits, str]] = {
    "gpt2": (
        Traits("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, tuple(_SHAPE)),
        "learned absolute positions",
    ),
    "bloom": (Traits("BloomConfig", {"n_layer": 2, "n_head": 4}, tuple(_SHAPE)), "ALiBi"),
    "falcon": (
        Traits("FalconConfig", {"num_kv_heads": 1, "alibi": False}, ("head_dim", "intermediate_size")),
        "of its 3 layers 0 do",
    ),
    # queries and keys are normed after they were turned
    "hunyuan_v1_dense": (
        Traits("HunYuanDenseV1Config", {"rope_parameters": _rope()}),
        r"do not turn with the position as .* they are off by 0\.\d+ of their size",
    ),
    # turns the other way
    "nanochat": (Traits("NanoChatConfig", {}, ("head_dim",)), "do not turn with the position"),
    "deepseek_v3": (
        Traits(
            "DeepseekV3Config",
            {
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
            },
            ("head_dim",),
        ),
        "keys of 2 heads of 24 numbers, and its config says . of 8",
    ),
    "deepseek_v2": (
        Traits(
            "DeepseekV2Config",
            {
                "kv_lora_rank": 16,
                "q_lora_rank": None,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "greedy",
            },
            ("head_dim",),
        ),
        "keys of 2 heads of 24 numbers, and its config says . of 8",
    ),
    "lfm2": (
        Traits("Lfm2Config", {"layer_types": ["conv", "conv", _FULL]}, ("head_dim",)),
        "of its 3 layers 1 do",
    ),
    "qwen3_next": (
        Traits(
            "Qwen3NextConfig", {**_EXPERTS, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16}
        ),
        "recurrent state",
    ),
    "qwen3_5_text": (Traits("Qwen3_5TextConfig", {"num_hidden_layers": 4}), "recurrent state"),
    "falcon_h1": (Traits("FalconH1Config", {"mamba_d_ssm": 32, "mamba_n_heads": 4}), "recurrent state"),
    # its attention chooses keys by an index of its own
    "doge": (
        Traits("DogeConfig", {}, ("head_dim",)),
        r"one parallel pass and the recursion: \d\.\d+ standard deviations",
    ),
}


def _seeing(name: str) -> hf.PretrainedConfig:
    """Classes that read images too: Gemma 3 from 4B up, Mistral Small 3.1."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if name == "gemma3":
        text = family_config("gemma3_text").to_dict()
        return hf.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96
        )
    text, vision = family_config("mistral").to_dict(), {**vision, "model_type": "pixtral"}
    return hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=96)


def family_config(name: str) -> hf.PretrainedConfig:
    """A family's tiny config."""
    if name in ("gemma3", "mistral3"):
        return _seeing(name)
    traits = FAMILIES[name] if name in FAMILIES else REFUSED[name][0]
    shape = {key: value for key, value in _SHAPE.items() if key not in traits.without}
    return getattr(hf, traits.config)(**{**shape, **traits.settings})


def known(name: str) -> bool:
    """Whether the installed transformers has the family, and gives it attention that can be reached."""
    traits = FAMILIES[name] if name in FAMILIES else REFUSED[name][0]
    return hasattr(hf, traits.config) and Version(hf.__version__) >= Version(SINCE.get(name, "5"))


def family_model(name: str, backend: str | None = None, seed: int = 0) -> hf.PreTrainedModel:
    """A random model in fp32 and eval mode; norms, biases and sinks make a difference too."""
    config = family_config(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"attn_implementation": backend} if backend else {}
        model = _auto_class(config).from_config(config, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    return model
