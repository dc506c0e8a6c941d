"""What a layer does element by element, as one Triton kernel each way: the gated product, and turning by a position.

Written for passes of many tokens on a CUDA device, where PyTorch's operations one by one move four times the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gate(x, out, size, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    place = (at // size) * (2 * size) + at % size
    gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_back(x, slope, grad, size, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    place = (at // size) * (2 * size) + at % size
    gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + size, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(grad + place, (dy * up * s * (1 + gate * (1 - s))).to(grad.dtype.element_ty), mask=inside)
    tl.store(grad + place + size, (dy * gate * s).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, cos, sin, out, heads, row, sign, count, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out[n, h] = x[n, h] turned by the angles of n``; a negative sign turns back."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of n, h and half a head
    inside = at < count
    n = at // (heads * HALF)
    rest = at % (heads * HALF)
    h, d = rest // HALF, rest % HALF
    a = tl.load(x + n * row + h * (2 * HALF) + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + n * row + h * (2 * HALF) + d + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + n * (2 * HALF) + d, mask=inside, other=0.0)
    s = tl.load(sin + n * (2 * HALF) + d, mask=inside, other=0.0) * sign
    to = (n * heads + h) * (2 * HALF) + d
    tl.store(out + to, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.contiguous()
        rows, size = x.shape[0], x.shape[1] // 2
        out = x.new_empty(rows, size)
        _gate[(triton.cdiv(out.numel(), BLOCK),)](x, out, size, out.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        slope, grad = slope.contiguous(), torch.empty_like(x)
        count = slope.numel()
        _gate_back[(triton.cdiv(count, BLOCK),)](x, slope, grad, slope.shape[1], count, BLOCK=BLOCK)
        return grad


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(slope, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    rows, heads, size = x.shape
    if x.stride(2) != 1 or x.stride(1) != size:
        x = x.contiguous()
    out = torch.empty(rows, heads, size, dtype=x.dtype, device=x.device)
    count = out.numel() // 2
    _rotate[(triton.cdiv(count, BLOCK),)](
        x, cos, sin, out, heads, x.stride(0), sign, count, HALF=size // 2, BLOCK=BLOCK
    )
    return out


def gated(x: Tensor) -> Tensor:
    """silu(gate) up, of gate and up side by side: (N, 2 F) -> (N, F)."""
    out: Tensor = _Gated.apply(x)
    return out


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors (N, H, D) at a position, by halves; cos and sin (N, D) in fp32, contiguous."""
    out: Tensor = _Turned.apply(x, cos, sin)
    return out
