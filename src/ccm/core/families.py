"""What a model can do, found on the model itself; the tables here hold what cannot be seen.

A tiny model of the same class and config (``ccm.core.twin``) runs one token at two positions, with an attention
function that looks on: which modules attend, what they hand over, and how their keys turn with the position. A family
that the contract tests do not cover must then pass the contract on the spot (``ccm.core.trial``). What fails is
refused early, with what was measured.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import ConfigError, UnsupportedModelError
from . import trial, twin
from .attention import PLAN
from .rotary import Tables, rotate, unrotate
from .ways import WAYS, Way, find, per_layer

log = logging.getLogger(__name__)

_NAMES = (
    "llama mistral ministral ministral3 qwen2 qwen3 qwen2_moe qwen3_moe olmo olmo2 olmo3 olmoe flex_olmo "
    "gemma gemma2 gemma3_text vaultgemma phi phi3 gpt_neox starcoder2 mixtral seed_oss apertus arcee "
    "cohere cohere2 granite granitemoe granitemoeshared glm glm4 glm4_moe helium ernie4_5 ernie4_5_moe "
    "smollm3 exaone4 gpt_oss stablelm nemotron persimmon afmoe hyperclovax cwm minimax_m2 jais2 gemma3 mistral3"
)
#: Families of the contract tests (``tests/core/test_families.py``); any other is tried when it is first met.
TESTED = frozenset(_NAMES.split())

REFUSED = {
    "bloom": "ALiBi biases are built from the cache index, so slots cannot have places of their own",
    "mpt": "ALiBi biases are built from the cache index, so slots cannot have places of their own",
    "gpt2": "learned absolute positions cannot be taken off a key",
    "opt": "learned absolute positions cannot be taken off a key",
    "mamba": "there are no keys and values to compress",
}

#: The position at which keys are looked at, beside 0.
_POSITION = 37
#: By how much of its size something may miss what it should be.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Family:
    """What was found on a model.

    Attributes:
        body: name of the decoder inside the model.
        attention: names of the attention modules, layer by layer.
        targets: attention projections that carry the conditional LoRA.
        mlp: feed-forward projections, for recipes that adapt them too; empty for mixtures of experts.
        backends: attention backends that give the family's exact result, the preferred one first.
        way: how keys rotate.
        rotated: for each layer, whether its keys do.
        outside: a pattern of the modules that are no projections although they are called so, if there are any.
        hands_on: whether layers hand the arguments that they do not know to their attention.
        context: most positions; behind them some families make queries longer.
    """

    body: str
    attention: tuple[str, ...]
    targets: tuple[str, ...]
    mlp: tuple[str, ...]
    backends: tuple[str, ...]
    way: Way
    rotated: tuple[bool, ...]
    outside: str | None
    hands_on: bool
    context: int


# ---------------------------------------------------------------------- looking on


class _Call(NamedTuple):
    """What an attention module hands to the attention function."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


_lock = threading.RLock()
_calls: list[_Call] = []
_found: dict[str, Family | str] = {}  # or why there is none


def _look(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Any:
    """Attention of one token to itself, which is the same at every position."""
    _calls.append(_Call(module, query, key, value, options))
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


@torch.no_grad()
def _watch(model: PreTrainedModel, position: int) -> list[_Call]:
    """One token at a position."""
    _calls.clear()
    at = torch.tensor([[position]])
    model(input_ids=torch.full_like(at, 5), position_ids=at, use_cache=False, **{PLAN: None})
    return list(_calls)


def _measure(model: PreTrainedModel) -> Family:
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            "its layers keep a recurrent state, which is no keys and values to compress"
        )
    config = twin.text_config(model.config)
    layers = config.num_hidden_layers
    small = twin.build(model, layers)
    AttentionInterface.register("ccm_look", _look)
    AttentionMaskInterface.register("ccm_look", sdpa_mask)
    small.set_attn_implementation("ccm_look")
    here, there = _watch(small, 0), _watch(small, _POSITION)
    indices = [int(getattr(call.module, "layer_idx", -1)) for call in here]
    if indices != list(range(layers)):
        raise UnsupportedModelError(
            "all layers must attend once through transformers' attention interface, and keep keys and values; of its "
            f"{layers} layers {len(set(indices))} do, {len(indices)} times in all"
        )
    names = {module: name for name, module in small.named_modules()}
    attention = tuple(names[call.module] for call in here)
    # such as body.layers.0.self_attn
    body = attention[0].rsplit(".", 3)[0]
    config = twin.text_config(small.config)
    _check_shapes(here, config)
    way, rotated = _rotation(small.get_submodule(body), config, here, there)
    targets, mlp, outside = _projections(
        small, [small.get_submodule(name.rsplit(".", 1)[0]) for name in attention], here
    )
    return Family(
        body=body,
        attention=attention,
        targets=targets,
        mlp=mlp,
        backends=_backends(small, here),
        way=way,
        rotated=rotated,
        outside=outside,
        hands_on=all(PLAN in call.options for call in here),
        context=_context(small, int(config.max_position_embeddings)),
    )


