"""Users' own logs: lines of JSON as conversations, whatever program wrote them, and a count of what is left out.

One mapping for training (:mod:`ccm.data.jsonl`) and evaluation (:mod:`ccm.evaluation.own_data`).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from ..chat.messages import Message, ToolCall
from ..errors import DataError
from .conversation import Conversation, Turn

_T = TypeVar("_T")

#: Where a line holds its messages.
KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue")
#: So many of the lines that are skipped are named.
NAMED = 3

_CALL = "call"
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
_EXPECTED = (
    'expected {"messages": [{"role": …, "content": …}, …]} or {"conversations": [{"from": …, "value": …}, …]}'
)
_NOTES = {
    "empty_messages": "{} empty messages skipped",
    "tool_messages": "{} messages of tools written as text",
    "parts_replaced": "{} parts without text written as [image] and the like",
    "named_speakers": "named speakers in {}",
}


@dataclass
class Tally:
    """What was read of a user's files, and what was not.

    Attributes:
        path: the file or folder.
        kind: what a line is: conversations, or items.
        read: lines that were taken.
        skipped: lines that could not be used.
        first: the first of those, each with its place, what was got and what was expected.
        notes: what was changed or left out inside the lines that were taken, by the keys of :meth:`counts`.
    """

    path: Path
    kind: str = "conversations"
    read: int = 0
    skipped: int = 0
    first: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> bool:
        """Whether a line or a message was left out."""
        return bool(self.skipped or self.notes["empty_messages"])

    def skip(self, place: str, reason: str) -> None:
        """Count a line that cannot be used."""
        self.skipped += 1
        if len(self.first) < NAMED:
            self.first.append(f"{place}: {reason}")

    def counts(self) -> dict[str, Any]:
        """As plain JSON."""
        notes = {name: self.notes[name] for name in _NOTES}
        return {self.kind: self.read, "lines_skipped": self.skipped, "first_skipped": self.first, **notes}

    def __str__(self) -> str:
        """In one line, such as ``chats.jsonl: 1,234 conversations, 3 lines skipped (line 7: …)``."""
        told = [_plural(self.read, f"{{}} {self.kind}")]
        if self.skipped:
            named = "; ".join(self.first) + ("; …" if self.skipped > len(self.first) else "")
            told.append(f"{_plural(self.skipped, '{} lines skipped')} ({named})")
        told += [_plural(self.notes[name], words) for name, words in _NOTES.items() if self.notes[name]]
        return f"{self.path.name or self.path}: {', '.join(told)}"


def _plural(count: int, words: str) -> str:
    if count == 1:
        words = re.sub(r"^(\{\}.*?)s\b", r"\1", words)
    return words.format(f"{count:,}")


# ---------------------------------------------------------------------- lines


def read_lines(
    path: str | Path, parse: Callable[[Any, str, Counter[str]], _T], kind: str, strict: bool = False
) -> tuple[list[_T], Tally]:
    """What the lines of a JSONL file hold, or those of all ``*.jsonl`` files of a folder, in order.

    Lines end with a line feed, whatever stands before it; a byte order mark and blank lines are passed over.

    Args:
        path: the file or folder.
        parse: makes something of a line's JSON, its name and a counter of notes, or raises DataError with what was
            got and what was expected; then the line is skipped and counted.
        kind: what it makes, in a word.
        strict: let nothing be left out.

    Raises:
        DataError: no such file, no line that can be used, or, if ``strict``, something that was left out.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .jsonl file: expected files with one of the {kind} a line")
    found, tally = [], Tally(path, kind)
    for file in files:
        for number, line in lines(file):
            place = f"line {number}" if file == path else f"{file.name}, line {number}"
            notes: Counter[str] = Counter()
            try:
                found.append(parse(parsed(line), f"{file}, line {number}", notes))
            except DataError as error:
                tally.skip(place, str(error))
            else:
                tally.read += 1
                tally.notes += notes
    if not tally.read and not tally.skipped:
        raise DataError(f"{path} is empty: expected one of the {kind} a line")
    if not tally.read:
        raise DataError(f"{path} has no line that can be used: {tally}")
    if strict and tally.lost:
        raise DataError(f"{tally}: nothing may be left out; mend the file, or go on without strict")
    return found, tally


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                if line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{file} is not there: give a .jsonl file or a folder of them") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}): give a .jsonl file or a folder of them") from error


