"""Who may attend to whom.

One parallel pass reproduces the recursion because of this mask. For three segments of one token (a, b, c), one
slot each, no sink and no window, rows are queries and columns are keys; M1, M2 are states of the memory:

    concat            M1 M2 | a A b B c          merge             M1 M2 | a A b B c
    a                  .  . | x . . . .          a                  .  . | x . . . .
    A = COMP(a)        .  . | x x . . .          A = COMP(a)        .  . | x x . . .
    b                  x  . | . . x . .          b                  x  . | . . x . .
    B = COMP(b)        x  . | . . x x .          B = COMP(b)        x  . | . . x x .
    c                  x  x | . . . . x          c                  .  x | . . . . x

A sink adds columns in front, seen by every query that has something folded; a recent window lets text see the
raw text of the segments that are not folded yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule
from .segments import Layout


def parallel_mask(layout: Layout, rule: Rule) -> Tensor:
    """The mask of one parallel pass: (B, 1, Q, s + S + Q) bool, columns [sink | memory states | text and COMP]."""
    device = layout.segment.device
    batch, width = layout.segment.shape
    groups, n = layout.comp_index.shape[1:]
    seen = layout.folded.unsqueeze(-1)  # (B, Q, 1)
    order = torch.arange(width, device=device)

    comp = layout.comp >= 0
    same = layout.segment.unsqueeze(-1) == layout.segment.unsqueeze(1)
    in_window = layout.segment.unsqueeze(1) >= seen
    visible = torch.where(comp.unsqueeze(1), same & comp.unsqueeze(-1), in_window)
    visible = visible & (order.unsqueeze(0) <= order.unsqueeze(1))  # causal
    visible = visible & (layout.segment >= 0).unsqueeze(1)
    visible = visible | torch.eye(width, dtype=torch.bool, device=device)  # no empty row: padding sees itself

    parts = []
    if groups:
        sink_column = torch.arange(int(layout.sink.max()), device=device) < layout.sink.view(-1, 1, 1)
        parts.append((seen > 0) & sink_column)
        first, last, _ = (part.to(device) for part in rule.placed(groups, n))
        parts.append((first <= seen) & (seen <= last))
    parts = [part.expand(batch, width, -1) for part in parts]
    return torch.cat([*parts, visible], dim=-1).unsqueeze(1)


def within_window(query_position: Tensor, key_position: Tensor, is_memory: Tensor, window: int) -> Tensor:
    """What a sliding-window layer may see: (B, 1, Q, K). Sink and slots are exempt, they stand for the past."""
    distance = query_position.unsqueeze(-1) - key_position.unsqueeze(1)
    return ((distance < window) | is_memory.unsqueeze(1)).unsqueeze(1)
