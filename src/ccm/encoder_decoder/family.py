"""What an encoder-decoder model can do: its encoder's attention, what carries the adapter, and where tokens stand."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.families import Family
from ..core.rotary import UNROTATED, Tables
from ..core.ways import Way
from ..errors import UnsupportedModelError

#: Families of the contract tests (``tests/encoder_decoder``), and how their encoders know where a token stands.
POSITIONS = {"t5": "relative", "mt5": "relative", "umt5": "relative", "bart": "learned"}
#: Positions of an encoder that knows distances alone: as many as one likes.
ENDLESS = 2**20


def find(model: PreTrainedModel) -> Family:
    """The model's encoder, as the core describes a decoder.

    Raises:
        UnsupportedModelError: it cannot carry a memory; says why.
    """
    config, kind = model.config, model.config.model_type
    if kind not in POSITIONS:
        raise UnsupportedModelError(
            f"encoder-decoder family {kind!r} is not supported, expected one of {', '.join(POSITIONS)} "
            "(docs/families.md)"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no head that writes words: load the model for conditional generation"
        )
    if kind == "bart" and config.encoder_attention_heads != config.decoder_attention_heads:
        raise UnsupportedModelError(
            f"got {config.encoder_attention_heads} heads in the encoder and {config.decoder_attention_heads} in the "
            "decoder: a memory holds keys and values of one shape"
        )
    encoder = model.get_encoder()
    names = {module: name for name, module in model.named_modules()}
    attention = [m for m in encoder.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    layers = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
    inside = _linear(attention[0])
    return Family(
        body=names[encoder],
        attention=tuple(names[module] for module in attention),
        targets=inside,
        mlp=tuple(name for name in _linear(layers[0]) if name not in inside),
        backends=("sdpa", "eager"),
        way=Way(),
        rotated=(False,) * len(attention),
        outside=rf"(?!{re.escape(names[encoder])}\.).*",
        hands_on=True,
        context=ENDLESS if POSITIONS[kind] == "relative" else config.max_position_embeddings,
    )


def _linear(module: nn.Module) -> tuple[str, ...]:
    found = (name for name, part in module.named_modules() if hasattr(part, "in_features"))
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in found if ".lora_" not in name))


def kv_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads and their size: those of the encoder, then those in which the decoder reads the encoder."""
    config = model.config
    if POSITIONS[config.model_type] == "relative":
        return config.num_layers + config.num_decoder_layers, config.num_heads, config.d_kv
    heads = config.encoder_attention_heads
    return config.encoder_layers + config.decoder_layers, heads, config.d_model // heads


class Unturned:
    """In place of a rotary embedding: keys carry no position, or one that stays."""

    def __init__(self, layers: int):
        self.layer_types = [UNROTATED] * layers

    def tables(self, positions: Tensor) -> dict[str, Tables]:
        """For positions (T,): cos 1 and sin 0, (T, 2), which turn nothing."""
        ones = torch.ones(len(positions), 2, device=positions.device)
        return {UNROTATED: Tables(ones, torch.zeros_like(ones))}

    def stacked(self, positions: Tensor) -> Tables:
        """The same of all layers, (L, 1, T, 2)."""
        cos, sin, _ = self.tables(positions)[UNROTATED]
        shape = len(self.layer_types), 1, -1, -1
        return Tables(cos.expand(shape), sin.expand(shape))


def start_token(model: PreTrainedModel) -> int:
    """What the decoder begins with."""
    for config in (model.generation_config, model.config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(start)
    raise UnsupportedModelError("the model's config has no decoder_start_token_id: set it as its authors say")


def distance_tables(attention: list[nn.Module], most: int) -> list[Tensor | None]:
    """Per layer what it adds to the score of a key, by how far it is from the query: (H, 2 most + 1), or None.

    Layers without a table of their own have that of the one before.
    """
    tables: list[Tensor | None] = []
    for module in attention:
        if getattr(module, "has_relative_attention_bias", False):
            tables.append(module.compute_bias(1, 2 * most + 1, past_seen_tokens=most)[0, :, 0])  # type: ignore[operator]
        else:
            tables.append(tables[-1] if tables else None)
    return tables


def moved(encoder: nn.Module, embeds: Tensor, position: Tensor) -> Tensor:
    """Embeddings (B, Q, d) that stand at positions (B, Q) once the encoder has added those of their columns."""
    table = getattr(encoder, "embed_positions", None)
    if table is None:
        return embeds
    columns = torch.arange(position.shape[1], device=position.device)
    wanted = table(None, position_ids=position.flatten()).view_as(embeds)
    return embeds + (wanted - table(None, position_ids=columns)).to(embeds.dtype)
