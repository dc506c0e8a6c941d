"""What each model family can do. A family that is not here is refused early, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Capabilities of a model family.

    Attributes:
        targets: attention projections that carry the conditional LoRA.
        mlp: feed-forward projections, for recipes that adapt them too.
        backends: attention backends that give the family's exact result, the preferred one first.
    """

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    backends: tuple[str, ...] = ("sdpa", "eager")


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "olmo2": Family(),
    "gemma2": Family(backends=("eager",)),  # soft-capping
    "gemma3_text": Family(),
    "phi3": Family(targets=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")),
    "gpt_neox": Family(
        targets=("query_key_value", "attention.dense"), mlp=("dense_h_to_4h", "dense_4h_to_h")
    ),
}

REFUSED = {
    "bloom": "ALiBi biases are built from the cache index, so slots cannot have places of their own",
    "mpt": "ALiBi biases are built from the cache index, so slots cannot have places of their own",
    "gpt2": "learned absolute positions cannot be taken off a key",
    "opt": "learned absolute positions cannot be taken off a key",
    "mamba": "there are no keys and values to compress",
}


def get_family(model: PreTrainedModel) -> Family:
    """The model's family.

    Raises:
        UnsupportedModelError: unknown or unsuited; says why and what is supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind in FAMILIES:
        return FAMILIES[kind]
    why = REFUSED.get(kind, "it has not passed the contract tests")
    raise UnsupportedModelError(
        f"model family {kind!r} is not supported: {why}; supported are {', '.join(sorted(FAMILIES))}"
    )


def choose_backend(model: PreTrainedModel, family: Family) -> str:
    """The attention backend to wrap: the one the model uses now if it is exact, else the family's first."""
    current = str(model.config._attn_implementation).removeprefix("ccm_")
    return current if current in family.backends else family.backends[0]


def resolve_targets(family: Family, wanted: str | tuple[str, ...]) -> list[str]:
    """Names of the adapted projections: "attention", "all" (attention and feed-forward), or given by name."""
    if wanted == "attention":
        return list(family.targets)
    if wanted == "all":
        return [*family.targets, *family.mlp]
    if isinstance(wanted, str):
        raise ConfigError(f"target_modules: got {wanted!r}, expected 'attention', 'all' or a list of names")
    return list(wanted)
