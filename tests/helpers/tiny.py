"""Tiny random models of every supported family, for exact tests in fp32.

Their weights are large on purpose: logits are of order 1 to 10 and attention is far from uniform, so that an
error of 1e-4 means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.methods.baselines import BASELINES

VOCAB = 97
SLIDING = 6  # shorter than the rows, and than some segments

# Three layers: in the first, slots do not depend on the text yet, so with two no h(t) would depend on c(t-1).
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": SLIDING}
_BOTH = ["sliding_attention", "full_attention", "sliding_attention"]

_CONFIGS = {
    "llama": (hf.LlamaConfig, _GROUPED),
    "qwen2": (hf.Qwen2Config, _GROUPED),
    "qwen3": (hf.Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "mistral": (hf.MistralConfig, {**_GROUPED, "sliding_window": SLIDING}),
    "gemma2": (hf.Gemma2Config, {**_GEMMA, "layer_types": _BOTH}),
    "gemma3_text": (hf.Gemma3TextConfig, {**_GEMMA, "layer_types": _BOTH}),
    "phi3": (hf.Phi3Config, {**_GROUPED, "pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "gpt_neox": (hf.GPTNeoXConfig, {**_SHAPE, "rotary_pct": 0.5}),
    "olmo2": (hf.Olmo2Config, _GROUPED),
}

#: Every family with every backend that is exact for it.
BACKENDS = {name: ("sdpa", "eager") for name in _CONFIGS} | {"gemma2": ("eager",)}
CASES = [(name, backend) for name in _CONFIGS for backend in BACKENDS[name]]


def tiny_model(
    family: str = "llama", backend: str = "sdpa", seed: int = 0, **changes: Any
) -> hf.PreTrainedModel:
    """A random model in fp32 and eval mode; the same call gives the same weights."""
    cls, settings = _CONFIGS[family]
    config = cls(**{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=backend).eval()
    model.generation_config = hf.GenerationConfig(pad_token_id=0)  # no end token: lengths are known
    return model


_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,  # 3 times 8 is not 32
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
}
_TWO_SIDED = {
    "t5": (hf.T5Config, _T5),
    "mt5": (hf.MT5Config, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": (hf.UMT5Config, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (hf.BartConfig, _BART),
}


def two_sided_model(family: str = "t5", backend: str = "sdpa", **changes: Any) -> hf.PreTrainedModel:
    """A random encoder-decoder in fp32 and eval mode; the same call gives the same weights."""
    cls, settings = _TWO_SIDED[family]
    config = cls(**{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=backend).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:  # T5 does not scale its scores: its queries are small
                    small = 0.35 if family != "bart" and name.endswith(".q.weight") else 1.0
                    weight.normal_(0, 1.2 * small * weight.shape[-1] ** -0.5)
    model.generation_config = hf.GenerationConfig(pad_token_id=0, decoder_start_token_id=0)
    return model


def two_sided_compressor(family: str = "t5", backend: str = "sdpa", **config: Any) -> Compressor:
    """A compressor of an encoder-decoder, with an adapter that matters."""
    model = two_sided_model(family, backend)
    return scramble(Compressor(model, CompressorConfig(**{"slots": 2, "sink": 0, **config})))


def tiny_compressor(
    family: str = "llama", backend: str = "sdpa", model: dict[str, Any] | None = None, **config: Any
) -> Compressor:
    """A compressor with an adapter that matters, on a model of its own with the given settings."""
    base = tiny_model(family, backend, **(model or {}))
    made_by = BASELINES.get(config.get("kind", "ccm"), Compressor)
    return scramble(made_by(base, CompressorConfig(**{"slots": 2, "sink": 0, **config})))


def scramble(compressor: Compressor, seed: int = 5) -> Compressor:
    """Random LoRA weights in place of the initial ones, which change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in compressor.lora_parameters:
            parameter.normal_(0, 0.2, generator=generator)
    return compressor


def random_rows(lengths: Sequence[Sequence[int]], seed: int = 0) -> list[list[list[int]]]:
    """Rows of segments of random token ids with the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in row] for row in lengths]


def pad(segments: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Segments of different lengths as one batch: ids and attention mask, both (B, T)."""
    width = max(map(len, segments))
    ids, mask = torch.zeros(2, len(segments), width, dtype=torch.long)
    for r, segment in enumerate(segments):
        at = slice(0, len(segment)) if side == "right" else slice(width - len(segment), width)
        ids[r, at] = torch.tensor(segment)
        mask[r, at] = 1
    return ids, mask


def history(compressor: Compressor, segments: Sequence[Sequence[int]], **sizes: int) -> Any:
    """The memory after the given segments, one by one."""
    memory = None
    for segment in segments:
        memory = compressor.compress([segment], memory, **sizes)
    return memory


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as words, and a ChatML template."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate([*special, *letters])}, [])
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:],
        chat_template=TEMPLATE,
    )
    return tokenizer


def saved_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """A tiny model and its tokenizer in a folder."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(**{"vocab_size": len(tokenizer), "max_position_embeddings": 512, **changes})
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
