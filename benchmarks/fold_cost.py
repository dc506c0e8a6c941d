"""The cost of folding a segment against plainly prefilling the same tokens, as ratios of one interleaved run.

The prefill runs on a copy of the model that has no adapter and transformers' own attention.

python benchmarks/fold_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import parser, store
from transformers import DynamicCache

import ccm
from ccm.core.live import Live


def measure(first: Callable[[], object], second: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of both, taken in turns, and the median of the ratios second / first."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 2):
        pair = []
        for call in (first, second):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    times = times[2:]
    ratio = statistics.median(b / a for a, b in times)
    a, b = (statistics.median(t) for t in zip(*times, strict=True))
    return {"prefill_seconds": round(a, 5), "fold_seconds": round(b, 5), "ratio": round(ratio, 3)}


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = arguments.limit or 15
    clean, _ = ccm.load_default_model()  # never sees an adapter
    rows = []
    plain = clean.base_model
    for adapter in ("ccm-concat", "ccm-merge"):
        model, _ = ccm.load_default_model()
        compressor = ccm.Compressor.from_pretrained(model, adapter)
        for length in (64, 128, 256):
            for steps in (0, 8):  # into an empty memory, and into one that holds eight segments already
                ids = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(length))
                memory = compressor.empty()
                for _ in range(steps):
                    memory = compressor.compress(ids, memory)
                held = memory.length

                def prefill(ids=ids, held=held, memory=memory, compressor=compressor):
                    # the same tokens over a cache of the same size, by transformers alone
                    cache = DynamicCache()
                    if held:
                        cache = Live.over(memory, compressor.rotary, clean.dtype).cache
                    return plain(input_ids=ids, past_key_values=cache, use_cache=True)

                row = measure(
                    prefill, lambda ids=ids, memory=memory, c=compressor: c.compress(ids, memory), repeats
                )
                rows.append({"adapter": adapter, "segment": length, "memory_slots": memory.slots, **row})
    store("fold_cost", {"task": "fold a segment against prefilling it", "rows": rows})


if __name__ == "__main__":
    main()
