"""Facts that change: names, numbers and preferences that are replaced, and events whose order matters."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .probes import CATS, DRINKS, FRUIT, NAMES, SUBJECTS, TOWNS, History, Kind, Probe, among

MESSAGES = 16
#: Options of a question: the right value, those that were told, and values that never were.
OPTIONS = 6


@dataclass(frozen=True)
class _Subject:
    """What is told at first and from then on, and what is asked; order is asked for in two ways."""

    kind: Kind
    first: str
    then: str
    question: str
    stem: str
    values: tuple[str, ...]
    after_question: str = ""
    after_stem: str = ""


_SUBJECTS = (
    _Subject(
        "name",
        "You should meet my cat, her name is {}.",
        "I have given my cat another name, from now on she is called {}.",
        "What is my cat called now?",
        "Now your cat is called",
        CATS,
    ),
    _Subject(
        "name",
        "The tenant above us is called {}.",
        "The tenant above us has moved out, the new one is called {}.",
        "What is the tenant above us called now?",
        "The tenant above you is now called",
        NAMES,
    ),
    _Subject(
        "number",
        "My hotel room has the number {}.",
        "They have given me another hotel room, number {}.",
        "What is the number of my hotel room now?",
        "The number of your hotel room is now",
        tuple(map(str, range(101, 1000))),
    ),
    _Subject(
        "number",
        "I take bus {} to the office.",
        "My bus does not run any more, now I take bus {} to the office.",
        "Which bus do I take to the office now?",
        "To the office you now take bus",
        tuple(map(str, range(21, 100))),
    ),
    _Subject(
        "preference",
        "I could eat {} all day long.",
        "I have had enough of that fruit, now I could eat {} all day long.",
        "Which fruit could I eat all day long now?",
        "The fruit that you could now eat all day long are",
        FRUIT,
    ),
    _Subject(
        "preference",
        "I only ever order {} when I go out.",
        "I have changed my mind, when I go out I now order {}.",
        "What do I order now when I go out?",
        "When you go out you now order",
        DRINKS,
    ),
    _Subject(
        "order",
        "On our trip we came to {} today.",
        "On our trip we came to {} today.",
        "Which town did we come to first on our trip?",
        "The first town you came to was",
        TOWNS,
        "Which town did we come to right after {}?",
        "The town you came to right after {} was",
    ),
    _Subject(
        "order",
        "I have just had my {} lesson.",
        "I have just had my {} lesson.",
        "Which lesson did I have first?",
        "The first lesson you had was",
        SUBJECTS,
        "Which lesson did I have right after {}?",
        "The lesson you had right after {} was",
    ),
)


def updates(seed: int) -> History:
    """Four subjects, one of every kind, that are told once each and then change, three times each in any order.

    After any message one question of every kind can be asked: for the value that holds now, and, from the second
    event on, for the first event or for the one right after another.
    """
    rng = random.Random(f"updates {seed}")
    subjects = [
        rng.choice([subject for subject in _SUBJECTS if subject.kind == kind])
        for kind in ("name", "number", "preference", "order")
    ]
    rest = subjects * (MESSAGES // len(subjects) - 1)
    turns = rng.sample(subjects, len(subjects)) + rng.sample(rest, len(rest))
    values = {subject: rng.sample(subject.values, turns.count(subject)) for subject in subjects}
    told: dict[_Subject, list[str]] = {subject: [] for subject in subjects}
    messages: list[str] = []
    probes: list[tuple[Probe, ...]] = [()]
    for subject in turns:
        known = told[subject]
        known.append(values[subject][len(known)])
        messages.append((subject.then if known[1:] else subject.first).format(known[-1]))
        asked = (_probe(other, told[other], rng) for other in subjects)
        probes.append(tuple(probe for probe in asked if probe))
    return History(tuple(messages), tuple(probes))


def _probe(subject: _Subject, told: list[str], rng: random.Random) -> Probe | None:
    question, stem = subject.question, subject.stem
    if subject.kind != "order":
        if not told:
            return None
        value = told[-1]
    else:
        if len(told) < 2:
            return None
        place = rng.randrange(len(told))
        value = told[place]
        if place:
            before = told[place - 1]
            question, stem = subject.after_question.format(before), subject.after_stem.format(before)
    return Probe(subject.kind, question, stem, among(rng, told, subject.values, OPTIONS), value)
