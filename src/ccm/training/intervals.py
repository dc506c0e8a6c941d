"""Rows of any length side by side in one pass without padding, and who sees whom as intervals.

All text comes first, then all COMP tokens, so that the adapter applies to one slice at the end. Two rows, one of
three segments and one of two, with one slot (upper case is COMP)::

    a a b b b c | d d e | A B | D

A key is seen by an interval of the text and by an interval of the COMP tokens: a text token by what follows in its
segment and by the COMP tokens of the segment, a slot by all text and COMP tokens behind its fold. Where a window
keeps the raw text of earlier segments, their intervals are longer. So every rule, window and batch is four numbers a
key. A mask or a block mask is made of them where the pass runs (``ccm.training.lean``); it is that of
``ccm.core.visibility``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.rule import Rule
from .packed import ArrayRow

#: Columns come in multiples of it, as blocks of a mask do.
BLOCK = 128


@dataclass(frozen=True)
class Packed:
    """One pass over packed rows: T columns of text, C of COMP tokens, M keys of the memory.

    Attributes:
        ids: (T,) token ids, 0 on padding.
        comp: (C,) index of each COMP token in its group.
        position: (T + C,) where queries and keys of the text are rotated.
        query_position: (T + C,) where queries that meet sinks and slots are; None where that is the same.
        sinks: (K,) columns of the sink tokens.
        slot_position: (M,) of the sink tokens, then of the slots.
        states: (3, N) row, column and weight of a sparse matrix (S, G) that makes the S blocks of all states of the
            memory from the G blocks of the folds; None is the identity (concat).
        blocks, folds: S and G.
        spans: by the distance that a layer sees (None is any): (4, M + T + C), of each key the first query of the
            text and the one behind the last, and the same of the COMP tokens.
        slots: COMP tokens of a group.
        tokens: of text, without padding.
    """

    ids: Tensor
    comp: Tensor
    position: Tensor
    query_position: Tensor | None
    sinks: Tensor
    slot_position: Tensor
    states: Tensor | None
    blocks: int
    folds: int
    spans: dict[int | None, Tensor]
    slots: int
    tokens: int

    def to(self, device: torch.device) -> Packed:
        """On a device, without waiting for it."""
        return Packed(**{f.name: moved(getattr(self, f.name), device) for f in fields(self)})


def moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, without waiting for it."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, Tensor):
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
    return value


def pack(
    rows: Sequence[ArrayRow],
    rule: Rule,
    *,
    slots: int,
    sink: int = 0,
    window: int = 0,
    near: Sequence[int | None] = (None,),
    text: int = 0,
    comps: int = 0,
    sinks: int = 0,
) -> Packed:
    """Pack rows; every segment but the last of a row is folded.

    Args:
        rows: at least one, without empty segments.
        rule: of the memory.
        slots, sink, window: as of :func:`ccm.core.segments.lay_out`.
        near: distances that the layers see (None: any).
        text, comps, sinks: columns of text, COMP tokens and sink tokens, multiples of ``BLOCK``; 0 takes what is
            needed, and too few of the last are as many as needed.
    """
    lengths = np.concatenate([np.diff(row.stops, prepend=0) for row in rows])  # of every segment
    counts = np.array([len(row.stops) for row in rows])
    doc = np.repeat(np.arange(len(rows)), counts)  # of every segment its row
    first = np.cumsum(counts) - counts  # of every row its first segment
    index = np.arange(len(doc)) - first[doc]  # of every segment, in its row
    ends = np.cumsum(lengths)
    starts = ends - lengths
    row_start, row_end = starts[first], ends[first + counts - 1]
    total = int(ends[-1])
    groups = counts - 1
    group = (np.cumsum(groups) - groups)[doc] + index  # of every segment that is folded
    made = np.flatnonzero(index < groups[doc])
    folded = _folded(starts, first[doc], index, window)
    held = np.where(groups > 0, np.minimum(sink, lengths[first]), 0)
    sizes = np.array([rule.size(k, slots) for k in range(int(counts.max()) + 1)])
    width = text or up(total)
    comp_width = max(comps, up(len(made) * slots)) if len(made) else 0

    def shift(segments: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """From text to canonical positions: less what was folded, plus what took its place."""
        own = doc[segments]
        return np.where(seen > 0, held[own] + sizes[seen], 0) - (starts[first[own] + seen] - row_start[own])

    comp = np.tile(np.arange(slots), len(made))
    position = np.zeros(width + comp_width, np.int64)
    query = np.zeros_like(position)
    text_part, comp_part = slice(0, total), slice(width, width + len(comp))
    position[text_part] = np.arange(total) - np.repeat(row_start[doc], lengths)
    position[comp_part] = np.repeat(ends[made] - row_start[doc[made]], slots) + comp
    query[text_part] = position[text_part] + np.repeat(shift(np.arange(len(doc)), folded), lengths)
    query[comp_part] = position[comp_part] + np.repeat(shift(made, index[made]), slots)

    memory = {many: _Memory.of(rule, many, slots) for many in set(groups.tolist())}
    memories = [memory[many] for many in groups.tolist()]
    seen_by = [
        _Queries(
            folded[f : f + many + 1],
            np.append(starts[f : f + many + 1], row_end[d]),
            width + (int(group[f]) + np.arange(many + 1)) * slots,
        )
        for d, (f, many) in enumerate(zip(first.tolist(), groups.tolist(), strict=True))
    ]
    sink_seen = [
        np.repeat(queries(np.array([1]), np.array([many])), kept, axis=1)
        for queries, many, kept in zip(seen_by, groups, held, strict=True)
    ]
    slot_seen = [queries(m.first, m.last) for queries, m in zip(seen_by, memories, strict=True)]
    first_tokens = np.concatenate([row_start[d] + np.arange(held[d]) for d in range(len(rows))])
    sink_width = max(sinks, up(len(first_tokens))) if comp_width else 0
    blocks = sum(len(m.place) for m in memories) // slots
    slot_width = max(comp_width, up(blocks * slots))
    place = np.zeros(sink_width + slot_width, np.int64)
    place[: len(first_tokens)] = first_tokens - np.repeat(row_start, held)
    place[sink_width : sink_width + blocks * slots] = np.concatenate(
        [m.place + held[d] for d, m in enumerate(memories)]
    )
    states = None
    if any(m.weights is not None for m in memories):
        states = _joined(memories)

    spans: dict[int | None, Tensor] = {}
    columns = np.arange(total)
    order = doc * int(counts.max() + 1)  # rows one behind the other
    last = np.searchsorted(order + folded, order + index, side="right") - 1  # that still sees the segment raw
    has = index < groups[doc]
    to_comps = np.where(has, width + group * slots, 0)
    for distance in near:
        stop, from_comp = np.repeat(ends[last], lengths), np.repeat(to_comps, lengths)
        to_comp = from_comp + np.repeat(np.where(has, slots, 0), lengths)
        if distance is not None:
            stop = np.minimum(stop, columns + distance)
            to_comp = np.clip(from_comp + distance - (np.repeat(ends, lengths) - columns), from_comp, to_comp)
        own = width + np.arange(len(comp))
        parts = [
            _filled(sink_seen, sink_width),
            _filled(slot_seen, slot_width),
            _alone(np.stack([columns, stop, from_comp, to_comp]), width, 0),
            _alone(np.stack([0 * own, 0 * own, own, own - comp + slots]), comp_width, width),
        ]
        spans[distance] = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int32))
    return Packed(
        ids=torch.from_numpy(_to(np.concatenate([row.ids for row in rows]).astype(np.int64), width)),
        comp=torch.from_numpy(_to(comp, comp_width)),
        position=torch.from_numpy(position if window else query),
        query_position=torch.from_numpy(query) if window else None,
        sinks=torch.from_numpy(_to(first_tokens, sink_width)),
        slot_position=torch.from_numpy(place),
        states=states,
        blocks=blocks,
        folds=len(made),
        spans=spans,
        slots=slots,
        tokens=total,
    )


def up(count: int) -> int:
    """The next multiple of a block."""
    return -(-count // BLOCK) * BLOCK


@dataclass(frozen=True)
class _Memory:
    """All states of a row's memory side by side, a column a slot.

    Attributes:
        first, last: (S n,) number of folds from which on, and up to which, the column is in the memory.
        place: (S n,) of the slot in the memory.
        weights: (S, G) of the folds' blocks in each block of the states; None is the identity.
    """

    first: np.ndarray
    last: np.ndarray
    place: np.ndarray
    weights: np.ndarray | None

    @classmethod
    def of(cls, rule: Rule, groups: int, slots: int) -> _Memory:
        if not groups:
            none = np.zeros(0, np.int64)
            return cls(none, none, none, None)
        first, last, place = (part.numpy() for part in rule.placed(groups, slots))
        # every rule is linear: what it makes of unit vectors are its weights
        weights = rule.columns(torch.eye(groups).view(1, 1, groups, 1, groups))[0, 0].numpy()
        same = weights.shape == (groups, groups) and np.array_equal(weights, np.eye(groups))
        return cls(first, last, place, None if same else weights)


@dataclass(frozen=True)
class _Queries:
    """Of one row, which queries see how many folds.

    Attributes:
        seen: (G + 1,) folds that the text of each segment sees.
        text: (G + 2,) first column of each segment, and where the last one ends.
        comps: (G + 1,) first column of each group of COMP tokens, and where the last one ends.
    """

    seen: np.ndarray
    text: np.ndarray
    comps: np.ndarray

    def __call__(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """(4, N) spans of the queries that see ``low`` to ``high`` folds; the COMP tokens of group j see j."""
        end = len(self.comps) - 1
        return np.stack(
            [
                self.text[np.searchsorted(self.seen, low, "left")],
                self.text[np.searchsorted(self.seen, high, "right")],
                self.comps[np.minimum(low, end)],
                self.comps[np.minimum(high + 1, end)],
            ]
        )


def _folded(starts: np.ndarray, first: np.ndarray, index: np.ndarray, window: int) -> np.ndarray:
    """For each segment, how many earlier ones of its row are folded when it comes (``segments.folded_before``)."""
    oldest = np.searchsorted(starts, starts - window, side="left")
    return np.clip(oldest - first, 0, index)


def _joined(memories: Sequence[_Memory]) -> Tensor:
    """The weights of all rows, as (3, N) rows, columns and values of one sparse matrix."""
    parts, row, column = [], 0, 0
    for memory in memories:
        if len(memory.place):
            weights = np.eye(memory.last.max()) if memory.weights is None else memory.weights
            i, j = np.nonzero(weights)
            parts.append(np.stack([i + row, j + column, weights[i, j]]))
            row, column = row + weights.shape[0], column + weights.shape[1]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _to(values: np.ndarray, width: int) -> np.ndarray:
    """Filled up with zeros."""
    return np.pad(values, (0, width - len(values)))


def _filled(spans: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Keys of the memory, filled up with keys that nobody sees."""
    joined = np.concatenate([np.zeros((4, 0), np.int64), *spans], axis=1)
    return np.pad(joined, ((0, 0), (0, width - joined.shape[1])))


def _alone(spans: np.ndarray, width: int, start: int) -> np.ndarray:
    """Keys at columns from ``start`` on, filled up with padding that sees itself: no query is without a key."""
    more = np.arange(start + spans.shape[1], start + width)
    nobody = np.zeros_like(more)
    own = (more, more + 1, nobody, nobody) if not start else (nobody, nobody, more, more + 1)
    return np.concatenate([spans, np.stack(own)], axis=1)
