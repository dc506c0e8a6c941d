"""Attention where each key is seen by intervals of queries, as Triton kernels for an accelerator.

The query heads that share a head of keys lie one behind the other as rows: row ``q * G + g`` is head g of query q.
So tiles are always full, a tile of keys is read once for all its heads, and the sum over the heads in the gradient
of a key is the sum over rows. A plan tells every block of rows which blocks of keys it meets, and the other way
round; a tile of scores is masked by four numbers a key (``ccm.training.intervals``).

Triton comes with PyTorch for CUDA, and is not there otherwise: import this module only where it is needed.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles (powers of 2, at least 16), and how the kernels run."""

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3


#: Worth timing on a new kind of accelerator; the first is the default.
CONFIGURATIONS = {
    "64x32": Tiles(64, 32, 4, 3),
    "64x64": Tiles(64, 64, 4, 3),
    "64x64 shallow": Tiles(64, 64, 4, 2),
    "128x64": Tiles(128, 64, 8, 3),
}


@dataclass(frozen=True)
class Plan:
    """Which blocks meet, of all layers of a pass that see the same.

    Attributes:
        spans: (4, K) int32, as of ``intervals.Packed``, but counted in rows.
        rows: N G, all queries with the heads that share keys.
        group: G.
        keys_of: of each block of rows, how many blocks of keys it meets (R,), and which come first in (R, any).
        rows_of: of each block of keys the blocks of rows, in the same way.
        tiles: of the blocks.
    """

    spans: Tensor
    rows: int
    group: int
    keys_of: tuple[Tensor, Tensor]
    rows_of: tuple[Tensor, Tensor]
    tiles: Tiles


def plan_of(spans: Tensor, queries: int, group: int, tiles: Tiles | None = None) -> Plan:
    """Plan a pass on the device of ``spans`` (4, K), without waiting for it; ``group`` query heads share keys."""
    tiles = tiles or next(iter(CONFIGURATIONS.values()))
    rows = queries * group
    spans = (spans.clamp(0, queries) * group).to(torch.int32).contiguous()
    met = _met(spans, rows, tiles)
    return Plan(spans, rows, group, _lists(met.T.contiguous()), _lists(met), tiles)


