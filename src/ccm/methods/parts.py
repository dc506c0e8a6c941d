"""What the entries of a memory stand for: stretches of the text, in tokens since its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.memory import Row

#: What a part's entries are: the very tokens, word for word.
RAW = "raw"
#: The kind of the parts that a user has pinned.
PINNED = "pinned"


@dataclass(frozen=True)
class Part:
    """Neighbouring entries of a memory that stand for one stretch of text.

    Attributes:
        kind: where they are: :data:`PINNED`, "sink", "slots" or "window".
        how: what they are: :data:`RAW`, or what became of the text, such as "folded".
        entries: (start, stop) among [pinned | sink | slots | window].
        tokens: (start, stop) of the text; equal: of none of it.
        turns: (start, stop) among the turns of a conversation, once these are known; equal: of none of them.
    """

    kind: str
    how: str
    entries: tuple[int, int]
    tokens: tuple[int, int]
    turns: tuple[int, int] = (0, 0)


def behind(parts: Sequence[Part], kind: str, how: str, count: int, tokens: tuple[int, int]) -> list[Part]:
    """The parts with ``count`` entries more; no part is empty."""
    start = parts[-1].entries[1] if parts else 0
    return [*parts, Part(kind, how, (start, start + count), tokens)] if count else list(parts)


def pinned(row: Row) -> list[Part]:
    """What a row begins with: the text that is pinned."""
    return behind([], PINNED, RAW, row.pinned, (0, 0))
