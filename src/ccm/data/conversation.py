"""What a conversation is, and which split its speakers belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ..chat.messages import Message
from ..errors import UnknownNameError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one person said before the other answered; several messages are joined by newlines.

    Attributes:
        role: who speaks.
        text: what is said.
        message: the message itself where it is more than its text: calls and results of tools, thoughts.
    """

    role: Role
    text: str
    message: Message | None = None


@dataclass(frozen=True)
class Conversation:
    """A conversation, most often of two people whose turns alternate, beginning with the role ``user``.

    ``users`` holds the (anonymous) ids of the two people: first the one in the role ``user``.
    """

    id: str
    users: tuple[str, ...]
    turns: tuple[Turn, ...]


def alternating(said: Iterable[str]) -> tuple[Turn, ...]:
    """Turns of two people who take turns, the user first; whose text is empty says nothing."""
    return tuple(Turn("assistant" if k % 2 else "user", text) for k, text in enumerate(said) if text)


def unit(name: str) -> float:
    """Map a name to [0, 1) in a way that looks random and never changes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(name: str, validation: float = 0.1, test: float = 0.1) -> Split:
    """The split of whatever has this name, by a hash: the same everywhere and for ever."""
    place = unit(name)
    return "test" if place < test else "validation" if place < test + validation else "train"


def check_split(split: str) -> None:
    """Raise :class:`~ccm.errors.UnknownNameError` unless ``split`` is one."""
    if split not in SPLITS:
        raise UnknownNameError("split", split, list(SPLITS))
