"""What was said, as a store keeps it, and whether a client that sends a history again means the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..messages import Message, ToolCall

_OPENINGS = (["user"], ["system", "user"])
#: Entry that says: forget what was noted before, the memory was made anew from here on.
RESET: dict[str, Any] = {"reset": True}


@dataclass(frozen=True)
class Entry:
    """One turn of a timeline.

    Attributes:
        role: who spoke.
        content: what; None if texts are not kept.
        tokens: of the turn, with what the chat template adds.
        folded: whether all of it is in slots by now.
        tool_calls: that an assistant asked for.
        tool_call_id: of the call that a tool answered.
    """

    role: str
    content: str | None
    tokens: int
    folded: bool
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


def note(message: Message, tokens: int, texts: bool) -> dict[str, Any]:
    """A message as an entry of a transcript; without texts its digest alone."""
    entry = {"role": message.role, "sha256": _digest(message), "tokens": tokens}
    if not texts:
        return entry
    entry["content"] = message.content
    if message.tool_calls:
        entry["tool_calls"] = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    more = {"tool_call_id": message.tool_call_id, "name": message.name}
    return {**entry, **{name: value for name, value in more.items() if value}}


def current(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that the memory was made of: those behind the last reset."""
    start = max((i + 1 for i, entry in enumerate(entries) if entry == RESET), default=0)
    return list(entries[start:])


def timeline(entries: Sequence[dict[str, Any]], folded: int) -> list[Entry]:
    """The entries as turns, when ``folded`` tokens of the conversation are in slots."""
    turns, seen = [], 0
    for entry in current(entries):
        seen += entry["tokens"]
        calls = tuple(ToolCall(*call) for call in entry.get("tool_calls", ()))
        said = entry["role"], entry.get("content"), entry["tokens"], seen <= folded
        turns.append(Entry(*said, calls, entry.get("tool_call_id")))
    return turns


def unknown(
    entries: Sequence[dict[str, Any]], messages: Sequence[Message], imported: bool = False
) -> list[Message] | None:
    """Those of the messages that are new, or None if they tell another history.

    With an imported memory that nothing was said to since, who can tell what of a history is in it: a system message
    and one of the user are new, more are not taken.

    A client may send all that was said and what is new, or only what is new::

        known            sent                     new
        s u1 a1          s u1 a1 u2               u2
        s u1 a1          u2  or  s u2             u2       one message, not an answer
        s u1 a1          s u1 b1 u2               None
        s u1 a1          s u1                     u1       said again
    """
    known = [entry["sha256"] for entry in current(entries)]
    sent = [_digest(message) for message in messages]
    if imported and not known:
        return list(messages) if [message.role for message in messages] in _OPENINGS else None
    if sent[: len(known)] == known:
        return list(messages[len(known) :])
    system = sum(message.role == "system" for message in messages[:1])
    if len(messages) == system + 1 and messages[-1].role == "user" and sent[:system] == known[:system]:
        return list(messages[system:])
    return None


def instructed(entries: Sequence[dict[str, Any]], instructions: Message) -> bool:
    """Whether the last instructions that the conversation knows are these."""
    known = [entry["sha256"] for entry in current(entries) if entry["role"] == "system"]
    return known[-1:] == [_digest(instructions)]


def _digest(message: Message) -> str:
    """Clients trim what they show, hence without the blanks around it."""
    return hashlib.sha256(f"{message.role}\0{message.content.strip()}".encode()).hexdigest()