def parsed(line: bytes) -> Any:
    """The JSON of a line; DataError says why it has none."""
    try:
        return json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.start} is {line[error.start]:#04x}), expected UTF-8 text"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg}, column {error.colno}), expected one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a depth without end
        raise DataError(f"not JSON ({error}), expected one object a line") from error


def read_logs(path: str | Path, strict: bool = False) -> tuple[list[Conversation], Tally]:
    """The conversations of a JSONL file, or of all ``*.jsonl`` files of a folder, in order.

    A line is ``{"messages": [{"role": "user", "content": "…"}, …]}`` as in OpenAI's API, ``{"conversations":
    [{"from": "human", "value": "…"}, …]}`` (ShareGPT), or has its messages under another of :data:`KEYS`. How they
    become turns is said at :func:`turns`. An optional ``"system"`` stands in front of them. An optional ``"user"``
    names who is talking, so that all conversations of one person come into the same split. Other keys are ignored.

    Raises:
        DataError: see :func:`read_lines`.
    """
    return read_lines(path, _conversation, "conversations", strict)


def raw_messages(record: Any) -> list[Any] | None:
    """The messages of a line as they stand there; None if it has no key for them."""
    if isinstance(record, list):
        return record
    given = [record[key] for key in KEYS if key in record] if isinstance(record, dict) else []
    return next((value for value in given if isinstance(value, list)), [] if given else None)


def _conversation(record: Any, name: str, notes: Counter[str]) -> Conversation:
    messages = raw_messages(record)
    if not messages:
        raise DataError(f"no messages in {short(record)}, {_EXPECTED}")
    if all(isinstance(message, str) for message in messages):  # two people take turns
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)
        ]
    fields = record if isinstance(record, dict) else {}
    user, system = fields.get("user"), fields.get("system")
    if user is not None and (isinstance(user, bool) or not isinstance(user, (str, int))):
        raise DataError(f'"user" is {short(user)}, expected a name or a number, or leave it out')
    if isinstance(system, str):
        messages = [{"role": "system", "content": system}, *messages] if system.strip() else messages
    said = turns(messages, notes)
    if not said:
        raise DataError("only empty messages, expected at least one with a text")
    user = whole(str("" if user is None else user))
    return Conversation(name, (user,) if user else (), said)


# ---------------------------------------------------------------------- messages


def turns(raw: Sequence[Any], notes: Counter[str], context: bool = False) -> tuple[Turn, ...]:
    """Messages, as programs write them into logs, as turns.

    - Who speaks is ``role`` or ``from``; ``human``, ``gpt`` and their like are user and assistant, ``developer`` is
      system. Of speakers with other names, two who are alone are user and assistant, in the order in which they
      speak, and one beside a user or an assistant is the other of them; else all are users.
    - Where several people (``name``, or such speakers) speak in one role, each text begins with the name.
    - What is said is ``content``, ``value`` or ``text``: a text, or a list of parts. A part that is not text is
      written as what it is, such as ``[image]``. Messages that say and call nothing are left out.
    - Calls of tools and their results are written as text, a call by the assistant and a result by the user; the
      turn holds the message as it was. Thoughts are in that message alone, as templates drop them from older turns.
    - Messages of one speaker that follow each other are one turn.

    Args:
        raw: the messages as they stand in the file.
        notes: what is left out or changed is counted here.
        context: these are pieces of a context about which a user asks an assistant: both are speakers beside those
            of the messages, and every message is a turn of its own.

    Raises:
        DataError: something that is no message, with what was got and what was expected.
    """
    said = _cast(_messages(raw, notes), notes, context)
    names: dict[str, set[str | None]] = defaultdict(set)
    for message in said:
        names[message.role].add(message.name)
    if context:
        names["user"].add(None)
        names["assistant"].add(None)
    found = []
    alone = [context or _is_more_than_text(message) for message in said]
    runs = groupby(range(len(said)), lambda k: (said[k].role, said[k].name, k if alone[k] else None))
    for (role, name, _), run in runs:
        first, *others = (said[k] for k in run)
        text = "\n".join(map(as_text, (first, *others)))
        if role == "tool":
            role = "user"
        elif name and len(names[role]) > 1:
            text = f"{name}: {text}"
        notes["tool_messages"] += bool(first.role == "tool" or first.tool_calls)
        found.append(Turn(role, text, first if _is_more_than_text(first) else None))
    return tuple(found)


def as_text(message: Message) -> str:
    """What a message says; calls of tools and their results as text that says what it is."""
    if message.role == "tool":
        return f"[result of {message.name or 'a tool'}] {message.content}".strip()
    calls = [f"[call of {call.name}] {call.arguments}" for call in message.tool_calls]
    return "\n".join([message.content, *calls] if message.content else calls)


def _is_more_than_text(message: Message) -> bool:
    return bool(message.role == "tool" or message.tool_calls or message.reasoning)


