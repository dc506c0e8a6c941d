"""Facts that are easily confused: four people who share their names, with four facts each of the same wording.

In the manner of the package ``hard-needle``, but told message by message.
"""

from __future__ import annotations

import random
from itertools import permutations, product

from .probes import FRUIT, NAMES, TOWNS, History, Kind, Probe, among

MESSAGES = 16
#: Options of a question: the values of all four people, and as many that nobody has.
OPTIONS = 8
_FIRST = ("Miriam", "Edith", "Ruth", "Esther", "Ralph", "Arthur", "Gordon", "Howard", "Stanley", "Warren")
_LAST = ("Holt", "Hooper", "Horton", "Hobbs", "Mercer", "Merton", "Mason", "Marsh")
#: Kind, statement and answer up to the value, question.
_ABOUT: tuple[tuple[Kind, str, str], ...] = (
    ("number", "The locker code of {} is", "What is the locker code of {}?"),
    ("place", "The office of {} is in", "Where is the office of {}?"),
    ("name", "The assistant of {} is called", "What is the assistant of {} called?"),
    ("preference", "For lunch {} always brings", "What does {} always bring for lunch?"),
)


def needles(seed: int) -> History:
    """16 facts in random order, one a message. After any message every fact told so far can be asked for.

    Locker codes, those of nobody included, are permutations of the same digits.
    """
    rng = random.Random(f"needles {seed}")
    people = [f"{first} {last}" for first, last in product(rng.sample(_FIRST, 2), rng.sample(_LAST, 2))]
    digits = rng.sample("123456789", 4)
    pools = {
        "number": ["".join(code) for code in permutations(digits)],
        "place": TOWNS,
        "name": NAMES,
        "preference": FRUIT,
    }
    probes: list[Probe] = []
    for kind, stem, question in _ABOUT:
        values = rng.sample(pools[kind], len(people))
        options = among(rng, values, pools[kind], OPTIONS)
        for who, value in zip(people, values, strict=True):
            probes.append(Probe(kind, question.format(who), stem.format(who), options, value))
    rng.shuffle(probes)
    messages = tuple(f"{probe.stem} {probe.value}." for probe in probes)
    return History(messages, tuple(tuple(probes[:t]) for t in range(MESSAGES + 1)))
