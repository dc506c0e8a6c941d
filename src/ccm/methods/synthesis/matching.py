"""The algebra of Attention Matching (arXiv 2602.16284): a few entries that attend as many did.

Of each layer and key head N entries become n. For reference queries q let a(q) (N) be their attention weights where
they stood, and b(q) (n) those of the kept ones at their new places, both beside sink and window. Then

    keys      n of those that were there; those go of which least is missed in
                  min_x sum_q w(q) |y(q) - sum_j a_j(q) x_j|^2        y(q) = [a(q) V, mass of a(q)]
    values    V' = argmin  sum_q w(q) |o(q) - r(q) - b(q) V'|^2 + ridges
                  o(q): what attention gave, r(q): what sink and window give now

A memory has no queries of old text. Two things stand for them: each old slot counts as if something still asked for
it alone, and its value is drawn to what it was. Without them every text would wash out what came before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ...core.reader import Reader
from ..scores import weights

#: What an old slot counts when keys are picked: a share of the mean weight of an entry.
HELD = 0.3
#: How strongly an old slot is drawn to its value: a share of the mean weight of an entry.
DRAWN = 0.1
#: How strongly every entry is drawn to its value: a share of what it weighs where attention is even.
FLOOR = 1e-2
#: What keeps the systems regular: a share of the largest weight of an entry.
RIDGE = 1e-3

#: Queries (L, Hq, w, D), position-free, and what each of them counts.
Asked = tuple[Tensor, float]


def match(reader: Reader, row: Row, held: KV, n: int, asked: Sequence[Asked]) -> KV:
    """n entries (L, H, n, D) in place of more (L, H, N, D), for queries that come next.

    Args:
        reader: the model.
        row: what stands beside them, sink in front and window behind; its slots are the first of those held.
        held: position-free, in fp32.
        n: entries that stay, fewer than there are.
        asked: reference queries, each set placed behind the memory.
    """
    old = row.slots.length
    sink, window = (kv.to(torch.float32) for kv in (row.sink, row.window))
    rest, a = _weights(reader, KV.cat((sink, held, window)), sink, held.length, old, asked)
    wanted, mass = a @ held.values, a.sum(-1, keepdim=True)
    size = held.values.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    gram = a.mT @ a  # (L, H, N, N)
    side = a.mT @ torch.cat([wanted / size, mass * wanted.shape[3] ** 0.5], dim=3)
    alone = HELD**2 * _mean(gram)  # a query that sees nothing but one old slot
    gram.diagonal(dim1=2, dim2=3)[..., :old] += alone
    own = torch.cat([held.values / size, torch.full_like(side[..., :1], wanted.shape[3] ** 0.5)], dim=3)
    side[:, :, :old] += alone.unsqueeze(3) * own[:, :, :old]
    best = pick(gram, side, n)
    kept = held.take(best)

    beside = torch.cat([sink.values, window.values], dim=2)
    out = rest @ beside + wanted
    rest, b = _weights(reader, KV.cat((sink, kept, window)), sink, n, n, asked)
    missing = b.mT @ (out - rest @ beside - b @ kept.values)
    gram = b.mT @ b
    drawn = torch.where(best < old, DRAWN * _mean(gram), 0.0)
    even = sum(queries[0, :, :, 0].numel() * weight for queries, weight in asked) / gram.shape[1]
    even /= (held.length + beside.shape[2]) ** 2  # what an entry weighs where attention is even
    lift = torch.diag_embed(drawn + RIDGE * _largest(gram) + FLOOR * even)
    values = kept.values + torch.linalg.solve(gram + lift, missing)
    # none is longer than the longest was: again and again, what is missed would build up
    most = held.values.norm(dim=3).amax(2)[..., None, None]
    length = values.norm(dim=3, keepdim=True).clamp_min(1e-12)
    return KV(kept.keys, values * (most / length).clamp_max(1))


def pick(gram: Tensor, side: Tensor, n: int) -> Tensor:
    """n columns of A that together explain most of Y, in the order they stand in: (L, H, n).

    With P = (A^T A)^-1 and x = P A^T Y, column j can go at a loss of

        |x_j|^2 / P_jj        (optimal brain surgeon, Hassibi and Stork 1993)

    Half of what is too much goes at once; P and x of what stays follow from those of all.

    Args:
        gram: A^T A (L, H, N, N).
        side: A^T Y (L, H, N, E).
    """
    index = torch.arange(gram.shape[2], device=gram.device).expand(gram.shape[:3])
    lifted = gram + torch.diag_embed(RIDGE * _largest(gram).expand(gram.shape[:3]) + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(lifted))
    x = inverse @ side
    while (more := index.shape[2] - n) > 0:
        mantissa, exponent = (x.square().sum(-1) / inverse.diagonal(dim1=2, dim2=3)).frexp()
        loss = (
            (mantissa * 2**12).round().ldexp(exponent)
        )  # of equal ones the first go, whatever rounding says
        gone, stay = loss.argsort(dim=2, stable=True).split([more - more // 2, n + more // 2], dim=2)
        stay = stay.sort(dim=2).values
        left = _rows(inverse, gone)
        across = _columns(left, stay)
        share = torch.linalg.solve(
            _columns(left, gone), across
        )  # of what goes, what each that stays takes over
        x = _rows(x, stay) - share.mT @ _rows(x, gone)
        inverse = _columns(_rows(inverse, stay), stay) - share.mT @ across
        index = index.gather(2, stay)
    return index


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix.gather(2, index.unsqueeze(3).expand(-1, -1, -1, matrix.shape[3]))


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix.gather(3, index.unsqueeze(2).expand(-1, -1, matrix.shape[2], -1))


def _weights(
    reader: Reader, kv: KV, sink: KV, count: int, memory: int, asked: Sequence[Asked]
) -> tuple[Tensor, Tensor]:
    """Attention weights of all queries for sink and window, and for the ``count`` entries between: (L, H, q, N) each.

    The first ``memory`` entries behind the sink are slots, which no sliding window drops.
    """
    start = sink.length
    parts = [
        weights(reader, queries, kv.keys, memory=start + memory, start=kv.length).flatten(2, 3) * weight**0.5
        for queries, weight in asked
    ]
    found = torch.cat(parts, dim=2).nan_to_num()  # a query that sees nothing of the memory asks nothing of it
    first, own, last = found.split([start, count, kv.length - start - count], dim=3)
    return torch.cat([first, last], dim=3), own


def _mean(gram: Tensor) -> Tensor:
    """(L, H, 1)"""
    return gram.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True)


def _largest(gram: Tensor) -> Tensor:
    """(L, H, 1)"""
    return gram.diagonal(dim1=2, dim2=3).amax(-1, keepdim=True)
