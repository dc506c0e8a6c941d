"""Decoding: one token of an answer at a time, near what the memory of the machine allows.

A model gets a step of its own (:mod:`ccm.decoding.step`) in place of its forward pass, where that pass is one token
of every row over a cache that holds memories. A pass of another kind takes the ordinary way, and so does a model of
another shape, which is told by the numbers: the step must give the logits that the model gives.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.attention import PLAN, Plan, RecurrentPlan
from ..core.devices import is_spread
from ..core.families import choose_backend, get_family
from ..core.reader import Reader
from ..core.room import CACHE, Roomy
from ..core.twin import VOCAB, build
from ..models.placement import AUTO, GRAPH, OWN, can_pack
from . import layers
from .graph import Graphed
from .shape import Unfit, check, misses
from .step import Step

log = logging.getLogger(__name__)

#: By how many standard deviations of the logits a step may miss the ordinary pass, by the type of the model.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
#: The same for copies of the weights.
ROUNDED = {"float16": 0.05, "int8": 3.0}
#: Passes of a model after which its step is given up. It is tried at the first, second, fourth and so on.
PASSES = 128
#: Bytes that a copy takes for each weight.
COPIES = {"float16": 2, "int8": 1}
#: Where "auto" makes a copy: of models with at most so many weights, which takes two bytes for each.
SMALL = 1_000_000_000
_MARK = "_ccm_decoder"
_KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", PLAN}
#: Arguments that change nothing with these values; others do not with None or False.
_IDLE: dict[str, tuple[Any, ...]] = {"use_cache": (True,), "return_dict": (True,), "logits_to_keep": (0, 1)}


def install(model: PreTrainedModel) -> None:
    """Let a model decode by a step of its own, from when it first decodes.

    ``ccm_decode_in`` on the model, which ``load_model`` puts there, says from which weights.
    """
    if model.config.is_encoder_decoder or is_spread(model) or "forward" in model.__dict__:
        return
    own = type(model).forward

    @wraps(own)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        out = None if args else self.__dict__[_MARK].run(self, kwargs)
        return own(self, *args, **kwargs) if out is None else out

    model.__dict__[_MARK] = Decoder()
    model.__dict__["forward"] = MethodType(forward, model)


class _Call(NamedTuple):
    """What a step is called with."""

    ids: Tensor
    position: Tensor
    valid: Tensor
    plan: RecurrentPlan
    cache: Any


class Decoder:
    """The steps of one model, by its adapters, type and device; None where it takes the ordinary way."""

    def __init__(self) -> None:
        self._steps: dict[Any, Step | Graphed | None] = {}
        self._trials: dict[Any, _Trial] = {}
        self._model: weakref.ref[PreTrainedModel] | None = None  # whose layers read copies

    def __reduce__(self) -> Any:  # a copy of a model proves its own
        return Decoder, ()

    def run(self, model: PreTrainedModel, kwargs: Mapping[str, Any]) -> Any:
        """The output of a forward pass, None if it is to take the ordinary way."""
        call = _call(kwargs)
        if call is None:
            return None
        key = _key(model)
        if key not in self._steps:
            self._try(key, model, call, kwargs)
        step = self._steps.get(key)
        if step is None:
            return None
        out = step(*call)
        for name in ("cache", "past_key_values"):  # as this release of transformers calls it
            if name in kwargs:
                setattr(out, name, kwargs[name])
        return out

    def _try(self, key: Any, model: PreTrainedModel, call: _Call, kwargs: Mapping[str, Any]) -> None:
        try:
            if key not in self._trials:
                self._trials[key] = _Trial(model)
            trial = self._trials[key]
            if not trial.passed(model, call, kwargs):
                return
            graph = getattr(model, "ccm_decode_in", OWN) == GRAPH
            self._steps[key] = Graphed(trial.step, TOLERANCE[model.dtype]) if graph else trial.step
            if decodes_from(model) == "float16" and not self._model:
                self._model = weakref.ref(model)
                layers.install(_layers(model))
                body = model.get_submodule(get_family(model).body)
                body.register_forward_pre_hook(self._bring, with_kwargs=True)
        except Unfit as reason:
            asked = getattr(model, "ccm_decode_in", OWN) not in (AUTO, OWN)
            level = logging.WARNING if asked else logging.INFO
            log.log(level, "%s decodes by its own forward pass: %s", model.config.model_type, reason)
            self._steps[key] = None
        self._trials.pop(key, None)

    def _bring(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook before a pass: its layers run by the step, if that is proved and nothing else is asked of them.

        The products of other types than float32 are as quick as those of a copy.
        """
        plan: Plan | None = kwargs.get(PLAN)
        model = None if self._model is None else self._model()
        if plan is None or model is None or model.__dict__.get(_MARK) is not self:
            return
        plain = not args and not torch.is_grad_enabled() and _says_nothing(kwargs, _KNOWN | {"inputs_embeds"})
        plan.step = self._steps.get(_key(model)) if plain and model.dtype == torch.float32 else None


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_submodule(name.rsplit(".", 1)[0]) for name in get_family(model).attention]


