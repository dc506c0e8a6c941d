"""Made-up facts with exact answers: many that are easily confused, and some that change over time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...chat.turns import render_dialogue
from ...data import needles, updates
from ...data.probes import History, Probe
from ...data.sources import number
from ...errors import ConfigError
from ..items import Choice, Generation, Item
from .base import EvalTask, register_task
from .choosing import ask, check_steps, choice, encode


def _check(steps: tuple[int, ...], messages: int) -> None:
    check_steps(steps, 1)
    if steps[-1] > messages:
        raise ConfigError(
            f"steps is {steps!r}: expected at most {messages}, which is how many messages there are"
        )


def _messages(history: History, tokenizer: Any, count: int) -> tuple[tuple[int, ...], ...]:
    told = render_dialogue(tokenizer, [("user", message) for message in history.messages[:count]])
    return tuple(turn.ids for turn in told)


def _prompt(probe: Probe, tokenizer: Any) -> tuple[int, ...]:
    return ask(tokenizer, probe.question, probe.stem)


def _choice(probe: Probe, tokenizer: Any) -> Choice:
    options = [encode(tokenizer, f" {option}") for option in probe.options]
    return choice(_prompt(probe, tokenizer), options, probe.options.index(probe.value), tag=probe.kind)


def _generation(probe: Probe, tokenizer: Any) -> Generation:
    """As many tokens as the value has: after the stem, "Houston, Texas." is right for "Houston"."""
    tokens = len(encode(tokenizer, f" {probe.value}"))
    return Generation(_prompt(probe, tokenizer), (probe.value,), tokens, tag=probe.kind)


@register_task
@dataclass(frozen=True)
class Needles(EvalTask):
    """Facts about four people who share their names, one a segment; some of those told so far are asked for.

    Each is chosen among the four people's values and four of nobody, and written. The tag is the kind of fact.

    Attributes:
        steps: segments that have been told, 16 at most.
        facts: asked for at every step.
    """

    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    facts: int = 2

    name, title = "needles", "Facts that are easily confused: numbers, names, places, preferences"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "em", "f1")
    licence, origin = "Apache-2.0 (made up)", "generated, seeded"

    def __post_init__(self) -> None:
        _check(self.steps, needles.MESSAGES)
        number("facts", self.facts, 1)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for k in range(limit):
            history, rng = needles.needles(k), random.Random(k)
            queries: dict[int, tuple[Choice | Generation, ...]] = {}
            for t in self.steps:
                probes = rng.sample(history.probes[t], min(self.facts, len(history.probes[t])))
                queries[t] = tuple(
                    query
                    for probe in probes
                    for query in (_choice(probe, tokenizer), _generation(probe, tokenizer))
                )
            yield Item(f"needles {k}", _messages(history, tokenizer, self.steps[-1]), queries)


@register_task
@dataclass(frozen=True)
class Updates(EvalTask):
    """Facts that change, one message a segment; one of every kind is asked for as it is now.

    The choice is among the value that holds, those that did, and others. The tag is the kind of fact: "name",
    "number", "preference", or "order" (which event was first, or came after another; from the second on).

    Attributes:
        steps: segments that have been told, 16 at most.
    """

    steps: tuple[int, ...] = (1, 2, 4, 8, 16)

    name, title = "updates", "Facts that change over time: names, numbers, preferences, order of events"
    metrics = ("accuracy",)
    licence, origin = "Apache-2.0 (made up)", "generated, seeded"

    def __post_init__(self) -> None:
        _check(self.steps, updates.MESSAGES)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for k in range(limit):
            history = updates.updates(k)
            queries = {t: tuple(_choice(probe, tokenizer) for probe in history.probes[t]) for t in self.steps}
            yield Item(f"updates {k}", _messages(history, tokenizer, self.steps[-1]), queries)
