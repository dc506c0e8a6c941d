"""LaMP: after t items of a person's profile, what would this person say of one more text?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...data.icl import demonstration
from ...data.lamp import HUB, Lamp, Person, load_lamp, options
from ...errors import DataError
from ..items import Choice, Ids, Item
from .base import EvalTask, register_task
from .choosing import by_length, check_steps, choice, encode


@register_task
@dataclass(frozen=True)
class LampTask(EvalTask):
    """People of the benchmark's dev split, the newest items of their profiles one by one.

    People whose profiles reach the last step come first. Scores are calibrated by those of the text "N/A" under the
    same memory, except for stars: how a person rates at all is a part of what is asked.

    Attributes:
        steps: items of the profile before the question; the last is how many a person has.
        data: "news", "films" or "reviews".
        path: folder with the benchmark's files; without it they come from the model hub.
    """

    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    data: str = "news"
    path: str | None = None

    name, title = "lamp", "What a person would say, after a profile (LaMP, the paper's)"
    metrics = ("accuracy",)
    licence, origin = Lamp.licence, f"hub {HUB}; or path="

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        everyone = load_lamp(self.data, "test", self.path)
        people, labels = [p for p in everyone if len(p.profile) >= self.steps[0]], options(everyone)
        if len(labels) < 2:
            raise DataError(f"LaMP {self.data} has the labels {labels}: expected two or more")
        ordered = by_length(people, lambda p: len(p.profile) >= self.steps[-1], lambda p: (p.id,))
        for person in ordered[:limit]:
            yield self._item(person, labels, tokenizer)

    def _item(self, person: Person, labels: tuple[str, ...], tokenizer: Any) -> Item:
        def prompt(text: str) -> Ids:
            ids, (start, _) = demonstration(tokenizer, text, "x")
            return ids[:start]

        text, label = person.asked
        blank = () if self.data == "reviews" else prompt("N/A")
        answers = [encode(tokenizer, f" {each}") for each in labels]
        query: Choice = choice(prompt(text), answers, labels.index(label), blank=blank, tag=self.data)
        steps = [t for t in self.steps if t <= len(person.profile)]
        known = person.profile[len(person.profile) - steps[-1] :]
        segments = tuple(demonstration(tokenizer, *each)[0] for each in known)
        return Item(f"{self.data} {person.id}", segments, {t: (query,) for t in steps})
