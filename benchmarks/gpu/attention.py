"""Time attention over packed rows on an accelerator: our Triton kernels, and flex attention.

    PYTHONPATH=src:benchmarks/gpu python3 benchmarks/gpu/attention.py --out $OUT [--tokens 65536] [--seconds 60]

Forward and backward of one layer of SmolLM2-135M, each checked against a dense mask in fp32 on some of the queries.
Writes attention.json as it goes. Needs no model and no data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from check import filled
from torch.nn.attention.flex_attention import flex_attention

from ccm.core.rule import get_rule
from ccm.training.intervals import pack
from ccm.training.kernels import CONFIGURATIONS, interval_attention, plan_of
from ccm.training.lean import _block_mask

STARTED = time.time()
HEADS, SHARED, SIZE = 9, 3, 64
SCALE = SIZE**-0.5
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def given(queries: int, keys: int, size: int) -> list[torch.Tensor]:
    """Queries (N, H, D'), keys (K, Hkv, D') and values (K, Hkv, D), the queries a part of a product."""
    torch.manual_seed(0)
    product = torch.randn(queries, HEADS + 2 * SHARED, size, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(keys, SHARED, size, device="cuda", dtype=torch.bfloat16)
    value = torch.randn(keys, SHARED, SIZE, device="cuda", dtype=torch.bfloat16)
    return [x.requires_grad_() for x in (product[:, :HEADS].detach(), key, value)]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    key, value = (x.repeat_interleave(HEADS // SHARED, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def reference(spans: torch.Tensor, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in fp32, in chunks of the queries in ``chosen``; ``grad`` is 0 on all others."""
    exact = [x.detach().float().requires_grad_() for x in tensors]
    outs = []
    for part in chosen(len(tensors[0])).split(256):
        q = part.unsqueeze(1)
        seen = ((q >= spans[0]) & (q < spans[1])) | ((q >= spans[2]) & (q < spans[3]))
        out = dense(exact[0][part], *exact[1:], seen)
        (out * grad[part].float()).sum().backward()
        outs.append(out.detach())
    return [torch.cat(outs), *(x.grad for x in exact)]


def chosen(queries: int) -> torch.Tensor:
    """Runs of queries at the start, in the middle and at the end, where the COMP tokens are."""
    parts = [torch.arange(at, at + 256) for at in (0, queries // 2 - 77, queries - 256)]
    return torch.cat(parts).to("cuda")


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds: the median of ten."""
    for _ in range(3):
        work()
    spent = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        spent.append(begin.elapsed_time(end))
    return round(statistics.median(spent), 3)


def measure(
    attend: Attend, tensors: list[torch.Tensor], exact: list[torch.Tensor], grad: torch.Tensor
) -> Any:
    """Milliseconds forward and backward, and the relative differences of output and gradients."""
    began = time.time()
    out = attend(*tensors)
    slopes = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    torch.cuda.synchronize()
    first = time.time() - began
    own = [out.detach()[chosen(len(out))], *slopes]
    return {
        "forward_ms": timed(lambda: attend(*tensors)),
        "backward_ms": timed(lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True)),
        "first_s": round(first, 2),
        "apart": [float((a.float() - b).norm() / b.norm()) for a, b in zip(own, exact, strict=True)],
    }


def flex(mask: Any, checked: bool, **options: Any) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        with torch._inductor.config.patch(assert_indirect_indexing=checked):
            out = compiled(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True, **options)
        return out[0].transpose(0, 1)

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return attend


def kernel(spans: torch.Tensor, queries: int, name: str) -> Attend:
    plan = plan_of(spans, queries, HEADS // SHARED, CONFIGURATIONS[name])
    return lambda query, key, value: interval_attention(query, key, value, plan, SCALE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    passes = {}
    for name, window in (("one_frame", 0), ("window", 64)):
        packed = pack(
            filled(options.tokens, 49152),
            get_rule("concat"),
            slots=4,
            sink=4,
            window=window,
            text=options.tokens,
        )
        spans, queries = packed.spans[None].cuda(), len(packed.position)
        tensors = given(queries, spans.shape[1], 2 * SIZE if window else SIZE)
        grad = torch.zeros(queries, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        grad[chosen(queries)] = torch.randn(len(chosen(queries)), HEADS, SIZE, device="cuda").bfloat16()
        exact = reference(spans, tensors, grad)
        passes[name] = (spans, queries, tensors, exact, grad)
        result[f"{name} plan_ms"] = timed(lambda s=spans, q=queries: plan_of(s, q, HEADS // SHARED))
        result[f"{name} block_mask_ms"] = timed(
            lambda s=spans, q=queries: _block_mask(s, q, s.shape[1], torch.bfloat16, HEADS // SHARED)
        )
    work: list[tuple[str, str, Callable[[torch.Tensor, int], Attend]]] = [
        (where, name, lambda spans, queries, name=name: kernel(spans, queries, name))
        for where in passes
        for name in CONFIGURATIONS
    ]
    for where in passes:
        for name, checked, more in (
            ("flex", True, {}),
            ("flex unchecked", False, {}),
            ("flex 64x64", False, {"kernel_options": {"BLOCK_M": 64, "BLOCK_N": 64}}),
        ):
            work.append(
                (
                    where,
                    name,
                    lambda spans, queries, checked=checked, more=more: flex(
                        _block_mask(spans, queries, spans.shape[1], torch.bfloat16, HEADS // SHARED),
                        checked,
                        **more,
                    ),
                )
            )
    for where, name, make in work:
        spans, queries, tensors, exact, grad = passes[where]
        key = f"{where} {name}"
        if time.time() - STARTED > options.seconds:
            result[key] = "no time left"
            continue
        try:
            result[key] = measure(make(spans, queries), tensors, exact, grad)
        except Exception as error:
            result[key] = f"{type(error).__name__}: {str(error)[:1500]}"
        print(key, result[key], round(time.time() - STARTED), flush=True)
        (options.out / "attention.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
