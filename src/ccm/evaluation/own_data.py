"""A user's own data: a JSONL file of conversations, or of labelled items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..chat.turns import render_dialogue, turns_of
from ..data.conversation import Conversation, Turn
from ..data.logs import Tally, lines, parsed, raw_messages, read_lines, read_logs, short, turns, whole
from ..errors import DataError
from .items import Generation, Item, Query
from .tasks import EvalTask
from .tasks.choosing import ask, check_steps, choice, encode
from .tasks.conversation import ConversationTask

_EXPECTED = (
    'expected {"context": ["…", …], "input": "…", "options": ["…", …], "answer": "…"} or '
    '{"context": ["…", …], "question": "…", "answers": ["…", …]}'
)


def own_task(path: Path, strict: bool = False) -> OwnChats | OwnItems:
    """The task of a file, by the first line that holds messages, or ``context`` with something asked; all is read.

    Args:
        path: the file.
        strict: let nothing be left out.

    Raises:
        DataError: see :func:`ccm.data.logs.read_lines`.
    """
    task = (OwnItems if _holds_items(path) else OwnChats)(path=path, strict=strict)
    _ = task.tally  # what is wrong with the file shows before anything is loaded
    return task


def _holds_items(path: Path) -> bool:
    for _, line in lines(path):
        with suppress(DataError):
            record = parsed(line)
            if raw_messages(record) is not None:
                return False
            if isinstance(record, dict) and "context" in record:
                return True
    return False


@dataclass(frozen=True, kw_only=True)
class OwnChats(ConversationTask):
    """The next turn of conversations (see :func:`ccm.data.logs.read_logs`).

    Attributes:
        path: the file.
        strict: let nothing be left out.
    """

    path: Path
    strict: bool = False
    name, title = "own-chats", "The next turn of your own conversations"
    licence, origin = "yours", "a .jsonl file"

    @cached_property
    def _read(self) -> tuple[list[Conversation], Tally]:
        return read_logs(self.path, self.strict)

    @property
    def tally(self) -> Tally:
        return self._read[1]

    def conversations(self, tokenizer: Any) -> Sequence[Conversation]:
        return [replace(talk, id=talk.id.removeprefix(f"{self.path}, ")) for talk in self._read[0]]


@dataclass(frozen=True)
class _Asked:
    """A line of labelled items: a choice among options if there are any, else a free answer."""

    name: str
    context: tuple[Turn, ...]
    asked: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OwnItems(EvalTask):
    """Labelled items: a context that arrives piece by piece, then a choice among options or a free answer.

    A line is ``{"context": […], "input": "…", "options": […], "answer": "…"}`` or ``{"context": […], "question":
    "…", "answers": […]}``. Pieces are texts, which the user says, or messages (see :func:`ccm.data.logs.turns`);
    input and question are turns of the user, the answer is the assistant's.

    Attributes:
        path: the file.
        strict: let nothing be left out.
        steps: pieces in the memory when it is asked; always after the last as well.
    """

    path: Path
    strict: bool = False
    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    name = "own-items"
    title: ClassVar[str] = "Your own labelled items"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "em", "f1", "rouge_l")
    licence: ClassVar[str] = "yours"
    origin: ClassVar[str] = "a .jsonl file"

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @cached_property
    def _read(self) -> tuple[list[_Asked], Tally]:
        return read_lines(self.path, _asked, "items", self.strict)

    @property
    def tally(self) -> Tally:
        return self._read[1]

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for line in self._read[0][:limit]:
            yield self._item(tokenizer, line)

    def _item(self, tokenizer: Any, line: _Asked) -> Item:
        query: Query
        if line.options:
            end = turns_of(tokenizer).tail[:1]  # "yes" is not only how "yes, please" begins
            query = choice(
                ask(tokenizer, line.asked),
                [(*encode(tokenizer, option), *end) for option in line.options],
                line.options.index(line.answers[0]),
                blank=ask(tokenizer, "N/A"),
            )
        else:
            query = Generation(ask(tokenizer, line.asked), line.answers)
        told = render_dialogue(tokenizer, [(turn.role, turn.text) for turn in line.context])
        segments = tuple(turn.ids for turn in told)
        steps = sorted({*(t for t in self.steps if t < len(segments)), len(segments)})
        name = line.name.removeprefix(f"{self.path}, ")
        return Item(name, segments, {t: (query,) for t in steps})


def _asked(record: Any, name: str, notes: Counter[str]) -> _Asked:
    if not isinstance(record, dict) or "context" not in record:
        raise DataError(f"no context in {short(record)}, {_EXPECTED}")
    pieces = record["context"]
    if not isinstance(pieces, list) or not pieces:
        raise DataError(f"context is {short(pieces)}, expected a list of texts or messages; {_EXPECTED}")
    messages = [{"role": "user", "content": one} if isinstance(one, str) else one for one in pieces]
    context = turns(messages, notes, context=True)
    if not context:
        raise DataError(f"context is {short(pieces)}, expected at least one piece with a text")
    if "options" not in record:
        return _Asked(name, context, _text(record, "question"), (), _texts(record, "answers"))
    options, answer = _texts(record, "options"), record.get("answer")
    if len(options) < 2 or len(set(options)) < len(options):
        raise DataError(f"options are {short(list(options))}, expected two or more different texts")
    if not isinstance(answer, str) or whole(answer) not in options:
        raise DataError(f"answer is {short(answer)}, expected one of {short(list(options))}")
    return _Asked(name, context, _text(record, "input"), options, (whole(answer),))


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is {short(value)}, expected a text that is not empty; {_EXPECTED}")
    return whole(value)


def _texts(record: dict[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{key} is {short(value)}, expected a list of texts; {_EXPECTED}")
    return tuple(_text({key: text}, key) for text in value)