def _key(model: PreTrainedModel) -> Any:
    return len(getattr(model, "peft_config", ())), model.dtype, model.device


def _call(kwargs: Mapping[str, Any]) -> _Call | None:
    """Of the arguments of a forward pass, if it is one for a step."""
    if torch.is_grad_enabled():
        return None
    cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
    ids, position, valid, plan = (
        kwargs.get(name) for name in ("input_ids", "position_ids", "attention_mask", PLAN)
    )
    if not (isinstance(ids, Tensor) and ids.shape[1] == 1 and isinstance(plan, RecurrentPlan)):
        return None
    if plan.gate is not None or plan.asked is not None or plan.stop_at != -1:
        return None
    if not _says_nothing(kwargs):
        return None
    entries = getattr(cache, "layers", [])
    if not entries or any(type(layer) is not Roomy for layer in entries):
        return None
    if (held := entries[0].get_seq_length()) == 0:
        return None
    if valid is None:  # ``generate`` leaves it out where nothing is padding
        valid = ids.new_ones(len(ids), held + 1)
    fits = isinstance(position, Tensor) and isinstance(valid, Tensor) and position.shape == ids.shape
    if not fits or valid.shape != (len(ids), held + 1):
        return None
    return _Call(ids, position, valid, plan, cache)


def _says_nothing(kwargs: Mapping[str, Any], beside: AbstractSet[str] = _KNOWN) -> bool:
    """Whether arguments of a pass change nothing, beside those that are known."""
    others = ((name, kwargs[name]) for name in kwargs.keys() - beside)
    return all(
        value is None or value is False or (isinstance(value, int) and value in _IDLE.get(name, ()))
        for name, value in others
    )


def decodes_from(model: PreTrainedModel) -> str | None:
    """The copy of its weights that a model decodes from; None: the weights themselves."""
    wanted: str = getattr(model, "ccm_decode_in", OWN)
    if wanted != AUTO:
        return None if wanted in (OWN, GRAPH) else wanted
    small = can_pack(model.device) and model.num_parameters() <= SMALL
    return "float16" if small and model.dtype in (torch.float32, torch.bfloat16) else None


class _Trial:
    """A step that has not given the logits of its model yet.

    A tiny model of its config shows that it is written out right, with padding, memories and windows; the model
    itself that its weights are. Behind some tokens a model turns the rounding of a copy into more than is allowed,
    so one miss is no verdict.

    Raises:
        Unfit: the model has another shape.
    """

    def __init__(self, model: PreTrainedModel):
        weights = decodes_from(model)
        self.step = Step(model, weights)
        check(_tried(model), TOLERANCE[torch.float32])
        self._most = max(TOLERANCE[model.dtype], ROUNDED.get(weights or "", 0))
        self._passes = 0

    def passed(self, model: PreTrainedModel, call: _Call, kwargs: Mapping[str, Any]) -> bool:
        """Whether the step gives the logits of this pass. Raises Unfit at the last of its passes."""
        self._passes += 1
        if self._passes & (self._passes - 1):  # no power of two
            return False
        right = type(model).forward(model, **kwargs).logits
        _back(call.cache)
        found = self.step(*call).logits
        _back(call.cache)
        error = misses(found, right)
        if self._passes >= PASSES:
            check(error, self._most)
        return error < self._most


@torch.no_grad()
def _tried(model: PreTrainedModel) -> float:
    """By how much the step of a tiny model misses its forward pass."""
    family = get_family(model)
    kinds = [(layer.shape.near, layer.kind) for layer in Step(model).layers]
    depth = max(kinds.index(kind) + 1 for kind in kinds)
    small = build(model, max(2, depth), choose_backend(model, family))
    reader, step = Reader(small), Step(small)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, 16), generator=generator)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    live, call = reader.live(reader.empty(2)).ahead(mask)
    small(input_ids=ids[:, :12], **call)
    live.is_memory[:, 5:7] = True
    worst = 0.0
    for column in range(12, 16):
        live, call = live.ahead(mask.new_ones(2, 1))
        token, cache = ids[:, column : column + 1], call[CACHE]
        found = step(token, call["position_ids"], call["attention_mask"], call[PLAN], cache).logits
        _back(cache)
        worst = max(worst, misses(found, small(input_ids=token, **call).logits))
    layers.install(_layers(small))
    live, call = live.ahead(mask.new_ones(2, 4))
    call[PLAN].step = step
    found = small(input_ids=ids[:, :4], **call).logits
    _back(call[CACHE], 4)
    call[PLAN].step = None
    return max(worst, misses(found, small(input_ids=ids[:, :4], **call).logits))


def _back(cache: Any, tokens: int = 1) -> None:
    for layer in cache.layers:
        layer.back(tokens)