def fits(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether heads of these sizes can be computed; products of fp32 would be rounded."""
    return dtype in (torch.bfloat16, torch.float16) and all(
        16 <= size <= 128 and size & (size - 1) == 0 for size in sizes
    )


def interval_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
    """(N, H, D'), (K, H / G, D'), (K, H / G, D) -> (N, H, D).

    Anything may be strided but the last dimension. A query that sees no key gives 0.
    """
    out: Tensor = _Attention.apply(query, key, value, plan, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
    ) -> Tensor:
        query, key, value = _dense(query), _dense(key), _dense(value)
        shared = key.shape[1]
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        lse = query.new_empty(shared, plan.rows, dtype=torch.float32)
        count, index = plan.keys_of
        with torch.cuda.device_of(query):
            _forward[len(count), shared](
                *_with_strides(query, key, value),
                out,
                lse,
                *(plan.spans, count, index, index.stride(0), plan.rows, len(key), scale / math.log(2)),
                **_constants(plan, query, value),
            )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        grad = grad.contiguous()
        shared = key.shape[1]
        delta = torch.empty_like(lse)
        to_query, to_key, to_value = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        sizes = (plan.rows, len(key), scale, scale / math.log(2))
        given = _with_strides(query, key, value)
        constants = _constants(plan, query, value)
        with torch.cuda.device_of(query):
            count, index = plan.keys_of
            _backward_query[len(count), shared](
                *given,
                *(out, grad, lse, delta, to_query),
                *(plan.spans, count, index, index.stride(0), *sizes),
                **constants,
            )
            count, index = plan.rows_of
            _backward_key[len(count), shared](
                *given,
                *(grad, lse, delta, to_key, to_value),
                *(plan.spans, count, index, index.stride(0), *sizes),
                **constants,
            )
        return to_query, to_key, to_value, None, None


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_strides(*tensors: Tensor) -> list[Any]:
    return [part for x in tensors for part in (x, x.stride(0), x.stride(1))]


def _constants(plan: Plan, query: Tensor, value: Tensor) -> dict[str, Any]:
    tiles = plan.tiles
    return {
        "G": plan.group,
        "DQ": query.shape[-1],
        "DV": value.shape[-1],
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _met(spans: Tensor, rows: int, tiles: Tiles) -> Tensor:
    """(blocks of keys, blocks of rows) that meet: +1 where an interval begins and -1 behind its end, summed up."""
    keys = spans.shape[1]
    width = -(-rows // tiles.rows) + 1
    edges = torch.zeros(-(-keys // tiles.keys) * width, dtype=torch.int32, device=spans.device)
    start = torch.arange(keys, device=spans.device) // tiles.keys * width
    for first, stop in (spans[:2], spans[2:]):
        any_ = (stop > first).to(torch.int32)
        edges.index_add_(0, start + first // tiles.rows, any_)
        edges.index_add_(0, start + (stop - 1) // tiles.rows + 1, -any_)
    return edges.view(-1, width).cumsum(1, dtype=torch.int32)[:, :-1] > 0


def _lists(met: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a mask (A, B), how many there are, and their columns in order: (A,) and (A, B + 1)."""
    width = met.shape[1]
    place = torch.where(met, met.cumsum(1) - 1, width)  # the last column takes what is not met
    columns = torch.arange(width, dtype=torch.int32, device=met.device).expand_as(met)
    index = torch.zeros(len(met), width + 1, dtype=torch.int32, device=met.device)
    return met.sum(1, dtype=torch.int32), index.scatter_(1, place, columns)


# ---------------------------------------------------------------------- kernels
#
# Names: q, k, v are tiles, _n and _h strides of tokens and heads; s scores in units of log 2, p probabilities.


@triton.jit
def _tile(base, n, h, row, G: tl.constexpr, D: tl.constexpr):
    """Pointers to (rows, D) of a tensor of tokens and heads, from its first head on."""
    return base + (row // G * n + row % G * h)[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _bounds(spans, key, keys):
    """The intervals of keys; nobody sees what lies behind the last."""
    there = key < keys
    a = tl.load(spans + key, mask=there, other=0)
    b = tl.load(spans + keys + key, mask=there, other=0)
    c = tl.load(spans + 2 * keys + key, mask=there, other=0)
    d = tl.load(spans + 3 * keys + key, mask=there, other=0)
    return a, b, c, d


@triton.jit(do_not_specialize=["width"])
def _forward(
    query,
    query_n,
    query_h,
    key,
    key_n,
    key_h,
    value,
    value_n,
    value_h,
    out,
    lse,
    spans,
    count,
    index,
    width,
    rows,
    keys,
    scale,
    G: tl.constexpr,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    q = tl.load(_tile(query + head * G * query_h, query_n, query_h, row, G, DQ), mask=inside, other=0.0)
    best = tl.full((ROWS,), -1e30, tl.float32)  # finite: no NaN where nothing is seen
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV), tl.float32)
    many = tl.load(count + block)
    for i in range(0, many):
        at = tl.load(index + block * width + i) * KEYS + tl.arange(0, KEYS)
        there = (at < keys)[:, None]
        k = tl.load(_tile(key + head * key_h, key_n, key_h, at, 1, DQ), mask=there, other=0.0)
        v = tl.load(_tile(value + head * value_h, value_n, value_h, at, 1, DV), mask=there, other=0.0)
        a, b, c, d = _bounds(spans, at, keys)
        r = row[:, None]
        seen = ((r >= a[None, :]) & (r < b[None, :])) | ((r >= c[None, :]) & (r < d[None, :]))
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(best - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
        best = new
    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    to = _tile(out + head * G * DV, heads * G * DV, DV, row, G, DV)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * rows + row, best + tl.log2(total), mask=row < rows)


@triton.jit(do_not_specialize=["width"])
def _backward_query(
    query,
    query_n,
    query_h,
    key,
    key_n,
    key_h,
    value,
    value_n,
    value_h,
    out,
    grad,
    lse,
    delta,
    to_query,
    spans,
    count,
    index,
    width,
    rows,
    keys,
    natural,
    scale,
    G: tl.constexpr,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradient of the queries, and of each row the sum of output times gradient on the way."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    q = tl.load(_tile(query + head * G * query_h, query_n, query_h, row, G, DQ), mask=inside, other=0.0)
    o = tl.load(_tile(out + head * G * DV, heads * G * DV, DV, row, G, DV), mask=inside, other=0.0)
    g = tl.load(_tile(grad + head * G * DV, heads * G * DV, DV, row, G, DV), mask=inside, other=0.0)
    product = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + head * rows + row, product, mask=row < rows)
    norm = tl.load(lse + head * rows + row, mask=row < rows, other=0.0)
    acc = tl.zeros((ROWS, DQ), tl.float32)
    many = tl.load(count + block)
    for i in range(0, many):
        at = tl.load(index + block * width + i) * KEYS + tl.arange(0, KEYS)
        there = (at < keys)[:, None]
        k = tl.load(_tile(key + head * key_h, key_n, key_h, at, 1, DQ), mask=there, other=0.0)
        v = tl.load(_tile(value + head * value_h, value_n, value_h, at, 1, DV), mask=there, other=0.0)
        a, b, c, d = _bounds(spans, at, keys)
        r = row[:, None]
        seen = ((r >= a[None, :]) & (r < b[None, :])) | ((r >= c[None, :]) & (r < d[None, :]))
        s = tl.dot(q, tl.trans(k)) * scale
        p = tl.exp2(tl.where(seen, s, float("-inf")) - norm[:, None])
        dp = tl.dot(g, tl.trans(v))
        ds = p * (dp - product[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc)
    to = _tile(to_query + head * G * DQ, heads * G * DQ, DQ, row, G, DQ)
    tl.store(to, (acc * natural).to(to_query.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def _backward_key(
    query,
    query_n,
    query_h,
    key,
    key_n,
    key_h,
    value,
    value_n,
    value_h,
    grad,
    lse,
    delta,
    to_key,
    to_value,
    spans,
    count,
    index,
    width,
    rows,
    keys,
    natural,
    scale,
    G: tl.constexpr,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of keys and values; a tile of scores has keys down and rows across."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    at = block * KEYS + tl.arange(0, KEYS)
    there = (at < keys)[:, None]
    k = tl.load(_tile(key + head * key_h, key_n, key_h, at, 1, DQ), mask=there, other=0.0)
    v = tl.load(_tile(value + head * value_h, value_n, value_h, at, 1, DV), mask=there, other=0.0)
    a, b, c, d = _bounds(spans, at, keys)
    acc_k = tl.zeros((KEYS, DQ), tl.float32)
    acc_v = tl.zeros((KEYS, DV), tl.float32)
    many = tl.load(count + block)
    for i in range(0, many):
        row = tl.load(index + block * width + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        q = tl.load(_tile(query + head * G * query_h, query_n, query_h, row, G, DQ), mask=inside, other=0.0)
        g = tl.load(_tile(grad + head * G * DV, heads * G * DV, DV, row, G, DV), mask=inside, other=0.0)
        norm = tl.load(lse + head * rows + row, mask=row < rows, other=0.0)
        product = tl.load(delta + head * rows + row, mask=row < rows, other=0.0)
        r = row[None, :]
        seen = ((r >= a[:, None]) & (r < b[:, None])) | ((r >= c[:, None]) & (r < d[:, None]))
        s = tl.dot(k, tl.trans(q)) * scale
        p = tl.exp2(tl.where(seen, s, float("-inf")) - norm[None, :])
        acc_v = tl.dot(p.to(g.dtype), g, acc_v)
        dp = tl.dot(v, tl.trans(g))
        ds = p * (dp - product[None, :])
        acc_k = tl.dot(ds.to(q.dtype), q, acc_k)
    to_k = _tile(to_key + head * DQ, heads * DQ, DQ, at, 1, DQ)
    tl.store(to_k, (acc_k * natural).to(to_key.dtype.element_ty), mask=there)
    to_v = _tile(to_value + head * DV, heads * DV, DV, at, 1, DV)
    tl.store(to_v, acc_v.to(to_value.dtype.element_ty), mask=there)