def _messages(raw: Sequence[Any], notes: Counter[str]) -> list[Message]:
    """Those that say or call something; speakers with names of their own have these as their roles."""
    said = []
    open_calls: list[ToolCall] = []  # results come by the id of their call, or in the order of the calls
    for number, one in enumerate(raw, 1):
        try:
            message = _message(one, notes)
        except DataError as error:
            raise DataError(f"message {number}: {error}") from error
        if message is None:
            notes["empty_messages"] += 1
            continue
        open_calls += message.tool_calls
        if message.role == "tool":
            known = [call for call in open_calls if call.id and call.id == message.tool_call_id]
            if call := next(iter(known or open_calls), None):
                open_calls.remove(call)
                message = replace(message, name=message.name or call.name)
        said.append(message)
    return said


def _message(raw: Any, notes: Counter[str]) -> Message | None:
    """One message; None if it says and calls nothing."""
    speaker = _first(raw, "role", "from") if isinstance(raw, dict) else None
    if not isinstance(speaker, str) or not speaker.strip():
        raise DataError(
            f'got {short(raw)}, expected {{"role": "user", "content": "…"}} or "from" and "value"'
        )
    speaker = whole(speaker)
    role = _ROLES.get(speaker.lower(), speaker)
    value, name = _first(raw, "content", "value", "text"), raw.get("name")
    calls = _calls(raw)
    if role == _CALL:
        role = "assistant"
        if not calls:
            calls, value = _written_calls(value)
    if role == "tool" and not isinstance(value, str | None) and not _are_parts(value):
        value = json.dumps(value, ensure_ascii=False)
    if calls and role != "assistant":
        raise DataError(f"{role!r} calls a tool, expected this of the role assistant")
    content = _content(value, notes)
    if not content and not calls and role != "tool":
        return None
    thoughts, call_id = _first(raw, "reasoning_content", "reasoning"), raw.get("tool_call_id")
    return Message(
        role,
        content,
        reasoning=whole(thoughts) if isinstance(thoughts, str) and role == "assistant" else "",
        tool_calls=calls,
        tool_call_id=call_id if isinstance(call_id, str) else None,
        name=whole(name) or None if isinstance(name, str) else None,
    )


def _cast(said: list[Message], notes: Counter[str], context: bool) -> list[Message]:
    """Give speakers with names of their own the roles of user and assistant."""
    known = {"system", "user", "assistant", "tool"}
    present = {message.role for message in said} & {"user", "assistant"}
    if context:
        present = {"user", "assistant"}
    others = list(dict.fromkeys(message.role for message in said if message.role not in known))
    free = [role for role in ("user", "assistant") if role not in present]
    roles = (
        dict(zip(others, free, strict=False)) if len(others) <= len(free) else dict.fromkeys(others, "user")
    )
    notes["named_speakers"] += bool(others)
    return [
        replace(message, role=roles[message.role], name=message.name or message.role)
        if message.role in roles
        else message
        for message in said
    ]


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)


def _content(value: Any, notes: Counter[str]) -> str:
    if value is None or isinstance(value, str):
        return whole(value or "")
    if not isinstance(value, list):
        raise DataError(f"the content is {short(value)}, expected a text or a list of parts")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(text, str):
            texts.append(text)
        elif isinstance(kind, str):
            notes["parts_replaced"] += 1
            texts.append(f"\n[{re.sub(r'^input_|_url$', '', kind)}]\n")
        else:
            raise DataError(
                f'a part of the content is {short(part)}, expected {{"type": "text", "text": "…"}}'
            )
    return whole("".join(texts))


def _calls(raw: dict[str, Any]) -> tuple[ToolCall, ...]:
    """The calls of an assistant, in the present form of OpenAI's API or in its first (``function_call``)."""
    found = raw.get("tool_calls") or raw.get("function_call") or []
    return tuple(_call(call) for call in (found if isinstance(found, list) else [found]))


def _written_calls(value: Any) -> tuple[tuple[ToolCall, ...], str | None]:
    """Calls that are the JSON text of a message, and the text where it is none."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        return tuple(_call(call) for call in (found if isinstance(found, list) else [found])), None
    except (ValueError, DataError):
        return (), value


def _call(raw: Any) -> ToolCall:
    call = raw.get("function", raw) if isinstance(raw, dict) else None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(name, str) or not name.strip():
        raise DataError(
            f'a call of a tool is {short(raw)}, expected {{"function": {{"name": "…", "arguments": "…"}}}}'
        )
    arguments, call_id = _first(call, "arguments", "parameters"), raw.get("id")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return ToolCall(whole(name), whole(arguments) or "{}", call_id if isinstance(call_id, str) else "")


def _first(record: dict[str, Any], *keys: str) -> Any:
    """The value of the first of these keys that has one."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def whole(text: str) -> str:
    """A text without space around it, and without halves of characters, which no tokenizer takes."""
    return text.strip().encode("utf-8", "replace").decode()


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
