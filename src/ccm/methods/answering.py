"""An answer, written by the model behind what a method keeps of a conversation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..chat.answers import Answer, AnswerReader
from ..chat.template import Template, answer_ends
from ..chat.writer import Streamed, Writer
from ..core.memory import Memory
from ..core.reader import Known
from ..errors import ConfigError
from ..models.generation import NAMES, drawing, own_drawing
from . import Method

log = logging.getLogger(__name__)

#: Positions left free behind an answer that fills the context: for what the template ends it with.
BEHIND = 16
#: Settings that are read here, and so are looked for in a ``generation_config``, too.
_COUNTS = ("max_new_tokens", "num_beams", "num_return_sequences")


def written(
    method: Method,
    memory: Memory,
    template: Template,
    head: Sequence[int],
    tools: bool,
    streamer: Any,
    generate_kwargs: Mapping[str, Any],
) -> tuple[Answer, Known | None]:
    """An answer behind its head; neither becomes part of the memory.

    Args:
        method: bound to the model.
        memory: of one conversation.
        template: of the model.
        head: token ids that the answer is written behind.
        tools: whether calls of tools are looked for.
        streamer, generate_kwargs: as of :meth:`ccm.Session.generate`.

    Returns:
        the answer, and what was read to write it; None with beams and several answers.

    Raises:
        ConfigError: the memory leaves no room for an answer.
    """
    reader, tokenizer = method.reader, template.tokenizer
    ends, texts = answer_ends(tokenizer, reader.model)
    answer = AnswerReader(template, tuple(head), tools)
    stream = Streamed(Writer(template.decode, texts), answer, ends, streamer)
    options: dict[str, Any] = {
        "max_new_tokens": 256,
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer": tokenizer,  # for stop_strings
        **_drawn(reader.model, generate_kwargs),
    }
    recalled = method.recall(memory)
    options["max_new_tokens"] = _fitting(method, recalled.length, len(head), options["max_new_tokens"])
    if texts:
        options["stopping_criteria"] = [*options.get("stopping_criteria", ()), stream.stops]
    options["return_dict_in_generate"] = False
    beams = options.get("num_beams") or 1  # a streamer cannot follow several
    several = beams > 1 or (options.get("num_return_sequences") or 1) > 1
    options = _in_one(options)
    if several:
        out = reader.generate([list(head)], recalled, streamer=None if beams > 1 else stream, **options)
        if beams > 1:
            for token in out[0, len(head) :].tolist():
                stream.add(token)
            stream.end()
        return replace(answer.answer, cut=not stream.ended), None
    out, kv = reader.write(head, recalled, streamer=stream, **options)
    known = None if kv is None else Known(memory, tuple(out[0, : kv.length].tolist()), kv)
    return replace(answer.answer, cut=not stream.ended), known


def _drawn(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and how tokens are drawn. A whole ``generation_config`` says all of it; beams are not drawn."""
    if (config := given.get("generation_config")) is not None:
        counts = {name: getattr(config, name, None) for name in _COUNTS}
        return {**{name: count for name, count in counts.items() if count is not None}, **given}
    beams = (given.get("num_beams") or 1) > 1
    drawn = drawing(own_drawing(model), {"do_sample": False if beams else None, **given})
    rest = {name: value for name, value in given.items() if name not in NAMES}
    return {**rest, **drawn.generate_kwargs()}


def _in_one(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, those of a ``generation_config`` inside it: transformers takes it or them, not both."""
    if (config := options.pop("generation_config", None)) is None:
        return options
    config = copy.deepcopy(config)
    return {**config.update(**options), "generation_config": config}


def _fitting(method: Method, held: int, head: int, wanted: int) -> int:
    """So many new tokens, or those for which there is room beside the memory and the head of the answer."""
    context = method.reader.context
    room = context - held - head - BEHIND - method.behind
    if room < 1:
        raise ConfigError(
            f"the memory of {held} positions leaves no room for an answer in the model's context of {context}: "
            "begin a new session, or use a rule that merges (mean, bounded)"
        )
    if wanted > room:
        log.warning(
            "max_new_tokens: got %d, the model's context of %d has room for %d: a longer answer is cut there",
            wanted,
            context,
            room,
        )
    return min(wanted, room)
