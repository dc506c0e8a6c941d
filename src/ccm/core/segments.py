"""Rows of segments, laid out for one parallel pass.

A row is a conversation (or a stream, or a list of demonstrations) cut into segments. Every segment but the
last is followed by its group of COMP tokens; for two segments and two slots a row reads

    token     t0 t1 t2 C0 C1 u0 u1
    segment    0  0  0  0  0  1  1
    comp      -1 -1 -1  0  1 -1 -1
    folded     0  0  0  0  0  1  1      how many groups this token sees as slots

Two position frames are used. The *text* frame counts text tokens from the start of the row. The *canonical*
frame is the one of inference: sink tokens, then slots at fixed places, then live text. Rotary attention only
sees differences, so raw text may be rotated in either frame, but slots only exist in the canonical one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .rule import Rule
from .window import overflow


@dataclass(frozen=True)
class Layout:
    """A ragged batch of rows on a grid of B rows and Q columns, right-padded.

    Attributes:
        input_ids: (B, Q) token ids, 0 at COMP tokens and padding.
        segment: (B, Q) index of the segment, -1 on padding.
        comp: (B, Q) index of a COMP token in its group, -1 on text.
        folded: (B, Q) number of groups that the token sees as slots.
        text_position: (B, Q) position in the text frame.
        position: (B, Q) position in the canonical frame.
        comp_index: (B, G, n) column of each COMP token, 0 where a row has fewer groups.
        sink: (B,) raw tokens that stay at the start of the row.
        windowed: whether any token sees raw text of an earlier segment.
        spans: per row, the (start, stop) columns of each segment's text.
    """

    input_ids: Tensor
    segment: Tensor
    comp: Tensor
    folded: Tensor
    text_position: Tensor
    position: Tensor
    comp_index: Tensor
    sink: Tensor
    windowed: bool
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def rope_position(self) -> Tensor:
        """(B, Q) positions at which the model rotates queries and keys."""
        return self.text_position if self.windowed else self.position

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device."""
        return Layout(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


#: (token id, segment, comp, folded, text position, canonical position)
Token = tuple[int, int, int, int, int, int]
PADDING: Token = (0, -1, -1, 0, 0, 0)


def folded_before(lengths: Sequence[int], window: int) -> list[int]:
    """For each segment, how many earlier ones are folded when it arrives.

    The recent window keeps the newest whole segments whose tokens sum to at most ``window``.
    """
    folded = [0]
    for index in range(1, len(lengths)):
        folded.append(folded[-1] + overflow(lengths[folded[-1] : index], window))
    return folded


def lay_out(
    rows: Sequence[Sequence[Sequence[int]]], *, slots: int, rule: Rule, sink: int = 0, window: int = 0
) -> Layout:
    """Lay out rows of segments of token ids.

    Args:
        rows: rows of segments of token ids; every segment but the last of a row is folded.
        slots: COMP tokens per segment (n).
        rule: how the memory changes with each block; it knows how many slots there are after a step.
        sink: first tokens of the first segment that stay raw.
        window: raw tokens of the newest whole segments that stay beside the slots.

    Raises:
        ConfigError: no row, a row without a segment, or an empty segment.
    """
    if not rows or any(not row for row in rows):
        raise ConfigError(f"segments: got {len(rows)} rows, one without a segment; give at least one each")
    laid: list[list[Token]] = []
    spans: list[tuple[tuple[int, int], ...]] = []
    groups: list[list[list[int]]] = []
    sinks: list[int] = []
    for r, row in enumerate(rows):
        lengths = [len(segment) for segment in row]
        if 0 in lengths:
            raise ConfigError(
                f"segments: row {r}, segment {lengths.index(0)} is empty; give at least one token"
            )
        folded = folded_before(lengths, window)
        offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        held = min(sink, lengths[0])

        # canonical = text position + shift(groups seen): less what was folded, plus what replaced it
        def shift(seen: int, offsets: list[int] = offsets, held: int = held) -> int:
            return (held + rule.size(seen, slots) if seen else 0) - offsets[seen]

        tokens: list[Token] = []
        row_spans: list[tuple[int, int]] = []
        row_groups: list[list[int]] = []
        for j, segment in enumerate(row):
            start = len(tokens)
            moved = shift(folded[j])
            for text, token in enumerate(segment, offsets[j]):
                tokens.append((token, j, -1, folded[j], text, text + moved))
            row_spans.append((start, len(tokens)))
            if j + 1 == len(row):
                break
            row_groups.append(list(range(len(tokens), len(tokens) + slots)))
            moved = shift(j)  # all before the segment that is being folded is folded
            first = offsets[j] + lengths[j]
            for i in range(slots):
                tokens.append((0, j, i, j, first + i, first + i + moved))
        laid.append(tokens)
        spans.append(tuple(row_spans))
        groups.append(row_groups)
        sinks.append(held)

    width = max(map(len, laid))
    most = max(map(len, groups))
    grid = torch.tensor([tokens + [PADDING] * (width - len(tokens)) for tokens in laid])
    input_ids, segment_of, comp, folds, text_position, position = grid.unbind(-1)
    padded = [row_groups + [[0] * slots] * (most - len(row_groups)) for row_groups in groups]
    return Layout(
        input_ids=input_ids,
        segment=segment_of,
        comp=comp,
        folded=folds,
        text_position=text_position,
        position=position,
        comp_index=torch.tensor(padded, dtype=torch.long).view(len(rows), most, slots),
        sink=torch.tensor(sinks),
        windowed=window > 0,
        spans=tuple(spans),
    )


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T), padding at the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask
