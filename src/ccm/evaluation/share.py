"""Recovered share, the project's yardstick.

    recovered share = (NLL_none - NLL_method) / (NLL_none - NLL_full)

over the target tokens, with NLL in nats per token. 0 is no context, 1 is the whole context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.compressor import Compressor
from ..data.rows import ConversationRow
from .metrics import bootstrap, recovered_share

#: (row, segment) -> logits (T_segment, V)
SegmentLogits = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Nll:
    """Summed negative log-likelihood (nats) and number of target tokens, one entry per row."""

    total: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per scored token."""
        return sum(self.total) / sum(self.tokens)


def turn_nll(logits: Tensor, ids: Sequence[int], content: tuple[int, int]) -> tuple[float, int]:
    """NLL of the content of a turn from its own logits (T, V): (sum in nats, tokens).

    The first token of a turn has nothing to be foreseen from, and does not count: answers of Mistral have no head.
    """
    start, stop = max(content[0], 1), content[1]
    targets = torch.as_tensor(ids[start:stop], device=logits.device)
    nll = torch.nn.functional.cross_entropy(logits[start - 1 : stop - 1].float(), targets, reduction="sum")
    return float(nll), stop - start


def bootstrap_share(
    none: Nll, full: Nll, method: Nll, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % confidence interval of the recovered share, by resampling rows."""
    totals = torch.tensor([none.total, full.total, method.total], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(totals.shape[1], (draws, totals.shape[1]), generator=generator)
    n, f, m = totals[:, picks].sum(-1)
    shares = recovered_share(n, f, m).sort().values
    return float(shares[int(0.025 * draws)]), float(shares[int(0.975 * draws)])


def gain(none: Nll, full: Nll) -> tuple[float, float, float]:
    """What full context is worth, in nats per token, and its 95 % interval by resampling rows; none of one row.

    Where the interval holds 0 there is nothing to keep, and a share would divide by next to nothing.
    """
    value = none.mean - full.mean
    if len(none.total) < 2:
        return value, value, value
    gained = np.subtract(none.total, full.total)
    return value, *bootstrap(lambda total, tokens: total / tokens, gained, np.array(none.tokens, float))


@torch.no_grad()
def parallel_nll(
    compressor: Compressor, rows: Sequence[ConversationRow], first: int = 4, batch: int = 4, **sizes: int
) -> Nll:
    """Score turns from ``first`` on with memory, by parallel passes."""
    return _score(
        rows, first, batch, lambda part: compressor([r.segments for r in part], **sizes).segment_logits
    )


@torch.no_grad()
def reference_nll(
    compressor: Compressor, rows: Sequence[ConversationRow], context: str, first: int = 4, batch: int = 4
) -> Nll:
    """Score the same turns by the base model with the "full" context, or with "none"."""

    def run(part: Sequence[ConversationRow]) -> SegmentLogits:
        if context == "none":
            flat = [[s] for r in part for s in r.segments]
            per_row = len(part[0].segments)
            out = compressor(flat)
            return lambda r, i: out.segment_logits(r * per_row + i, 0)
        whole = compressor([[sum(r.segments, ())] for r in part])

        def segment(r: int, i: int) -> Tensor:
            start = sum(map(len, part[r].segments[:i]))
            return whole.logits[r, start : start + len(part[r].segments[i])]

        return segment

    return _score(rows, first, batch, run)


def _score(
    rows: Sequence[ConversationRow],
    first: int,
    batch: int,
    run: Callable[[Sequence[ConversationRow]], SegmentLogits],
) -> Nll:
    total: list[float] = []
    tokens: list[int] = []
    for k in range(0, len(rows), batch):
        part = rows[k : k + batch]
        segment_logits = run(part)
        for r, row in enumerate(part):
            scores = [
                turn_nll(segment_logits(r, i), row.segments[i], row.content[i])
                for i in range(first, len(row.segments))
            ]
            total.append(sum(s for s, _ in scores))
            tokens.append(sum(n for _, n in scores))
    return Nll(tuple(total), tuple(tokens))
