"""How a conversation is written down: in the model's own chat template, or as plain text of many kinds.

A *style* is one way with everything that is drawn for one row: names of speakers, marks, a system prompt. It writes
turns one by one, as a session folds them; what is scored are the words that are said and what ends the turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat.dialogue import shared
from ..chat.turns import RenderedTurn, render
from ..errors import ConfigError, UnknownNameError
from .pools import FIRST_NAMES, parts, system_prompt


@dataclass(frozen=True)
class Said:
    """One turn as text. ``recall`` are the characters of ``text`` that only an earlier turn tells; (0, 0) is none."""

    role: str
    text: str
    recall: tuple[int, int] = (0, 0)


class Style:
    """The model's own chat template, with the system prompt that it brings."""

    #: Whether speakers are two people, neither of them an assistant.
    people = False

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def opening(self) -> list[RenderedTurn]:
        """What stands before the first turn, as segments of their own."""
        return []

    def turn(self, place: int, role: str, text: str, past: str) -> RenderedTurn:
        """Turn number ``place``, behind one of the role ``past``; "" is the begin."""
        return render(self.tokenizer, role, text, past)


class Bare(Style):
    """The chat template as in the middle of a dialogue: without a system prompt."""

    def turn(self, place: int, role: str, text: str, past: str) -> RenderedTurn:
        return render(self.tokenizer, role, text, past or None)


class WithSystem(Style):
    """The chat template with a system prompt; where it has no place for one, without."""

    def __init__(self, tokenizer: Any, prompt: str):
        super().__init__(tokenizer)
        self._opening: list[RenderedTurn] = []
        try:
            ids = render(tokenizer, "system", prompt, "").ids
        except ConfigError:
            return
        self._opening = [RenderedTurn(ids, (0, 0))]

    def opening(self) -> list[RenderedTurn]:
        return self._opening

    def turn(self, place: int, role: str, text: str, past: str) -> RenderedTurn:
        return render(self.tokenizer, role, text, past or ("system" if self._opening else ""))


