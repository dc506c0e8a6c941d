"""Which memory a conversation has when nobody names one."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..core.memory import Memory
from ..decoding import install
from ..errors import ConfigError, MemoryFileError, UnknownNameError
from ..files import adapter_folder
from ..files.fingerprint import base_name
from .base import Method
from .bits.packed import Packed
from .compressed import CCM, Compressed, Trained
from .spec import Spec, is_file, parse

log = logging.getLogger(__name__)

#: Stands for the best memory that there is for a model.
DEFAULT = "default"
#: The shipped adapter for conversations; it is taken for the model that it was trained on.
ADAPTER = "ccm-chat"
#: The same adapter in ``ccm chat``: a question also reads the old words that it asks for. It names more of what was
#: told (docs/decisions.md, measured), and a turn takes a third longer.
TALKING = "slots-and-words"
#: The best memory that needs no training.
UNTRAINED = "attention-matching"
#: The same where no tokens show what they ask for: of encoder-decoders.
UNASKED = "streaming-llm"
#: What an adapter keeps beside its slots in a conversation: the first tokens as attention sink, the newest turns raw.
CHAT = {"sink": 4, "window": 64}


def default_memory(model: PreTrainedModel) -> str:
    """The best memory for a model: the adapter that was trained for it, else one that needs no training.

    In conversations the adapter keeps as much as the others, and facts far longer (docs/decisions.md, measured).
    """
    if adapter_folder.is_for(ADAPTER, model):
        return ADAPTER
    return UNASKED if model.config.is_encoder_decoder else UNTRAINED


def checked(memory: str | Spec | None) -> Spec:
    """A memory as it is written, None for the default. Raises before a model is loaded what can be told without one.

    Raises:
        UnknownNameError: no such method, and no such adapter.
        ConfigError: it is not written as expected, or an option that cannot be used.
    """
    spec = memory if isinstance(memory, Spec) else parse(DEFAULT if memory is None else memory)
    if spec.name != DEFAULT:
        _holding(spec.method())
    return spec


def _holding(method: Method) -> Method:
    """Raises ConfigError for a memory that would have room for nothing."""
    if not isinstance(_inner(method), Trained) and method.name != "none" and method.limit == 0:
        raise ConfigError(
            f"method {method.name} keeps nothing with {method.text}: give it a window, or take none (no memory)"
        )
    return method


def _inner(method: Method) -> Method:
    """The method, or the one that it packs."""
    return method.inner if isinstance(method, Packed) else method


def named(spec: Spec, model: PreTrainedModel) -> Spec:
    """The memory that is meant: the best one for the model where it is the default."""
    if spec.name != DEFAULT:
        return spec
    best = default_memory(model)
    return replace(spec, text=best + spec.text.removeprefix(DEFAULT), name=best)


def for_talking(spec: Spec, model: PreTrainedModel) -> Spec:
    """The memory that ``ccm chat`` takes: :data:`TALKING` where the default would be its adapter."""
    if spec.name != DEFAULT or default_memory(model) != ADAPTER:
        return spec
    return replace(spec, text=TALKING + spec.text.removeprefix(DEFAULT), name=TALKING)


def with_window(method: Method) -> Method:
    """The same method; an adapter that does not say otherwise has the sink and the window of :data:`CHAT`."""
    if not isinstance(_inner(method), Compressed):
        return method
    sizes: dict[str, Any] = {name: n for name, n in CHAT.items() if getattr(method, name) is None}
    return replace(method, **sizes)


def open_method(memory: str | Spec | None, model: PreTrainedModel, tokenizer: Any = None) -> Method:
    """A memory for conversations, on a model.

    An adapter that does not say otherwise keeps a sink and a window beside its slots (:data:`CHAT`).

    Args:
        memory: as it is written, such as "snapkv:tokens=256", "ccm-chat", "./my-adapter" or "./mine.py"; None or
            "default" is the best one for the model, and the log says so if it was not trained for it.
        model: of a supported family.
        tokenizer: of the model, for methods that look at text.

    Raises:
        ConfigError: it is not written as expected, there is no such method, or an option that cannot be used.
        MismatchError: an adapter for another model.
        UnsupportedModelError: the model cannot carry a memory.
    """
    asked = checked(memory)
    spec = named(asked, model)
    bound = with_window(_holding(spec.method())).bind(model, tokenizer)
    check_fits(bound)
    if asked.name == DEFAULT and spec.name != ADAPTER:
        log.warning(
            "no adapter was trained for %s: its memory is %s, which needs no training; to train one, which may "
            "keep more: ccm train --init %s --out recipe.yaml",
            base_name(model),
            spec.text,
            model.name_or_path or "MODEL",
        )
    install(model)
    return bound


def check_fits(method: Method) -> None:
    """Raises ConfigError unless a method's full memory and one more segment fit the context of its model."""
    needed = (method.limit or 0) + method.longest + method.behind
    if needed > method.reader.context:
        raise ConfigError(
            f"method {method.text}: the memory grows to {method.limit} positions, {needed} with the next segment, "
            f"and the model's context is {method.reader.context}: give it fewer"
        )


def saved_memory(path: str | os.PathLike[str]) -> Spec:
    """Which memory a saved session has; an older file does not say, its is that of an adapter.

    Raises:
        MemoryFileError: as :meth:`ccm.Session.load`.
        ConfigError: the memory is not known here, or is one of a Python file: those are run if one is named.
    """
    metadata = Memory.load(path)[1]
    try:
        spec = parse(json.loads(metadata["session"]).get("memory", ADAPTER))
    except (KeyError, AttributeError, ValueError) as error:
        raise MemoryFileError(f"{path} holds a memory but no session ({error})") from error
    if spec.name == CCM.name:  # of an adapter that was never saved
        return parse(ADAPTER)
    if is_file(spec.name):
        raise ConfigError(
            f"{path} names the file {spec.name}, which is only run if you name it: give it by --memory"
        )
    try:
        spec.method()
    except UnknownNameError as error:
        raise ConfigError(
            f"{path} was saved with {spec.text}, and no such method is known here: give it by --memory ./FILE.py"
        ) from error
    return spec
