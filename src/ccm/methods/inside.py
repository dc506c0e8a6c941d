"""Inside a memory: which turns each entry stands for, and which entries an answer read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.memory import Memory, Row
from ..core.reader import Reader
from .base import Method
from .parts import PINNED, RAW, Part
from .scores import weights

#: What a saved session knows of its turns: the newest so many, and of each so many characters.
TURNS, CHARACTERS = 1000, 200
#: Groups of layers that a picture shows, at most.
GROUPS = 6
#: Queries whose weights are held at once.
CHUNK = 32


@dataclass(frozen=True)
class Said:
    """One turn of a conversation.

    Attributes:
        role: who spoke.
        text: what was said, or its beginning; None: it was not kept.
        tokens: of the turn, with those that the chat template adds.
    """

    role: str
    text: str | None
    tokens: int

    def shown(self) -> Said:
        """The same with the beginning of its text alone."""
        return replace(self, text=self.text and self.text[:CHARACTERS])


def as_saved(turns: Sequence[Said]) -> list[list[Any]]:
    """Turns as a session file keeps them; the newest ones, and of each the beginning."""
    return [[turn.role, turn.shown().text, turn.tokens] for turn in turns[-TURNS:]]


def saved(state: Mapping[str, Any]) -> tuple[Said, ...]:
    """The turns of a session file's state; files from before these were kept have none.

    Raises:
        TypeError, ValueError: they are not as they were written.
    """
    turns = tuple(Said(role, text, tokens) for role, text, tokens in state.get("said", ()))
    for turn in turns:
        if type(turn.tokens) is not int or turn.tokens < 0 or not isinstance(turn.role, str):
            raise ValueError(f"a turn of {turn.role!r} and {turn.tokens!r} tokens")
        if not isinstance(turn.text, str | None):
            raise TypeError(f"a turn that says {type(turn.text).__name__}")
    return turns


def saved_pins(state: Mapping[str, Any]) -> tuple[str, ...]:
    """What was pinned, from a session file's state; older files have none.

    Raises:
        TypeError: it is not as it was written.
    """
    pins = tuple(state.get("pins", ()))
    if not all(isinstance(text, str) for text in pins):
        raise TypeError("pins that are no texts")
    return pins


@dataclass(frozen=True)
class Reading:
    """What an answer read.

    Attributes:
        row: the memory as the answer read it.
        weights: (L, N) in fp32, of N entries [sink | slots | window | prompt and answer]: the attention that a layer
            gives to each, as a mean over its heads and over the places where the answer's tokens are written.
    """

    row: Row
    weights: Tensor


def read_by(method: Method, memory: Memory, prompt: Sequence[int], answer: Sequence[int]) -> Reading:
    """The attention that an answer pays to a memory: the model's own, from one pass over it.

    Args:
        method: bound to the model.
        memory: of one conversation, as it was when the answer began.
        prompt: token ids that the answer is written behind, at least one.
        answer: its token ids, at least one.

    Raises:
        ConfigError: memory and text together are longer than the model's context.
    """
    held = method.recall(memory)
    ids = [*prompt, *answer[:-1]]
    return Reading(held.rows[0], attended(method.reader, held, ids, len(answer)))


@torch.no_grad()
def attended(reader: Reader, memory: Memory, ids: Sequence[int], newest: int) -> Tensor:
    """(L, N): mean attention of the newest tokens of a text to [sink | slots | window | text], per layer."""
    ((text, queries),) = reader.watch([list(ids)], memory, newest=newest)
    row = memory.rows[0]
    keys = torch.cat([kv.keys.float() for kv in (row.sink, row.slots, row.window, text)], dim=2)
    fixed, start = row.sink.length + row.slots.length, keys.shape[2] - newest
    total = torch.zeros(len(keys), keys.shape[2], device=keys.device)
    for first in range(0, newest, CHUNK):
        part = queries[:, :, first : first + CHUNK]
        total += weights(reader, part, keys, memory=fixed, start=start + first).sum(dim=(1, 2, 3))
    return (total / (queries.shape[1] * newest)).cpu()


@dataclass(frozen=True)
class Line:
    """One line of a picture: neighbouring parts of one kind that stand for the same turns.

    Attributes:
        kind, how, entries, turns: as of a :class:`~ccm.methods.parts.Part`; "prompt" is what follows the memory.
        tokens: of the text that they stand for.
        read: share of attention by layer group; empty without a reading.
    """

    kind: str
    how: str
    entries: tuple[int, int]
    turns: tuple[int, int]
    tokens: int
    read: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inside:
    """A memory taken apart.

    Attributes:
        turns: of the conversation, oldest first, as far as they are known.
        parts: of the memory; neighbouring entries that stand for the same text.
        layers: (start, stop) of each layer group; empty without a reading.
        read: share of attention of each layer group: to each part, and last to prompt and answer themselves.
        answer: that read it.
        pins: what is pinned.
    """

    turns: tuple[Said, ...]
    parts: tuple[Part, ...]
    layers: tuple[tuple[int, int], ...] = ()
    read: tuple[tuple[float, ...], ...] = ()
    answer: str | None = None
    pins: tuple[str, ...] = ()

    def lines(self) -> list[Line]:
        """What a picture shows, top to bottom."""
        columns = list(zip(*self.read, strict=True)) if self.read else [()] * (len(self.parts) + 1)
        found = []
        pairs = list(zip(self.parts, columns, strict=False))
        for (kind, how, turns), group in groupby(
            pairs, lambda pair: (pair[0].kind, pair[0].how, pair[0].turns)
        ):
            parts, shares = zip(*group, strict=True)
            entries = parts[0].entries[0], parts[-1].entries[1]
            tokens = _length(entries) if kind == PINNED else sum(_length(p.tokens) for p in parts)
            found.append(Line(kind, how, entries, turns, tokens, tuple(map(sum, zip(*shares, strict=True)))))
        if self.read:
            end = self.parts[-1].entries[1] if self.parts else 0
            found.append(Line("prompt", RAW, (end, end), (len(self.turns), len(self.turns)), 0, columns[-1]))
        return found

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        lines = [asdict(line) for line in self.lines()]
        return {
            "turns": [asdict(turn) for turn in self.turns],
            "parts": [asdict(part) for part in self.parts],
            "layers": [list(group) for group in self.layers],
            "read": [list(shares) for shares in self.read],
            "answer": self.answer,
            "pins": list(self.pins),
            "lines": lines,
        }


def look(
    method: Method,
    row: Row,
    turns: Sequence[Said],
    reading: Reading | None = None,
    answer: str | None = None,
    pins: Sequence[str] = (),
) -> Inside:
    """Take a memory apart.

    Args:
        method: that made it; it need not be bound.
        row: what is held; with a reading, what that says was read counts.
        turns: what was said, oldest first; where that is less than the memory was made of, it is the newest part.
        reading: of an answer.
        answer: its text.
        pins: what is pinned, as far as it is known.
    """
    row = row if reading is None else reading.row
    whole = sum(turn.tokens for turn in turns) == row.seen
    lengths = [n for turn in turns for n in cut(turn.tokens, method.longest)] if whole else []
    parts = method.parts(row, lengths)
    end = max((part.tokens[1] for part in parts), default=0)
    placed = tuple(piece for part in parts for piece in _placed(part, _starts(turns, end)))
    if reading is None:
        return Inside(tuple(turns), placed, pins=tuple(pins))
    layers = groups(len(reading.weights))
    bounds = [part.entries for part in placed]
    held = bounds[-1][1] if bounds else 0
    bounds.append((held, reading.weights.shape[1]))
    read = tuple(
        tuple(float(reading.weights[a:b, start:stop].sum(1).mean()) for start, stop in bounds)
        for a, b in layers
    )
    return Inside(tuple(turns), placed, layers, read, answer, tuple(pins))


def cut(tokens: int, longest: int) -> list[int]:
    """Lengths of the segments that a turn is taken in as."""
    return [min(longest, tokens - start) for start in range(0, tokens, longest)]


def groups(layers: int, most: int = GROUPS) -> tuple[tuple[int, int], ...]:
    """Layers in at most so many groups of nearly equal size, as (start, stop)."""
    count = min(layers, most)
    bounds = [round(layers * i / count) for i in range(count + 1)]
    return tuple(pairwise(bounds))


def _starts(turns: Sequence[Said], end: int) -> list[int]:
    """Where each turn begins in a text of so many tokens, and where the last one ends; the newest ends the text."""
    starts = [end]
    for turn in reversed(turns):
        starts.append(starts[-1] - turn.tokens)
    return starts[::-1]


def _placed(part: Part, starts: Sequence[int]) -> Iterator[Part]:
    """A part with its turns; one that is raw is cut where a turn ends."""
    first, last = part.tokens
    count = len(starts) - 1
    own = [i for i in range(count) if starts[i] < last and starts[i + 1] > first]
    if part.how != RAW or part.kind == PINNED:
        yield replace(part, turns=(own[0], own[-1] + 1) if own else (0, 0))
        return
    begin = part.entries[0] - first
    if first < min(last, starts[0]):
        stop = min(last, starts[0])
        yield replace(part, entries=(first + begin, stop + begin), tokens=(first, stop))
    for i in own:
        start, stop = max(first, starts[i]), min(last, starts[i + 1])
        yield Part(part.kind, part.how, (start + begin, stop + begin), (start, stop), (i, i + 1))


def _length(tokens: tuple[int, int]) -> int:
    return tokens[1] - tokens[0]
