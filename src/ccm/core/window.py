"""The recent window: new text joins it raw, and what no longer fits leaves it, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .memory import KV, Row


def overflow(lengths: Sequence[int], window: int) -> int:
    """How many of the oldest segments leave a window: the newest whole ones that fit it stay.

    Args:
        lengths: token counts of the raw segments, oldest first.
        window: tokens that may stay.
    """
    raw = sum(lengths)
    gone = 0
    while raw > window:
        raw -= lengths[gone]
        gone += 1
    return gone


def joined(row: Row, text: KV, length: int) -> Row:
    """The row with a segment of so many tokens behind its window."""
    return replace(row, window=KV.cat((row.window, text)), segments=(*row.segments, length))


def without(segments: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Token counts of what stays in a window when its oldest tokens leave."""
    left = list(segments)
    while tokens:
        gone = min(tokens, left[0])
        left[0] -= gone
        tokens -= gone
        if not left[0]:
            del left[0]
    return tuple(left)
