"""LaMP: what one person has tagged, filed or rated, and the same question about one more text (Salemi et al., 2024).

The paper's personalization data: the tasks of the benchmark whose answer is one of a few words. Read from the files
that the benchmark gives out, ``LaMP_2/train_questions.json``, ``LaMP_2/train_outputs.json`` and so on, from a folder
or from a copy on the model hub. Their answers for the test split are secret: its dev split is the test split here,
and one in ten of its train split is for validation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from .. import hub
from ..errors import DataError, UnknownNameError
from .conversation import Split, check_split, split_of
from .icl import demonstration
from .rows import ConversationRow, answers
from .sources import HeldOut, Source, numbers, register_source

#: A copy on the model hub; the benchmark itself has none there.
HUB = "haotiansun014/LaMP_raw"


@dataclass(frozen=True)
class _Format:
    """A task's folder, its fields in profiles, and what stands before the text in a question."""

    folder: str
    text: str
    label: str
    mark: str


FORMATS = {
    "news": _Format("LaMP_2", "text", "category", "article: "),
    "films": _Format("LaMP_2_movie", "description", "tag", "description: "),
    "reviews": _Format("LaMP_3", "text", "score", "review: "),
}


@dataclass(frozen=True)
class Person:
    """What is known of a person, in the order of the files, and what is asked: (text, label) each."""

    id: str
    profile: tuple[tuple[str, str], ...]
    asked: tuple[str, str]


@lru_cache(maxsize=4)
def load_lamp(data: str, split: Split, path: str | None = None) -> tuple[Person, ...]:
    """The people of one split.

    Args:
        data: "news", "films" or "reviews".
        split: which.
        path: folder that has the task's folder; None is the hub.

    Raises:
        UnknownNameError: no such task or split.
        DataError: the files cannot be had, or are not as expected.
    """
    check_split(split)
    if data not in FORMATS:
        raise UnknownNameError("LaMP task", data, list(FORMATS))
    form, part = FORMATS[data], "dev" if split == "test" else "train"
    questions, outputs = (
        _read(f"{form.folder}/{part}_{name}.json", path) for name in ("questions", "outputs")
    )
    try:
        labels = {str(gold["id"]): str(gold["output"]) for gold in outputs["golds"]}
        people = [_person(record, labels, form) for record in questions]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{form.folder}/{part}_questions.json is not as expected ({error!r})") from error
    if split != "test":
        people = [person for person in people if split_of(f"lamp {person.id}", 0.1, 0.0) == split]
    return tuple(people)


def _person(record: dict[str, Any], labels: dict[str, str], form: _Format) -> Person:
    name, (_, found, text) = str(record["id"]), record["input"].partition(form.mark)
    if not found:
        raise KeyError(f"question {name}: no {form.mark!r}")
    profile = tuple((str(item[form.text]), str(item[form.label])) for item in record["profile"])
    return Person(name, profile, (text, labels[name]))


def _read(name: str, path: str | None) -> Any:
    if path is None and (reason := hub.silent()):
        raise DataError(f"cannot read {name}: {reason}; HF_HUB_OFFLINE=1 reads what was downloaded earlier")
    try:
        file = Path(path) / name if path else Path(hf_hub_download(HUB, name, repo_type="dataset"))
        return json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # the hub client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"LaMP: no {name} ({reason}); put the benchmark's files into a folder with {name}, and give it as path="
        ) from error


def options(people: Sequence[Person]) -> tuple[str, ...]:
    """All labels that are asked for, in alphabetical order."""
    return tuple(sorted({person.asked[1] for person in people}))


@register_source
class Lamp(Source):
    """Profiles item by item, and the person's answer about one more text.

    Args:
        data: "news" (15 sections), "films" (15 tags) or "reviews" (1 to 5 stars).
        items: of the profile, the newest; training rows draw one of these, held-out rows have the most.
        path: folder with the benchmark's files; without it they come from the model hub.
    """

    name, title = "lamp", "Personalization: sections, film tags, stars (LaMP, the paper's)"
    licence, origin = "upstream, LaMP", "model hub, or path="
    hub = HUB

    def __init__(
        self,
        tokenizer: Any,
        data: str = "news",
        items: int | Sequence[int] = (4, 8, 16),
        path: str | None = None,
    ):
        super().__init__(tokenizer)
        if data not in FORMATS:
            raise UnknownNameError("LaMP task", data, list(FORMATS))
        self.data, self.path = data, path
        self.items = numbers("items", items, 1)

    def draw(self, rng: random.Random) -> ConversationRow:
        people = self._people("train")
        return self._row(rng.choice(people), rng.choice(self.items))

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        return [self._row(person, max(self.items)) for person in self._people(split)[:limit]]

    def _people(self, split: Split) -> list[Person]:
        people = [person for person in load_lamp(self.data, split, self.path) if person.profile]
        if not people:
            raise DataError(f"LaMP {self.data} has nobody with a profile in its {split} split")
        return people

    def _row(self, person: Person, items: int) -> ConversationRow:
        shown = [*person.profile[-items:], person.asked]
        ids, columns = zip(*(demonstration(self.tokenizer, *each) for each in shown), strict=True)
        return ConversationRow(f"{self.data} {person.id}", ids, columns, answers(columns))
