"""What a memory holds and stands for, in numbers and in words."""

from __future__ import annotations

import logging
from typing import Any

import torch
from rich.filesize import decimal

from ..core.memory import Memory
from . import Method
from .parts import PINNED

log = logging.getLogger(__name__)


def describe(memory: Memory) -> list[dict[str, Any]]:
    """Counters and sizes of each row, for people and for JSON."""
    return [
        {
            "pinned": row.pinned,
            "sink": row.sunk,
            "slots": row.slots.length,
            "window": row.window.length,
            "steps": row.steps,
            "tokens_folded": row.tokens,
            "tokens_dropped": row.dropped,
            "tokens_merged": row.merged,
            "segments_merged": row.merged_segments,
            "reach": row.reach,
            "notes": len(row.notes),
            "nbytes": memory[r].nbytes,
        }
        for r, row in enumerate(memory.rows)
    ]


def counters(memory: Memory, method: Method) -> dict[str, int]:
    """What the memory of one conversation holds and stands for, and what full context would hold.

    ``reach`` is how many tokens are still told apart: the newest ones in a memory of blocks, as many as have an entry
    in one of chosen or fitted entries; a sink does not count. ``reach_when_full`` is what it comes to once old
    segments are merged or dropped, or the model's context is full: with segments as long as those so far, or, before
    the first one, as long as they may be.
    """
    row = memory.rows[0]
    return {
        "pinned": row.pinned,
        "sink": row.sunk,
        "slots": row.slots.length,
        "window": row.window.length,
        "tokens_seen": row.seen,
        "tokens_folded": row.tokens,
        "tokens_dropped": row.dropped,
        "tokens_merged": row.merged,
        "segments_merged": row.merged_segments,
        "reach": row.reach,
        "reach_when_full": method.apart(row),
        "nbytes": memory.nbytes,
        "full_context_nbytes": (row.pinned + row.seen) * method.reader.kv_bytes_per_token(),
    }


def most_nbytes(memory: Memory, method: Method) -> int | None:
    """Bytes that one conversation comes to at most, with what is pinned now; None: they grow with it.

    Raw tokens are in the model's type; slots are fp32 or codes.
    """
    if method.limit is None:
        return None
    raw = min(method.sink + method.window, method.limit)
    layers, heads, size = method.reader.kv_shape()
    slot = 2 * layers * heads * (method.width(size) or size * torch.float32.itemsize)
    return (raw + memory.rows[0].pinned) * method.reader.kv_bytes_per_token() + (method.limit - raw) * slot


def say_losses(before: Memory, after: Memory, method: Method) -> None:
    """Warn of what one turn has lost, if the method has a word for it."""
    if lost := method.losses(before.rows[0], after.rows[0]):
        log.warning("%s", lost)


def reach_in_words(stats: dict[str, int]) -> str:
    """How far back a memory tells things apart, from its :func:`counters`."""
    lost = stats["tokens_merged"] + stats["tokens_dropped"]
    if lost and not stats["reach"]:
        return "no token is told apart"
    if lost:
        return f"reaches back {_about(stats['reach'])} tokens"
    return f"reaches back to the start, {_about(stats['reach_when_full'])} tokens when full"


def in_words(stats: dict[str, int]) -> str:
    """What a memory holds, from its :func:`counters`, in one line."""
    full, held = stats["full_context_nbytes"], stats["nbytes"]
    if not held:
        return f"nothing is kept, full context {decimal(full)}"
    return (
        f"{entries_in_words(stats)}: {decimal(held)}, full context {decimal(full)}; {reach_in_words(stats)}"
    )


def entries_in_words(stats: dict[str, int]) -> str:
    """How many entries each part of a memory has, from its :func:`counters`."""
    return " + ".join(f"{stats[name]} {name}" for name in (PINNED, "sink", "slots", "window") if stats[name])


def _about(count: int) -> str:
    """Two digits of a count are enough: segments differ in length."""
    digits = max(0, len(str(count)) - 2)
    return f"~{round(count, -digits):,}"
