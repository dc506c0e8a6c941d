"""Attention over intervals in Triton, against a dense mask.

Without an accelerator it runs in Triton's interpreter, which is asked for before anything imports Triton (and takes
numpy before 2.4): ``TRITON_INTERPRET=1 pytest tests/training/test_kernels.py``.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no accelerator, and no TRITON_INTERPRET=1", allow_module_level=True)

from ccm.core.rule import get_rule
from ccm.training.intervals import pack
from ccm.training.kernels import Tiles, fits, interval_attention, plan_of
from ccm.training.lean import visible
from ccm.training.packed import ArrayRow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(32, 16, 4, 2)
HALF = (
    torch.bfloat16 if DEVICE == "cuda" else torch.float16
)  # the interpreter multiplies the bits of bfloat16
TOLERANCE = {torch.float32: 1e-4 if DEVICE == "cpu" else 1e-2, HALF: 2e-2 if DEVICE == "cuda" else 3e-3}


def spans_of(rule: str, window: int = 0) -> tuple[torch.Tensor, int]:
    """Intervals of three random rows, and how many queries there are; some keys of the memory are padding."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(3):
        stops = np.cumsum(rng.integers(1, 14, 5)).astype(np.int32)
        ids = rng.integers(0, 9, stops[-1]).astype(np.int32)
        rows.append(ArrayRow(ids, np.ones(len(ids), np.uint8), stops))
    packed = pack(rows, get_rule(rule), slots=2, sink=2, window=window)
    return packed.spans[None].to(DEVICE), len(packed.position)


def dense(query, key, value, seen, scale):
    """The same with a mask; 0 where nothing is seen."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value)


def some(queries: int, keys: int, wide: bool, dtype: torch.dtype, heads: int = 6, shared: int = 2):
    """Strided queries, keys and values: parts of something larger."""
    torch.manual_seed(0)
    size = 32 if wide else 16
    whole = torch.randn(queries, heads + 3, size, device=DEVICE).to(dtype)
    query = whole[:, 1 : heads + 1].detach().requires_grad_()
    key = torch.randn(keys, shared, size + 16, device=DEVICE).to(dtype)[..., 16:].requires_grad_()
    value = torch.randn(shared, keys, 16, device=DEVICE).to(dtype).transpose(0, 1).requires_grad_()
    assert not (query.is_contiguous() or key.is_contiguous())
    return query, key, value


def compare(spans, queries, given, tiles=SMALL, tamper=lambda spans: spans):
    """The largest relative differences of output and gradients."""
    query, key, value = given
    scale = 0.3
    grad = torch.randn(queries, query.shape[1], value.shape[-1], device=DEVICE).to(query.dtype)
    plan = plan_of(tamper(spans), queries, query.shape[1] // key.shape[1], tiles)
    out = interval_attention(query, key, value, plan, scale)
    own = torch.autograd.grad(out, given, grad)
    exact = [x.detach().float().requires_grad_() for x in given]
    expected = dense(*exact, visible(spans, queries), scale)
    slopes = torch.autograd.grad(expected, exact, grad.float())
    assert out.is_contiguous()
    return [
        float(((a.float() - b).norm() / b.norm()).detach())
        for a, b in zip((out, *own), (expected, *slopes), strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rule", "window"), [("concat", 0), ("mean", 0), ("concat", 9)])
def test_equals_a_dense_mask(rule, window, dtype):
    spans, queries = spans_of(rule, window)
    found = compare(spans, queries, some(queries, spans.shape[1], window > 0, dtype))
    assert max(found) < TOLERANCE[dtype], found


def test_of_any_size():
    """Neither queries, rows nor keys fill their blocks, and heads are shared by one, two or all."""
    spans, queries = spans_of("concat")
    spans, queries = spans[:, :-27].clamp(max=queries - 13), queries - 13
    for heads, shared in ((3, 3), (4, 2), (5, 1)):
        given = some(queries, spans.shape[1], False, torch.float32, heads, shared)
        found = compare(spans, queries, given, Tiles(16, 64, 4, 2))
        assert max(found) < TOLERANCE[torch.float32], (heads, shared, found)


def test_the_comparison_can_fail():
    spans, queries = spans_of("concat")

    def longer(spans):
        return torch.stack([spans[0], spans[1] + (spans[1] > spans[0]).int(), *spans[2:]])

    found = compare(spans, queries, some(queries, spans.shape[1], False, torch.float32), tamper=longer)
    assert min(found) > 1e-2


def test_what_nobody_sees_counts_for_nothing():
    """A query without a key gives 0, and a key without a query, or without a place, gets 0; nothing is NaN."""
    queries, keys = 40, 50
    spans = torch.zeros(4, keys, dtype=torch.int32, device=DEVICE)
    spans[1, :20], spans[2, :20], spans[3, :20] = 10, 30, 35
    spans[0, 20:], spans[1, 20:] = 25, 25  # empty, though not at 0
    query, key, value = some(queries, keys, False, torch.float32)
    out = interval_attention(query, key, value, plan_of(spans, queries, 3, SMALL), 0.3)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    alone = torch.ones(queries, dtype=torch.bool, device=DEVICE)
    alone[:10] = alone[30:35] = False
    assert (out[alone] == 0).all() and (out[~alone] != 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][alone] == 0).all() and (grads[1][20:] == 0).all() and (grads[2][20:] == 0).all()


def test_the_plan_names_the_blocks_that_meet():
    spans, queries = spans_of("concat", 9)
    plan = plan_of(spans, queries, 3, SMALL)
    seen = visible(spans, queries).repeat_interleave(3, dim=0)
    met = seen.unflatten(1, (-1, SMALL.keys)).any(-1).unflatten(0, (-1, SMALL.rows)).any(1)  # whole blocks
    for (count, index), expected in ((plan.keys_of, met), (plan.rows_of, met.T)):
        assert index.is_contiguous() and index.dtype == torch.int32
        got = [line[:many].tolist() for line, many in zip(index.cpu(), count.tolist(), strict=True)]
        assert got == [line.nonzero().flatten().tolist() for line in expected.cpu()]


def test_sizes_of_heads():
    half = torch.bfloat16
    assert fits(half, 64, 128) and not fits(half, 64, 80) and not fits(half, 256) and not fits(half, 8)
    assert not fits(torch.float32, 64)
