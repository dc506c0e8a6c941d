"""Which tokens of a row are learned, and where they are in the student's pass and in the teacher's.

Rows come as segments with scored columns. Here each token gets a role instead, so that segments can be joined,
split and repeated without losing track of what is scored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.rows import ConversationRow
from .objectives import Objective, summed_loss

#: Roles: not learned; learned by the objective; known only from an earlier segment; written back.
NONE, TEXT, RECALL, ECHO = range(4)

#: Scored tokens of a repeated segment that only say which segment it is.
CUE = 4


@dataclass(frozen=True)
class Row:
    """Segments of token ids, and the role of every token in them."""

    segments: tuple[tuple[int, ...], ...]
    roles: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(map(len, self.segments))

    def __add__(self, other: Row) -> Row:
        return Row(self.segments + other.segments, self.roles + other.roles)

    def part(self, start: int, stop: int | None = None) -> Row:
        """Some of the segments."""
        return Row(self.segments[start:stop], self.roles[start:stop])

    def flat(self) -> Row:
        """The same tokens as one segment."""
        return Row((sum(self.segments, ()),), (sum(self.roles, ()),)) if self.segments else self

    def unscored(self) -> Row:
        """The same row with nothing scored."""
        return Row(self.segments, tuple((NONE,) * len(ids) for ids in self.segments))


def marked(row: ConversationRow) -> Row:
    """A row of the data with the role of each token; the first of a segment has nothing to be foreseen from."""
    roles = []
    for ids, (start, stop) in zip(row.segments, row.content, strict=True):
        roles.append([TEXT if max(start, 1) <= t < stop else NONE for t in range(len(ids))])
    for index, start, stop in row.recall:
        roles[index][start:stop] = [RECALL] * (stop - start)
    return Row(row.segments, tuple(map(tuple, roles)))


def only_last(row: Row) -> Row:
    """Of the text only the last segment is scored (the paper's objective); echoes stay."""
    last = max((i for i, roles in enumerate(row.roles) if TEXT in roles or RECALL in roles), default=0)
    return Row(
        row.segments,
        tuple(
            tuple(role if i == last or role == ECHO else NONE for role in roles)
            for i, roles in enumerate(row.roles)
        ),
    )


def scored_from(row: Row, first: int) -> Row:
    """Only segments from ``first`` on are scored."""
    return row.part(0, first).unscored() + row.part(first)


def resegmented(row: Row, rng: random.Random, longest: int = 64) -> Row:
    """Other boundaries for the same tokens: neighbours are joined at random, and long segments split.

    What is to be foreseen at the end stays the last segment.
    """
    pieces: list[Row] = []
    for index in range(len(row.segments) - 1):
        piece = row.part(index, index + 1)
        length = piece.tokens
        if pieces and rng.random() < 0.3 and pieces[-1].tokens + length <= 2 * longest:
            pieces[-1] = (pieces[-1] + piece).flat()
        elif length >= longest // 2 and rng.random() < 0.5:
            pieces += _split(piece, rng.randrange(length // 4, length - length // 4))
        else:
            pieces.append(piece)
    return sum(pieces, Row((), ())) + row.part(-1)


def recut(row: Row, rng: random.Random, shortest: int = 16, longest: int = 256) -> Row:
    """The same tokens, cut into pieces as a session folds them, regardless of turns.

    One length for the row, evenly on a logarithmic scale between ``shortest`` and ``longest``, and at most half of
    the row. The last piece reaches back far enough that something of it is scored.
    """
    (ids,), (roles,) = row.flat().segments, row.flat().roles
    length = min(int(shortest * (longest / shortest) ** rng.random()), max(2, len(ids) // 2))
    scored = max((t for t, role in enumerate(roles) if role != NONE), default=0)
    cuts = [at for at in range(length, len(ids), length) if at < scored]
    rest, pieces = Row((ids,), (roles,)), Row((), ())
    for at in reversed(cuts):
        rest, piece = _split(rest, at)
        pieces = piece + pieces
    return rest + pieces


def _split(piece: Row, at: int) -> list[Row]:
    (ids,), (roles,) = piece.segments, piece.roles
    return [Row((ids[:at],), (roles[:at],)), Row((ids[at:],), ((NONE, *roles[at + 1 :]),))]


def with_echo(row: Row, rng: random.Random, longest: int) -> Row:
    """One more segment that repeats an earlier one: to foresee it, a memory must have kept the words.

    Its first words are not scored; they say which segment it is. Rows that would pass ``longest`` stay as they are.
    """
    able = [i for i, roles in enumerate(row.roles[:-1]) if sum(role != NONE for role in roles) > CUE]
    if not able:
        return row
    index = rng.choice(able)
    ids, roles = row.segments[index], row.roles[index]
    if row.tokens + len(ids) > longest:
        return row
    scored = [t for t, role in enumerate(roles) if role != NONE][CUE:]
    return row + Row((ids,), (tuple(ECHO if t in scored else NONE for t in range(len(ids))),))


class Targets:
    """Tokens of one role: their ids, and the places they are foreseen from, (row, column) each.

    Attributes:
        student: places in the student's pass.
        teacher: places in a pass over each row as one segment.
        ids: the tokens.
    """

    def __init__(self) -> None:
        self.student: list[tuple[int, int]] = []
        self.teacher: list[tuple[int, int]] = []
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def loss(self, student: Tensor, teacher: Tensor | None, head: Any, objective: Objective) -> Tensor:
        """Summed loss from hidden states (B, Q, d) of the two passes; without a teacher only the text counts."""
        own = _gather(student, self.student)
        taught = own if teacher is None else _gather(teacher, self.teacher)
        return summed_loss(own, taught, torch.tensor(self.ids, device=student.device), head, objective)


def find_targets(rows: Sequence[Row], spans: Sequence[Sequence[tuple[int, int]]]) -> dict[int, Targets]:
    """The targets of a batch by role.

    Args:
        rows: the batch.
        spans: columns (start, stop) of every segment in the student's pass.
    """
    found = {role: Targets() for role in (TEXT, RECALL, ECHO)}
    for r, row in enumerate(rows):
        offset = 0
        for i, (ids, roles) in enumerate(zip(row.segments, row.roles, strict=True)):
            start = spans[r][i][0]
            for t, role in enumerate(roles):
                if role != NONE:
                    target = found[role]
                    target.student.append((r, start + t - 1))
                    target.teacher.append((r, offset + t - 1))
                    target.ids.append(ids[t])
            offset += len(ids)
    return found


def _gather(hidden: Tensor, places: list[tuple[int, int]]) -> Tensor:
    row, column = torch.tensor(places, dtype=torch.long, device=hidden.device).view(-1, 2).T
    return hidden[row, column]
