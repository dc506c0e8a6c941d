"""What was said, as a store keeps it: a transcript of entries, oldest first."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat.messages import Message, ToolCall

#: Entry after which the memory was made anew: the entries before it count no more.
RESET: dict[str, Any] = {"reset": True}
#: Field of an entry that takes back: of the entries that count so far, only the first so many still do.
REWIND = "rewind"
#: Field of an entry that was taken in without an answer. Clients that send a history may not know of it.
TOLD = "told"
#: Roles of system text, which is looked at apart.
SYSTEM = ("system", "developer")
#: Field of an answer that did not come to its end: what ended it, and how many tokens it has.
CUT = "cut"
#: Fields that say of an entry how it came about, and not what was said.
_MARKS = (TOLD, CUT)
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_NAMES = (
    "monday tuesday wednesday thursday friday saturday sunday mon tue tues wed thu thur thurs fri sat sun "
    "january february march april may june july august september october november december "
    "jan feb mar apr jun jul aug sep sept oct nov dec am pm"
)
_ORDINAL = r"\d{1,4}(?:st|nd|rd|th)?"
#: What a clock writes: 14:05:59, 2026-11-27, 27.11.2026, 27 November 2026, seconds since the epoch, PM.
_CLOCK = re.compile(
    r"(?<!\d)\d{1,2}(?::\d\d){1,2}(?:\.\d{1,9})?|(?<!\d)\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?!\d)|\b\d{10,13}\b|"
    rf"(?:\b{_ORDINAL}[ ,]{{1,2}})?\b(?:{_NAMES.replace(' ', '|')})\b\.?(?:[ ,]{{1,2}}{_ORDINAL}\b){{0,2}}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cut:
    """Where an answer breaks off.

    Attributes:
        by: "length" is the limit of the request or the model's context. "stopped" is a client that went away, or a
            server that was stopped.
        tokens: of the answer.
    """

    by: str
    tokens: int

    def mark(self) -> dict[str, Any]:
        """As an entry bears it."""
        return {CUT: [self.by, self.tokens]}


@dataclass(frozen=True)
class Entry:
    """One turn of a timeline.

    Attributes:
        role: who spoke.
        content: what was said; None if texts are not kept.
        tokens: tokens of the turn, with those that the chat template adds.
        folded: whether all of it is in slots by now.
        tool_calls: that an assistant asked for.
        tool_call_id: of the call that a tool answered.
        cut: where an answer breaks off; None if it came to its end.
    """

    role: str
    content: str | None
    tokens: int
    folded: bool
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    cut: Cut | None = None


def note(
    message: Message, tokens: int, texts: bool, marks: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A message as an entry of a transcript, with its marks; without texts its digests alone."""
    entry = {"role": message.role, "sha256": digest_of(message), "tokens": tokens, **(marks or {})}
    if not texts:
        lines = {"lines": [line_digest(line) for line in _lines(message.content)]}
        return {**entry, **lines} if message.role in SYSTEM else entry
    entry["content"] = message.content
    if message.tool_calls:
        entry["tool_calls"] = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    more = {"tool_call_id": message.tool_call_id, "name": message.name}
    return {**entry, **{name: value for name, value in more.items() if value}}


def said(entry: dict[str, Any]) -> Message | None:
    """The message of an entry; None if its text was not kept."""
    if "content" not in entry:
        return None
    return Message(
        entry["role"],
        entry["content"],
        tool_calls=_calls(entry),
        tool_call_id=entry.get("tool_call_id"),
        name=entry.get("name"),
    )


def _calls(entry: dict[str, Any]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(*call) for call in entry.get("tool_calls", ()))


def _cut(entry: dict[str, Any]) -> Cut | None:
    return Cut(*entry[CUT]) if CUT in entry else None


def texts(entries: Sequence[dict[str, Any]], sent: Sequence[Message] = ()) -> list[Message] | None:
    """The messages of entries, without empty answers. A text that is not stored is looked for among those sent.

    Returns:
        None if a text is in neither.
    """
    given = {digest_of(message): message for message in sent}
    found = [said(entry) or given.get(entry["sha256"]) for entry in entries if entry["sha256"] != _NOTHING]
    return None if None in found else [message for message in found if message is not None]


def marks(messages: Sequence[Message], entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of the messages bore when it was one of these entries. Of equal ones the oldest comes first."""
    before = defaultdict[str, deque[dict[str, Any]]](deque)
    for entry in entries:
        before[key_of(entry)].append({name: entry[name] for name in _MARKS if name in entry})
    return [found.popleft() if (found := before[digest_of(message)]) else {} for message in messages]


def rewind(keep: int) -> dict[str, Any]:
    """The entry that takes back all but the first ``keep`` of the entries that count."""
    return {REWIND: keep}


def standing(entries: Sequence[dict[str, Any]], counts: Iterable[int] = ()) -> list[list[int]]:
    """Places of the entries that count: among all entries, and among the first ``n`` for each ``n`` of ``counts``."""
    wanted = sorted(set(counts))
    seen: dict[int, list[int]] = {}
    places: list[int] = []
    for i in range(len(entries) + 1):
        if wanted and wanted[0] == i:
            seen[wanted.pop(0)] = list(places)
        if i == len(entries):
            break
        if entries[i] == RESET:
            places = []
        elif REWIND in entries[i]:
            places = places[: entries[i][REWIND]]
        else:
            places.append(i)
    return [places, *(seen[count] for count in counts)]


def current(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that the memory was made of: neither forgotten by a reset, nor taken back."""
    return [entries[i] for i in standing(entries)[0]]


def timeline(entries: Sequence[dict[str, Any]], folded: int) -> list[Entry]:
    """The entries as turns. The first ``folded`` tokens of the conversation are in slots."""
    turns, seen = [], 0
    for entry in current(entries):
        seen += entry["tokens"]
        said = entry["role"], entry.get("content"), entry["tokens"], seen <= folded
        turns.append(Entry(*said, _calls(entry), entry.get("tool_call_id"), _cut(entry)))
    return turns


def lines_of(entry: dict[str, Any]) -> list[str]:
    """Digests of the lines of an entry's text."""
    if "content" in entry:
        return [line_digest(line) for line in _lines(entry["content"])]
    return list(entry.get("lines", ()))


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.strip())


def line_digest(line: str) -> str:
    """A short digest of a line, without what a clock changes in it."""
    return hashlib.sha256(_CLOCK.sub("\0", line).strip().encode()).hexdigest()[:16]


def compared(role: str, digest: str) -> bool:
    """Whether a message is compared. Clients leave out empty answers, and system text is compared apart."""
    return role not in SYSTEM and digest != _NOTHING


def key_of(entry: dict[str, Any]) -> str:
    """The digest of an entry. Older servers wrote digests that cover the thoughts; those are made anew."""
    if entry["role"] == "assistant" and "think>" in entry.get("content", ""):
        message = said(entry)
        return entry["sha256"] if message is None else digest_of(message)
    return str(entry["sha256"])


def digest_of(message: Message) -> str:
    """The digest of a message, without thoughts and without the blanks around it, which clients trim."""
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if role == "assistant" and "think>" in content:
        # a template may open the thoughts itself
        content = _THOUGHTS.sub("", content).rpartition("</think>")[2]
    text = f"{role}\0{content.strip()}"
    if message.tool_calls or message.tool_call_id:
        calls = [[call.name, call.as_dict()["function"]["arguments"], call.id] for call in message.tool_calls]
        text += f"\0{json.dumps([calls, message.tool_call_id], sort_keys=True)}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_NOTHING = digest_of(Message("assistant"))