def _check_shapes(calls: Sequence[_Call], config: Any) -> None:
    expected = twin.kv_heads(config), twin.head_size(config)
    for layer, call in enumerate(calls):
        for what, states in (("keys", call.key), ("values", call.value)):
            if (got := (states.shape[1], states.shape[3])) != expected:
                raise UnsupportedModelError(
                    f"layer {layer} has {what} of {got[0]} heads of {got[1]} numbers, and its config says "
                    f"{expected[0]} of {expected[1]}: a memory holds keys and values of one shape"
                )


def _rotation(
    body: nn.Module, config: Any, here: Sequence[_Call], there: Sequence[_Call]
) -> tuple[Way, tuple[bool, ...]]:
    """How keys turn between two positions, and in which layers."""
    module = find(body)
    kinds = per_layer(module, config)
    moved = [_misses(before.key, after.key) > _TOLERANCE for before, after in zip(here, there, strict=True)]
    worst: dict[Way, tuple[float, int]] = {way: (0.0, 0) for way in WAYS}
    for layer, kind in enumerate(kinds):
        if moved[layer]:
            for way in WAYS:
                error = _error_of(way, module, kind, here[layer].key, there[layer].key)
                worst[way] = max(worst[way], (error, layer))
    best = min(worst, key=lambda way: worst[way][0])
    if worst[best][0] > _TOLERANCE:
        error, layer = worst[best]
        raise UnsupportedModelError(
            f"its keys do not turn with the position as its rotary embedding says: in layer {layer} they are off by "
            f"{error:.2g} of their size in the best of {len(WAYS)} ways that are known"
        )
    if not any(moved):
        raise UnsupportedModelError("its keys do not depend on the position")
    return best, tuple(moved)


def _error_of(way: Way, module: nn.Module, kind: str | None, before: Tensor, after: Tensor) -> float:
    """How far keys at position 0, turned this way, are from those at the other one."""
    tables = []
    for position in (0, _POSITION):
        at = torch.tensor([[position]])
        cos, sin = module(before, at) if kind is None else module(before, at, kind)
        cos, sin = way.expand(cos.unsqueeze(1)), way.expand(sin.unsqueeze(1))
        if cos.shape[-1] > before.shape[-1]:
            return float("inf")
        tables.append(Tables(cos, sin, way.pairs == "interleaved"))
    return _misses(after, rotate(unrotate(before, *tables[0]), *tables[1]))


def _context(model: PreTrainedModel, most: int) -> int:
    """The positions at which queries are as long as at the first one: they may be moved from one to another."""
    sizes = [call.query.norm() for call in _watch(model, 0)]

    def alike(position: int) -> bool:
        found = (call.query.norm() for call in _watch(model, position))
        return all(abs(a / b - 1) < _TOLERANCE for a, b in zip(found, sizes, strict=True))

    if alike(most - 1):
        return most
    low, high = 0, most - 1  # alike at low, not at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if alike(middle) else (low, middle)
    return high


