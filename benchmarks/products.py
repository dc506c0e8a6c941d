"""What torch's products of one token with all weights of the embedded model cost, kind by kind, in turns.

Weights are random, of the model's shapes (q, k and v as one, gate and up as one, and the head), and larger than any
cache. The share is of the bandwidth that is measured in the same turns; what is left out rounds activations as well
(int8 dynamic) or writes another text (int4).

    python benchmarks/products.py --threads 1
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import parser, store
from torch import Tensor
from torch.nn.functional import linear

from ccm.bench.machine import bandwidth, clock_of
from ccm.decoding.products import packed

SHAPES, LAYERS, HEAD = ((960, 576), (576, 576), (3072, 576), (576, 1536)), 30, (49152, 576)


def kinds(weights: list[Tensor]) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Of each bytes a weight takes, and all products with one token."""
    rows = {size: torch.randn(1, size) for size in (576, 1536)}

    def each(of: list[Any], call: Callable[[Tensor, Any], Any], dtype: torch.dtype = torch.float32) -> Any:
        pairs = [(rows[w.shape[1]].to(dtype), own) for w, own in zip(weights, of, strict=True)]
        return lambda: [call(x, own) for x, own in pairs]

    half, brain = ([w.to(dtype) for w in weights] for dtype in (torch.float16, torch.bfloat16))
    pack, run = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise.default
    scales = [w.abs().amax(1) / 127 for w in weights]
    int8 = [((w / s.unsqueeze(1)).round().to(torch.int8), s) for w, s in zip(weights, scales, strict=True)]
    wide = [(q, s.bfloat16()) for q, s in int8]
    bf16, f16 = torch.bfloat16, torch.float16
    return {
        "float32, linear": (4, each(weights, linear)),
        "float32, linear, stored by columns": (4, each([w.t().contiguous() for w in weights], torch.matmul)),
        "bfloat16, linear": (2, each(brain, linear, bf16)),
        "bfloat16, mv": (2, each(brain, lambda x, w: torch.mv(w, x[0]), bf16)),
        "bfloat16, oneDNN packed": (
            2,
            each([pack(w, 1) for w in brain], lambda x, w: run(x, w, None, "none", [], ""), bf16),
        ),
        "float16, linear": (2, each(half, linear, f16)),
        "float16, packed (taken)": (
            2,
            each([packed(w, None, "float16") for w in weights], lambda x, p: p(x)),
        ),
        "int8, packed, dynamic (taken)": (
            1,
            each([packed(w, None, "int8") for w in weights], lambda x, p: p(x)),
        ),
        "int8, weights only": (1, each(wide, lambda x, q: torch._weight_int8pack_mm(x, *q), bf16)),
    }


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    weights = [0.05 * torch.randn(shape) for _ in range(LAYERS) for shape in SHAPES] + [torch.randn(HEAD)]
    size = sum(w.numel() for w in weights)
    calls, clock = kinds(weights), clock_of(arguments.threads)
    times: dict[str, list[float]] = {name: [] for name in calls}
    widths = []
    for _ in range(arguments.limit or 9):
        for name, (_, call) in calls.items():
            began = clock()
            call()
            times[name].append(clock() - began)
        widths.append(bandwidth(arguments.threads))
    result = {
        name: {
            "milliseconds": round(1e3 * statistics.median(times[name]), 1),
            "share_of_bandwidth": round(
                statistics.median(size * n / s / w for s, w in zip(times[name], widths, strict=True)), 2
            ),
        }
        for name, (n, _) in calls.items()
    }
    gigabytes = round(statistics.median(widths) / 1e9, 1)
    store("products", {"task": "products of one token", "weights": size, "bandwidth": gigabytes, **result})


if __name__ == "__main__":
    main()
