"""A user's own data: a JSONL file of conversations, or of labelled items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..data.conversation import Conversation
from ..data.jsonl import read_jsonl
from ..errors import DataError
from ..turns import render_dialogue, turns_of
from .items import Generation, Item, Query
from .tasks import EvalTask
from .tasks.choosing import ask, check_steps, choice, encode
from .tasks.conversation import ConversationTask

_EXPECTED = (
    'expected {"context": ["…", …], "input": "…", "options": ["…", …], "answer": "…"} or '
    '{"context": ["…", …], "question": "…", "answers": ["…", …]}'
)


def own_task(path: Path) -> EvalTask:
    """The task of a file, by what its first line holds: ``messages``, or ``context`` with something asked.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    for _, line in _lines(path):
        return (
            OwnItems(path=path) if '"context"' in line and '"messages"' not in line else OwnChats(path=path)
        )
    raise DataError(f'{path} is empty: {_EXPECTED} or {{"messages": […]}} a line')


@dataclass(frozen=True, kw_only=True)
class OwnChats(ConversationTask):
    """The next turn of conversations (see :func:`ccm.data.jsonl.read_jsonl`).

    Attributes:
        path: the file.
    """

    path: Path
    name, title = "own-chats", "The next turn of your own conversations"
    metrics = ("nll",)
    licence, origin = "yours", "a .jsonl file"

    def conversations(self, tokenizer: Any) -> Sequence[Conversation]:
        return [replace(talk, id=talk.id.removeprefix(f"{self.path}, ")) for talk in read_jsonl(self.path)]


@dataclass(frozen=True, kw_only=True)
class OwnItems(EvalTask):
    """Labelled items: a context that arrives piece by piece, then a choice among options or a free answer.

    A line is ``{"context": […], "input": "…", "options": […], "answer": "…"}`` or ``{"context": […], "question":
    "…", "answers": […]}``. Pieces, input and question are turns of the user, the answer is the assistant's.

    Attributes:
        path: the file.
        steps: pieces in the memory when it is asked; always after the last as well.
    """

    path: Path
    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    name: ClassVar[str] = "own-items"
    title: ClassVar[str] = "Your own labelled items"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "em", "f1", "rouge_l")
    licence: ClassVar[str] = "yours"
    origin: ClassVar[str] = "a .jsonl file"

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        found = [self._item(tokenizer, number, line) for number, line in _lines(self.path)]
        yield from found[:limit]  # a broken line shows before anything is measured

    def _item(self, tokenizer: Any, number: int, line: str) -> Item:
        place = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON ({error}): {_EXPECTED}") from error
        if not isinstance(record, dict):
            raise DataError(f"{place} is not an object: {_EXPECTED}")
        context = _texts(record, "context", place)
        query: Query
        if "options" in record:
            options, asked = _texts(record, "options", place), _text(record, "input", place)
            if len(options) < 2 or len(set(options)) < len(options):
                raise DataError(f"{place}: options are {options!r}: expected two or more different texts")
            if record.get("answer") not in options:
                raise DataError(f"{place}: answer is {record.get('answer')!r}: expected one of {options}")
            end = turns_of(tokenizer).tail[:1]  # "yes" is not only how "yes, please" begins
            query = choice(
                ask(tokenizer, asked),
                [(*encode(tokenizer, option), *end) for option in options],
                options.index(record["answer"]),
                blank=ask(tokenizer, "N/A"),
            )
        else:
            asked, answers = _text(record, "question", place), _texts(record, "answers", place)
            query = Generation(ask(tokenizer, asked), tuple(answers))
        segments = tuple(
            turn.ids for turn in render_dialogue(tokenizer, [("user", text) for text in context])
        )
        steps = sorted({*(t for t in self.steps if t < len(segments)), len(segments)})
        return Item(f"line {number}", segments, {t: (query,) for t in steps})


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} is not there: give a .jsonl file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): expected UTF-8 text") from error
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _text(record: dict[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {key} is {value!r:.60}: expected a text that is not empty; {_EXPECTED}")
    return value.strip()


def _texts(record: dict[str, Any], key: str, place: str) -> list[str]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {key} is {value!r:.60}: expected a list of texts; {_EXPECTED}")
    return [_text({key: text}, key, place) for text in value]