def _misses(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def _projections(
    model: nn.Module, layers: Sequence[nn.Module], calls: Sequence[_Call]
) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Linear layers of the attention modules, of the feed-forward blocks, and a pattern of others of these names.

    They are named as PEFT matches them: by the end of their path, as short as can be.
    """
    inside: dict[str, None] = {}
    beside: dict[str, None] = {}
    for layer, call in zip(layers, calls, strict=True):
        own = set(call.module.modules())
        linear = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        inside |= {n: None for n, m in linear.items() if m in own}
        beside |= {n: None for n, m in linear.items() if m not in own}
    # experts see some of the tokens, in an order of their own: they cannot be told which of them make slots
    mixture = any(p.ndim == 3 or ".experts." in n for layer in layers for n, p in layer.named_parameters())

    def short(names: dict[str, None], others: dict[str, None]) -> tuple[str, ...]:
        taken = {_last(name) for name in others}
        return tuple(dict.fromkeys(n if _last(n) in taken else _last(n) for n in names))

    targets, mlp = short(inside, beside), () if mixture else short(beside, inside)
    if mixture:  # PEFT takes what is called like a projection of an expert for one
        targets = tuple(name for name in targets if "." not in name)
    names = {module: name for name, module in model.named_modules()}
    within = names[layers[0]].rsplit(".", 1)[0] + "."
    strays = [n for n in names.values() if _last(n) in map(_last, targets + mlp) and not n.startswith(within)]
    return targets, mlp, rf"(?!{re.escape(within)}).*" if strays else None


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _backends(model: PreTrainedModel, calls: Sequence[_Call]) -> tuple[str, ...]:
    """Fused attention knows neither soft caps nor learned sinks."""
    found = []
    plain = all(call.options.get(name) is None for call in calls for name in ("softcap", "s_aux"))
    if plain and model._supports_sdpa:
        found.append("sdpa")
    if all(hasattr(sys.modules[type(call.module).__module__], "eager_attention_forward") for call in calls):
        found.append("eager")
    if not found:
        raise UnsupportedModelError("none of its attention backends is known to be exact")
    return tuple(found)


def _try(model: PreTrainedModel, kind: str, family: Family) -> None:
    """Let a tiny model of a family that nobody tested pass the contract, with one layer of each kind at least."""
    config = twin.text_config(model.config)
    listed = [
        v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == len(family.rotated)
    ]
    signs = list(zip(family.rotated, *(map(str, values) for values in listed), strict=True))
    layers = max(3, *(signs.index(sign) + 1 for sign in signs))
    small = twin.build(model, min(layers, len(signs)), choose_backend(model, family), seed=1)
    _found.setdefault(_key(small), _measure(small))  # it is not tried itself
    outcome = trial.measure(small)
    outcome.check()
    log.warning(
        "model family %r is not one of those that are tested (docs/families.md); a small model of its config was "
        "tried and is exact: with %d layers, parallel and recurrent logits differ by %.1g of their spread, a raw "
        "window and the plain model by %.1g",
        kind,
        layers,
        max(outcome.parallel, outcome.window),
        outcome.plain,
    )


# ---------------------------------------------------------------------- what others ask


def get_family(model: PreTrainedModel) -> Family:
    """What the model can do; found once for each config in a process.

    Raises:
        UnsupportedModelError: it cannot carry a memory; says why, with what was measured.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a model of transformers: give the one that it wraps (of PEFT: "
            "model.merge_and_unload())"
        )
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise _refusal(kind, "an encoder-decoder works in Session, ccm chat, train and eval alone")
    if kind in REFUSED:
        raise _refusal(kind, REFUSED[kind])
    key = _key(model)
    with _lock:
        if key not in _found:
            try:
                family = _found[key] = _measure(model)
                if kind not in TESTED:
                    _try(model, kind, family)
            except UnsupportedModelError as error:
                _found[key] = str(error)
            except Exception as error:  # whatever an unknown class does to a config that it was not made for
                _found[key] = f"a small model of its config fails with {type(error).__name__}: {error}"
        found = _found[key]
    if isinstance(found, str):
        raise _refusal(kind, found)
    return found


def _key(model: PreTrainedModel) -> str:
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "dtype")}
    return type(model).__name__ + json.dumps(config, sort_keys=True, default=str)


def _refusal(kind: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model family {kind!r} is not supported: {why} (docs/families.md says which are)"
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
        if not family.mlp:
            raise ConfigError("target_modules: got 'all', expected 'attention': the feed-forward has experts")
        return [*family.targets, *family.mlp]
    if isinstance(wanted, str):
        raise ConfigError(f"target_modules: got {wanted!r}, expected 'attention', 'all' or a list of names")
    return list(wanted)
