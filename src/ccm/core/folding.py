"""How a block of slots enters a row, and what the row's counters say of its past then."""

from __future__ import annotations

from dataclasses import replace

from .memory import KV, Row
from .rule import Rule


def put(row: Row, block: KV, rule: Rule, sink: int) -> Row:
    """Put the block of the oldest raw segment into the slots and let go of its raw tokens."""
    row = counted(row, rule)
    step, length = row.steps + 1, row.segments[0]
    recent = () if rule.blocks is None else (*row.recent, length)
    gone = recent[: max(0, len(recent) - rule.apart(step))]  # they have no slots of their own now
    dropped, merged = (gone, ()) if rule.drops_after else ((), gone)
    return Row(
        sink=KV.cat((row.sink, row.window.slice(0, min(sink, length)))) if step == 1 else row.sink,
        slots=KV(*(rule.update(old, new, step) for old, new in zip(row.slots, block, strict=True))),
        window=row.window.slice(length),
        segments=row.segments[1:],
        steps=step,
        tokens=row.tokens + length,
        dropped=row.dropped + sum(dropped),
        merged=row.merged + sum(merged),
        merged_segments=row.merged_segments + len(merged),
        recent=recent[len(gone) :],
        pinned=row.pinned,
    )


def counted(row: Row, rule: Rule) -> Row:
    """The row with all of its counters, also if a file from before they were kept has brought it.

    The lengths of its segments are not known any more then: they count as equal.
    """
    if rule.blocks is None or not row.steps:
        return row
    if row.dropped + row.merged + sum(row.recent) == row.tokens:
        return row
    apart = rule.apart(row.steps)
    each, rest = divmod(row.tokens, row.steps)
    if apart == row.steps:
        return replace(row, recent=(each + rest, *(each,) * (apart - 1)))
    return replace(
        row, merged=row.tokens - each * apart, merged_segments=row.steps - apart, recent=(each,) * apart
    )
