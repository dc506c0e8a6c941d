"""In-context learning: after t demonstrations of a task that was never trained on, which label is right?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...data.icl import InContextLearning, demonstration, icl_row
from ...data.sources import number
from ...data.tasks import TEST_TASKS, Task, load_task
from ..items import Choice, Ids, Item
from .base import EvalTask, register_task
from .choosing import check_steps, choice, encode


@register_task
@dataclass(frozen=True)
class InContextTask(EvalTask):
    """Rows of demonstrations, one a segment, with the same test inputs at every step; one task after the other.

    Labels of demonstrations are drawn evenly and independently; test inputs take the labels of their task in turn.
    Scores are calibrated by those of the input "N/A" under the same memory. The tag is the task.

    Attributes:
        steps: demonstrations before the test input; the last is how many a row has.
        inputs: per row.
    """

    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    inputs: int = 3

    name, title = "icl", f"The label of a text after demonstrations ({len(TEST_TASKS)} held-out tasks)"
    metrics = ("accuracy",)
    licence, origin = InContextLearning.licence, InContextLearning.origin

    def __post_init__(self) -> None:
        check_steps(self.steps)
        number("inputs", self.inputs, 1)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for k in range(limit):
            row, place = divmod(k, len(TEST_TASKS))
            yield self._row(load_task(TEST_TASKS[place], "test"), tokenizer, row)

    def _row(self, task: Task, tokenizer: Any, row: int) -> Item:
        rng = random.Random(f"{task.name} {row}")
        asked = [
            (label, rng.choice(task.texts[label]))
            for label in (_label(task, row * self.inputs + i) for i in range(self.inputs))
        ]
        queries = tuple(_query(task, tokenizer, text, label) for label, text in asked)
        texts = {text for _, text in asked}
        others = replace(task, items=tuple(item for item in task.items if item.text not in texts))
        count = self.steps[-1]
        segments = icl_row(others, tokenizer, count - 1, rng).segments if count else ()
        return Item(f"{task.name} {row}", segments, dict.fromkeys(self.steps, queries))


def _label(task: Task, place: int) -> str:
    """The label of test input number ``place``: every label once, then all of them again in another order."""
    lap, place = divmod(place, len(task.options))
    return random.Random(f"{task.name} labels {lap}").sample(task.options, len(task.options))[place]


def _query(task: Task, tokenizer: Any, text: str, label: str) -> Choice:
    prompt, options = _prompt(tokenizer, text), [encode(tokenizer, f" {option}") for option in task.options]
    return choice(prompt, options, task.options.index(label), blank=_prompt(tokenizer, "N/A"), tag=task.name)


def _prompt(tokenizer: Any, text: str) -> Ids:
    """A demonstration up to its label."""
    ids, (start, _) = demonstration(tokenizer, text, "x")
    return ids[:start]
