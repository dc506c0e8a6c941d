"""The user's own chat logs: JSONL files with one conversation a line, in OpenAI's format of messages."""

from __future__ import annotations

import json
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import DataError
from .conversation import ROLES, Conversation, Split, Turn, split_of
from .conversational import ConversationSource
from .sources import register_source


def read_jsonl(path: str | Path) -> list[Conversation]:
    """The conversations of a JSONL file, or of all ``*.jsonl`` files of a folder, in order.

    A line is ``{"messages": [{"role": "user", "content": "…"}, …]}``; roles are system, user and assistant; content
    is a text or a list of parts ``{"type": "text", "text": "…"}``. An optional ``"user"`` names who is talking, so
    that all conversations of one person come into the same split. Other keys are ignored, and so are empty lines;
    messages of the same role that follow each other become one turn.

    Raises:
        DataError: no such file, nothing in it, or a line that is not such a conversation (named by number).
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .jsonl file: expected files with one conversation a line")
    conversations = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            raise DataError(f"{file} is not there: give a .jsonl file or a folder of them") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read ({error}): expected UTF-8 text") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                conversations.append(_conversation(line, f"{file}, line {number}"))
    if not conversations:
        raise DataError(f"{path} is empty: expected one conversation a line")
    return conversations


def _conversation(line: str, place: str) -> Conversation:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}): expected one object a line") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{place} has no messages: expected {{"messages": [{{"role": …, "content": …}}, …]}}')
    said = [_turn(message, f"{place}, message {i}") for i, message in enumerate(messages, 1)]
    turns = tuple(
        Turn(role, "\n".join(turn.text for turn in run))
        for role, run in groupby(said, lambda turn: turn.role)
    )
    user = record.get("user")
    if user is not None and not isinstance(user, (str, int)):
        raise DataError(f'{place}: "user" is {user!r}: expected a name or a number, or leave it out')
    return Conversation(place, () if user is None else (str(user),), turns)


def _turn(message: Any, place: str) -> Turn:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise DataError(f"{place} has the role {role!r}: expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{place} has the content {content!r:.60}: expected a text that is not empty")
    return Turn(role, content.strip())


@register_source
class ChatLogs(ConversationSource):
    """Chat logs of the user's own. One in ten users (or conversations that name none) is validation, one test.

    Args:
        path: a .jsonl file or a folder of them (see :func:`read_jsonl`).
        turns, facts, echoes: see :class:`~ccm.data.conversational.ConversationSource`; the default for ``turns``
            is 8 and 16, because chats with an assistant are short.
    """

    name, title = "jsonl", "Your own chat logs"
    licence, origin = "yours", "a .jsonl file or folder: path="

    def __init__(self, tokenizer: Any, path: str | Path, turns: Any = (8, 16), **options: Any):
        self.path = Path(path)
        super().__init__(tokenizer, turns, **options)

    @cached_property
    def _splits(self) -> dict[Split, list[Conversation]]:
        splits: dict[Split, list[Conversation]] = {"train": [], "validation": [], "test": []}
        for talk in read_jsonl(self.path):
            key = (
                f"user {talk.users[0]}"
                if talk.users
                else "\n".join(f"{t.role}: {t.text}" for t in talk.turns)
            )
            splits[split_of(key)].append(talk)
        return splits

    def conversations(self, split: Split) -> list[Conversation]:
        return self._splits[split]
