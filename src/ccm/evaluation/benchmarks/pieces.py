"""Long texts and long turns in pieces that a memory folds one by one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...chat.turns import RenderedTurn, render_dialogue
from ...methods.base import LONGEST
from ..items import Ids
from ..tasks.choosing import encode

#: Tokens of a text in one piece: with what the template adds around them they are folded at once.
PIECE = LONGEST - 16
#: Where a text may end, the best first: a line, a sentence, a part of it, a word.
_ENDS = (r"(?<=\n)", r"(?<=[.!?])\s+", r"(?<=[,;:])\s+", r"\s+")


def turns(tokenizer: Any, said: Sequence[tuple[str, str]]) -> tuple[Ids, ...]:
    """Turns (role, text) as segments; one that is longer than a fold takes at once is several. Silence is none."""
    rendered = render_dialogue(tokenizer, [(role, text) for role, text in said if text.strip()])
    return tuple(piece for turn in rendered for piece in even(turn))


def even(turn: RenderedTurn) -> Iterator[Ids]:
    """A turn in as few pieces as possible, of similar length."""
    count = -(-len(turn.ids) // LONGEST)
    size = -(-len(turn.ids) // count)
    yield from (turn.ids[k : k + size] for k in range(0, len(turn.ids), size))


def packed(tokenizer: Any, parts: Iterable[str], most: int = PIECE) -> list[str]:
    """Neighbouring parts of a text joined to pieces of at most ``most`` tokens; longer ones are cut."""
    pieces: list[str] = []
    held, size = "", 0
    for part, tokens in _short(tokenizer, parts, most, 0):
        if held and size + tokens > most:
            pieces.append(held)
            held, size = "", 0
        held, size = held + part, size + tokens
    return [piece.strip() for piece in [*pieces, held] if piece.strip()]


def lines(text: str) -> list[str]:
    """A text cut behind every line."""
    return text.splitlines(keepends=True)


def _short(tokenizer: Any, parts: Iterable[str], most: int, level: int) -> Iterator[tuple[str, int]]:
    """Parts of at most ``most`` tokens, each with its number of them."""
    for part in parts:
        tokens = len(encode(tokenizer, part))
        if tokens <= most:
            yield part, tokens
        elif level < len(_ENDS):
            yield from _short(tokenizer, _cut(part, _ENDS[level]), most, level + 1)
        else:  # one word without an end
            size = max(1, len(part) * most // tokens // 2)
            for k in range(0, len(part), size):
                yield part[k : k + size], len(encode(tokenizer, part[k : k + size]))


def _cut(text: str, end: str) -> list[str]:
    """A text cut behind every place that fits; nothing is lost."""
    places = [0, *(match.end() for match in re.finditer(end, text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places) if a < b]
