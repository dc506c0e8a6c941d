"""A task: a shopping list grows turn by turn; what is on it?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ccm.chat.turns import render_dialogue, turns_of
from ccm.evaluation.items import Choice, Item
from ccm.evaluation.tasks import EvalTask, register_task

GOODS = ("milk", "bread", "rice", "soap", "eggs", "salt", "tea", "butter")
OTHERS = ("corn", "ham", "jam", "honey", "beans", "flour", "oil", "fish")


@register_task
@dataclass(frozen=True)
class Shopping(EvalTask):
    """Made-up lists. ``steps``: how many things are on the list when it is asked about, 8 at most."""

    name, title = "shopping", "Which of two things is on the shopping list?"
    metrics = ("accuracy",)
    licence, origin = "Apache-2.0", "made by a seeded generator"

    steps: tuple[int, ...] = (1, 2, 4, 8)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for number in range(limit):
            rng = random.Random(number)  # the same items every time
            listed = rng.sample(GOODS, max(self.steps))
            told = render_dialogue(tokenizer, [("user", f"We need {thing}.") for thing in listed])
            queries = {}
            for t in self.steps:
                oldest = self.ask(tokenizer, [listed[0], rng.choice(OTHERS)], rng.randrange(2), "oldest")
                newest = self.ask(tokenizer, [listed[t - 1], rng.choice(OTHERS)], rng.randrange(2), "newest")
                queries[t] = (oldest, newest)
            yield Item(f"list {number}", tuple(turn.ids for turn in told), queries)

    def ask(self, tokenizer: Any, things: list[str], answer: int, tag: str) -> Choice:
        """The right thing comes first in ``things`` and is put at place ``answer``."""
        things = things[::-1] if answer else things
        question = turns_of(tokenizer).asked(f"What do we need, {things[0]} or {things[1]}?")
        options = tuple(tuple(tokenizer.encode(thing, add_special_tokens=False)) for thing in things)
        return Choice(question, options, answer, tag=tag)
