"""In-context learning as in MetaICL: a row is a few demonstrations of one task and then one more to be predicted.

The tasks themselves are in :mod:`ccm.data.tasks`: 16 for training, 8 others that are only ever used for evaluation.
A segment is one demonstration, ``text``, a new line, ``Label: …`` and a new line; its label is what is scored.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from .conversation import check_split
from .rows import ConversationRow, answers
from .sources import HeldOut, Source, numbers, register_source, share
from .tasks import ARCHIVES, TEST_TASKS, TRAIN_TASKS, Task, load_task

#: Longer texts are cut to so many tokens.
TEXT_TOKENS = 64


def demonstration(tokenizer: Any, text: str, label: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """One segment, and the columns of the label in it. Without the label's tokens and the last it is a prompt."""

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False)

    head = [*encode(text)[:TEXT_TOKENS], *encode("\nLabel:")]
    answer = encode(f" {label}")
    return (*head, *answer, *encode("\n")), (len(head), len(head) + len(answer))


def icl_row(
    task: Task,
    tokenizer: Any,
    demonstrations: int,
    rng: random.Random,
    names: Mapping[str, str] | None = None,
) -> ConversationRow:
    """``demonstrations`` items of a task and one more, without an item twice; ``names`` are written for its labels.

    At every place each label is as likely as any other, whatever came before: labels are balanced in the order of
    appearance, and nothing can be learned from counting them. (Only a label without unused items drops out.)

    Raises:
        DataError: the task has too few items for such a row.
    """
    used: set[tuple[str, str]] = set()
    left = {label: len(task.texts[label]) for label in task.options}
    if sum(left.values()) <= demonstrations:
        raise DataError(
            f"task {task.name} has {len(task.items)} items: expected {demonstrations + 1} or more"
        )
    segments, content = [], []
    for _ in range(demonstrations + 1):
        label = rng.choice([label for label, unused in left.items() if unused])
        while (item := (label, rng.choice(task.texts[label]))) in used:
            pass
        used.add(item)
        left[label] -= 1
        ids, columns = demonstration(tokenizer, item[1], names[label] if names else label)
        segments.append(ids)
        content.append(columns)
    return ConversationRow(task.name, tuple(segments), tuple(content), answers(content))


def other_names(task: Task, words: Task, rng: random.Random) -> dict[str, str]:
    """A word for each label of a task, from the texts of another one.

    A model that knows a task by its texts knows its labels as well, and needs no memory of them. These it can only
    have from the demonstrations.
    """
    names: dict[str, str] = {}
    for label in task.options:
        found: set[str] = set()
        while not found:
            found = set(re.findall(r"[a-z]{4,10}", rng.choice(words.items).text)) - set(names.values())
        names[label] = rng.choice(sorted(found))
    return names


@register_source
class InContextLearning(Source):
    """Demonstrations of classification tasks.

    Validation rows are unseen items of the training tasks, test rows are whole tasks that are never trained on.

    Args:
        demonstrations: before the item that ends a row; training rows draw one of these, held-out rows have the most.
        relabel: share of the training rows in which arbitrary words stand for the labels.
    """

    name, title = (
        "icl",
        f"In-context learning: {len(TRAIN_TASKS)} training tasks, {len(TEST_TASKS)} for tests",
    )
    licence = "WordNet, PDDL and CC0 for three tasks; upstream for the others"
    size = "24 tasks"
    origin = ", ".join(str(archive) for archive in ARCHIVES)
    archives = ARCHIVES

    def __init__(
        self, tokenizer: Any, demonstrations: int | Sequence[int] = (4, 8, 16), relabel: float = 0.0
    ):
        super().__init__(tokenizer)
        self.demonstrations = numbers("demonstrations", demonstrations, 1)
        self.relabel = share("relabel", relabel)

    def draw(self, rng: random.Random) -> ConversationRow:
        task = load_task(rng.choice(TRAIN_TASKS), "train")
        names = None
        if self.relabel and rng.random() < self.relabel:
            names = other_names(task, load_task(rng.choice(TRAIN_TASKS), "train"), rng)
        return icl_row(task, self.tokenizer, rng.choice(self.demonstrations), rng, names)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        check_split(split)
        names = TEST_TASKS if split == "test" else TRAIN_TASKS
        rows = []
        for k in range(limit):
            task = load_task(names[k % len(names)], split)
            rng = random.Random(f"{split} {k}")
            rows.append(icl_row(task, self.tokenizer, max(self.demonstrations), rng))
        return rows
