"""Made-up histories and what is asked about them, for evaluation alone.

Values are those of the test split of :mod:`ccm.data.facts`, and numbers of two to four digits: none of them occurs in
the facts that are planted into training rows, or in :mod:`ccm.data.notes`, whose numbers have five.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from . import facts

Kind = Literal["name", "number", "preference", "place", "order"]

_BY_NAME = {kind.name: kind.values for kind in facts.TEST}
CATS, NAMES, TOWNS = _BY_NAME["cat"], _BY_NAME["brother"], _BY_NAME["uncle"]
FRUIT, DRINKS, SUBJECTS = _BY_NAME["fruit"], _BY_NAME["drink"], _BY_NAME["subject"]


@dataclass(frozen=True)
class Probe:
    """One question, with the beginning of its answer.

    Attributes:
        kind: of fact.
        question: as the user asks it.
        stem: as the assistant begins to answer; the value comes next.
        options: values to choose from, the right one included.
        value: the right one.
    """

    kind: Kind
    question: str
    stem: str
    options: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class History:
    """What a user says, message by message, and what can be asked when t messages have been said (``probes[t]``)."""

    messages: tuple[str, ...]
    probes: tuple[tuple[Probe, ...], ...]


def among(rng: random.Random, needed: Sequence[str], others: Sequence[str], count: int) -> tuple[str, ...]:
    """``count`` different options in any order: all that are needed, and as many of the others as there is room."""
    free = [other for other in dict.fromkeys(others) if other not in needed]
    options = [*needed, *rng.sample(free, max(0, count - len(needed)))]
    return tuple(rng.sample(options, len(options)))
