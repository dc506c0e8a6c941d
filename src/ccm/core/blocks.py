"""Attention of a parallel pass in blocks of queries, each with only those keys that any of its queries sees.

A segment sees the slots and little else: in a row of 64 turns nine keys of ten are masked for a query. Blocks run
side by side as rows of a batch, and are given as many keys as the widest of them has::

    keys            0 1 2 3 4 5          columns   mask
    queries 0-63    x x . . . .          0 1 2     x x .
            64-127  x . . x x .          0 3 4     x x x
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

#: Queries of a block, and blocks that run side by side: later ones see more keys, so not all of them together.
BLOCK, TOGETHER = 64, 8


class Blocks(NamedTuple):
    """n blocks that run together.

    Attributes:
        queries: that they hold; the last block may be filled up.
        columns: (n, K) keys of each.
        mask: (B n, 1, BLOCK, K).
    """

    queries: int
    columns: Tensor
    mask: Tensor


def cut(mask: Tensor, together: int = TOGETHER) -> list[Blocks]:
    """Blocks for an additive mask (B, 1, Q, K), 0 where a key is seen; none where there are few queries.

    Where neighbours see very different numbers of keys, fewer ``together`` are less work.
    """
    if mask.shape[2] <= BLOCK:
        return []
    found = []
    for part in mask.split(BLOCK * together, dim=2):
        queries = part.shape[2]
        part = pad(part, (0, 0, 0, -queries % BLOCK), value=torch.finfo(mask.dtype).min)
        part = part.unflatten(2, (-1, BLOCK))
        seen = (part == 0).any(3).any(0).squeeze(0)
        # keys that are seen, in their order; what fills up the narrower blocks is masked for all of their queries
        columns = seen.byte().argsort(dim=1, descending=True, stable=True)[:, : int(seen.sum(1).max())]
        where = columns[None, None, :, None].expand(*part.shape[:4], -1)
        found.append(Blocks(queries, columns, part.gather(4, where).transpose(1, 2).flatten(0, 1)))
    return found


def attend(
    backend: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[Blocks],
    **kwargs: Any,
) -> Tensor:
    """What the backend makes of query (B, H, Q, D), key and value (B, Hkv, K, D): (B, Q, H, D)."""
    parts = []
    for own, q in zip(blocks, query.split([own.queries for own in blocks], dim=2), strict=True):
        n, columns = len(own.columns), own.columns.flatten()
        q, k, v = (
            x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)  # (B, H, n W, D) -> (B n, H, W, D)
            for x in (
                pad(q, (0, 0, 0, n * BLOCK - own.queries)),
                key.index_select(2, columns),
                value.index_select(2, columns),
            )
        )
        out, _ = backend(module, q, k, v, own.mask, **kwargs)
        parts.append(out.unflatten(0, (-1, n)).flatten(1, 2)[:, : own.queries])
    return torch.cat(parts, dim=1)


def grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v, the query heads of a key head as the rows of one matrix.

    A processor takes a third to a fifth of the time of torch's fused attention for it, above all backward in
    bfloat16 (docs/experiments.md). Scores are rounded to the type of the model: for training, not for measuring.
    Queries come in blocks, so the weights that are kept for the gradient are small.
    """
    batch, heads, width, _ = query.shape
    groups = key.shape[1]
    rows = (query * scaling).reshape(batch, groups, -1, query.shape[3])
    scores = (rows @ key.transpose(2, 3)).view(batch, groups, -1, width, key.shape[2])
    weights = (scores + mask.unsqueeze(2)).softmax(-1)
    out = weights.view(batch, groups, -1, key.shape[2]) @ value
    return out.view(batch, heads, width, -1).transpose(1, 2).contiguous(), None
