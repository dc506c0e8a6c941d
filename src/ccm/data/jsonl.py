"""The user's own chat logs: JSONL files with one conversation a line (see :mod:`ccm.data.logs`)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .conversation import Conversation, Split, split_of
from .conversational import ConversationSource
from .logs import Tally, read_logs
from .sources import register_source


@register_source
class ChatLogs(ConversationSource):
    """Chat logs of the user's own. One in ten users (or conversations that name none) is validation, one test.

    Args:
        path: a .jsonl file or a folder of them (see :func:`~ccm.data.logs.read_logs`).
        strict: end with an error if a line or a message has to be left out, which is else counted in :attr:`tally`.
        turns, facts, echoes: see :class:`~ccm.data.conversational.ConversationSource`; the default for ``turns``
            is 8 and 16, because chats with an assistant are short.
    """

    name, title = "jsonl", "Your own chat logs"
    licence, origin = "yours", "a .jsonl file or folder: path="

    def __init__(
        self,
        tokenizer: Any,
        path: str | Path,
        turns: Any = (8, 16),
        strict: bool = False,
        **options: Any,
    ):
        if not isinstance(strict, bool):
            raise ConfigError(f"strict is {strict!r}: expected true or false")
        self.path, self.strict = Path(path), strict
        super().__init__(tokenizer, turns, **options)

    @cached_property
    def _read(self) -> tuple[dict[Split, list[Conversation]], Tally]:
        splits: dict[Split, list[Conversation]] = {"train": [], "validation": [], "test": []}
        talks, tally = read_logs(self.path, self.strict)
        for talk in talks:
            key = (
                f"user {talk.users[0]}"
                if talk.users
                else "\n".join(f"{t.role}: {t.text}" for t in talk.turns)
            )
            splits[split_of(key)].append(talk)
        return splits, tally

    @property
    def tally(self) -> Tally:
        return self._read[1]

    def conversations(self, split: Split) -> list[Conversation]:
        return self._read[0][split]