@dataclass
class Plain(Style):
    """Plain text.

    Attributes:
        heads: what stands before the words of user and assistant; ``{time}`` is a time of day that goes on.
        end: what stands behind them.
        before: text before the first turn.
        people: see :class:`Style`.
        one_line: whether line breaks in a turn become spaces.
        minutes: the time of the first turn, and of how many turns there is one a minute.
    """

    tokenizer: Any
    heads: tuple[str, str]
    end: str = "\n"
    before: str = ""
    people: bool = True
    one_line: bool = False
    minutes: tuple[int, int] = (0, 1)
    _known: dict[str, list[int]] = field(default_factory=dict)

    def opening(self) -> list[RenderedTurn]:
        return [RenderedTurn(tuple(self._encode(self.before)), (0, 0))] if self.before else []

    def turn(self, place: int, role: str, text: str, past: str) -> RenderedTurn:
        head = "" if role == "system" else self.heads[role == "assistant"]
        if "{time}" in head:
            first, each = self.minutes
            hour, minute = divmod((first + place // each) % 1440, 60)
            head = head.replace("{time}", f"{hour:02}:{minute:02}")
        words = " ".join(text.split()) if self.one_line else text.strip()
        ids = self._encode(f"{head}{words}{self.end}")
        if head not in self._known:
            self._known[head] = self._encode(head)
        return RenderedTurn(tuple(ids), (max(1, shared(ids, self._known[head])), len(ids)))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


# ---------------------------------------------------------------------- what is drawn

_ROLES = parts(
    "User/Assistant|User/Bot|Q/A|Human/AI|Customer/Agent|Guest/Host|Student/Teacher|Patient/Doctor|Me/You|A/B"
    "|Interviewer/Guest|Person 1/Person 2|Speaker 1/Speaker 2|user/assistant|USER/ASSISTANT|Client/Support"
)
#: Of a label, what stands before the words.
_LABELS = ("{}: ", "{}: ", "{}: ", "**{}:** ", "{} - ", "[{}] ", "<{}> ", "### {}:\n", "{}>> ")
_SCRIPTS = (
    "[{time}] {}: ",
    "[{time}] {}: ",
    "[{time}] <{}> ",
    "<{}> ",
    "{time} {}: ",
    "{} ({time}): ",
    "{time} - {}: ",
    "{}\n",
    "{} at {time}:\n> ",
    "From: {}\n\n",
)
_DASHES = (("- ", "\n"), ("— ", "\n"), ("\u2013 ", "\n"), ('"', '"\n'), ("\u201c", "\u201d\n"), ("", "\n"))
_ENDS = ("\n", "\n", "\n", "\n\n")


def _two_names(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(FIRST_NAMES, 2)
    return first, second


def _names(tokenizer: Any, rng: random.Random) -> Style:
    names = _two_names(rng)
    form = rng.choice(("{}: ", "{}: ", "{}: ", "{}: ", "**{}**: ", "{} - ", "{} said: "))
    intro = ("", "", "", f"{names[0]} and {names[1]} are talking.\n", f"Chat: {names[0]}, {names[1]}\n\n")
    return Plain(
        tokenizer,
        (form.format(names[0]), form.format(names[1])),
        rng.choice(_ENDS),
        rng.choice(intro),
    )


def _roles(tokenizer: Any, rng: random.Random) -> Style:
    form = rng.choice(_LABELS)
    heads = [form.format(label) for label in rng.choice(_ROLES).split("/")]
    before = system_prompt(rng) + "\n\n" if rng.random() < 0.25 else ""
    return Plain(tokenizer, (heads[0], heads[1]), rng.choice(_ENDS), before, people=False)


def _lines(tokenizer: Any, rng: random.Random) -> Style:
    head, end = rng.choice(_DASHES)
    return Plain(tokenizer, (head, head), end, one_line=True)


def _script(tokenizer: Any, rng: random.Random) -> Style:
    names, form = _two_names(rng), rng.choice(_SCRIPTS)
    if "<" in form and rng.random() < 0.7:
        names = names[0].lower(), f"{names[1].lower()}{rng.choice(('', '', '_', '99', '42'))}"
    heads = tuple(form.replace("{}", name) for name in names)
    end = "\n\n" if form[-1] == "\n" else rng.choice(_ENDS)
    times = rng.randrange(1440), rng.choice((1, 1, 2, 3))
    return Plain(tokenizer, (heads[0], heads[1]), end, one_line="<" in form or ">" in form, minutes=times)


#: Name of a format -> a style of it with everything drawn.
FORMATS: dict[str, Callable[[Any, random.Random], Style]] = {
    "template": lambda tokenizer, rng: Style(tokenizer),
    "template-bare": lambda tokenizer, rng: Bare(tokenizer),
    "template-system": lambda tokenizer, rng: WithSystem(tokenizer, system_prompt(rng)),
    "names": _names,
    "roles": _roles,
    "lines": _lines,
    "script": _script,
}


def read_formats(option: str, value: Any) -> dict[str, float]:
    """A setting that is one format, several, or a mapping to how often each is drawn, checked.

    Raises:
        ConfigError: something else, none at all, or a share below 0.
        UnknownNameError: no such format.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        if not isinstance(given, Sequence) or any(not isinstance(name, str) for name in given):
            raise ConfigError(
                f"{option} is {value!r}: expected names of formats, such as {', '.join(FORMATS)}"
            )
        given = dict.fromkeys(given, 1.0)
    for name, weight in given.items():
        if name not in FORMATS:
            raise UnknownNameError("format", name, list(FORMATS))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise ConfigError(f"{option}.{name} is {weight!r}: expected a number of at least 0")
    if not sum(given.values()) > 0:
        raise ConfigError(f"{option} is {value!r}: expected at least one format with a share above 0")
    return {name: float(weight) for name, weight in given.items()}


def draw_style(formats: Mapping[str, float], tokenizer: Any, rng: random.Random) -> Style:
    """A style of one of the formats."""
    (name,) = rng.choices(list(formats), list(formats.values()))
    return FORMATS[name](tokenizer, rng)


def write(
    said: Sequence[Said], style: Style, max_turn_tokens: int = 128
) -> tuple[list[RenderedTurn], list[tuple[int, int, int]]]:
    """A conversation in a style: its segments, and (segment, start, stop) of what only earlier ones tell.

    The words of a very long turn are cut to ``max_turn_tokens``; those with something to recall never are.
    """
    turns = [] if said and said[0].role == "system" else list(style.opening())
    recall, past = [], ""
    for place, one in enumerate(said):
        turn = style.turn(place, one.role, one.text, past)
        first, last = one.recall
        if last:
            start, stop = (_reach(style, place, one, past, turn, at) for at in (first, last))
            recall.append((len(turns), start, stop))
        elif turn.content[1] - turn.content[0] > max_turn_tokens:
            start, stop = turn.content
            turn = RenderedTurn(
                (*turn.ids[: start + max_turn_tokens - 1], *turn.ids[stop - 1 :]),
                (start, start + max_turn_tokens),
            )
        turns.append(turn)
        past = one.role
    return turns, recall


def _reach(style: Style, place: int, one: Said, past: str, turn: RenderedTurn, at: int) -> int:
    """The first column of a turn that the first ``at`` characters of its text do not tell."""
    told = one.text[:at].rstrip()
    if not told:
        return turn.content[0]
    if told == one.text.rstrip():
        told += "."  # what ends the turn comes later, and differs
    part = style.turn(place, one.role, told, past)
    return max(turn.content[0], shared(turn.ids, part.ids))
