"""Training by one parallel pass against the recursion with backpropagation through time: same rows, same machine.

Rows have 16 segments of chitchat, of about 16 and of about 64 tokens. Both ways give the cross-entropy of the
same tokens and the same gradient, which is checked in the run (float32). Timings are taken in turns; peak memory is
that of a process of its own for each. The recursion reads and folds a segment in one forward pass, and goes
through the rows of a batch in step. Leave bfloat16 out on a processor without units for it: it would take hours.

    python benchmarks/parallel_training.py
    python benchmarks/parallel_training.py --dtypes float32
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import parser, store
from torch import Tensor

import ccm
from ccm.compressor import Compressor, CompressorConfig
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, held_out_rows
from ccm.training.recursion import parallel_losses, recurrent_losses

SEGMENTS, REPEATS = 16, 5
CASES = ((16, 1), (16, 4), (64, 1))  # tokens of a segment, rows of a batch
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = {"parallel": parallel_losses, "recurrent": recurrent_losses}
TOLERANCE = 1e-3  # of the difference of gradients in float32; bfloat16 alone moves either by 0.16 in norm


def load(dtype: str) -> tuple[Compressor, Any]:
    """The embedded model with an adapter of the size of the shipped ones, and the tokenizer."""
    model, tokenizer = ccm.load_default_model(dtype=DTYPES[dtype])
    compressor = Compressor(model, CompressorConfig(slots=4, target_modules="all"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an untrained adapter changes nothing, and half of its gradient is zero
        for parameter in compressor.lora_parameters:
            parameter.normal_(0, 0.02, generator=generator)
    return compressor, tokenizer


def rows_of(tokenizer: Any, length: int, batch: int) -> list[ConversationRow]:
    """Rows of conversation, cut into segments of 3/4 to 5/4 of ``length`` tokens, all of which are scored."""
    held_out = held_out_rows(load_chitchat("validation"), tokenizer)
    text = (token for row in held_out for segment in row.segments for token in segment)
    draw = random.Random(0)
    rows = []
    for r in range(batch):
        sizes = [draw.randint(3 * length // 4, 5 * length // 4) for _ in range(SEGMENTS)]
        segments = tuple(tuple(islice(text, size)) for size in sizes)
        rows.append(ConversationRow(str(r), segments, tuple((1, size) for size in sizes)))
    return rows


def step(compressor: Compressor, way: str, rows: list[ConversationRow]) -> list[Tensor]:
    """Forward and backward; the gradient of each trained parameter, zero where nothing reads what it makes."""
    compressor.zero_grad(set_to_none=True)
    loss, tokens = WAYS[way](compressor, rows, "ce")
    (loss / tokens).backward()
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in compressor.trainable_parameters()
    ]


def gradient_difference(compressor: Compressor, rows: list[ConversationRow]) -> dict[str, float]:
    """How far the two gradients are apart, relative to their size.

    "norm" is over all parameters together, "parameter" the worst entry relative to the largest of its parameter.
    """
    parallel, recurrent = (step(compressor, way, rows) for way in WAYS)
    off = [a - b for a, b in zip(parallel, recurrent, strict=True)]
    norms = [torch.cat([t.flatten() for t in tensors]).norm() for tensors in (off, parallel)]
    worst = max(
        float(d.abs().max() / a.abs().max().clamp(min=1e-12)) for d, a in zip(off, parallel, strict=True)
    )
    return {"norm": float(f"{norms[0] / norms[1]:.2g}"), "parameter": float(f"{worst:.2g}")}


def peak_memory(dtype: str, way: str | None, length: int, batch: int, threads: int) -> float:
    """Peak memory of this process, in MB, with the model loaded and, if a way is given, in one step."""
    torch.set_num_threads(threads)
    compressor, tokenizer = load(dtype)
    rows = rows_of(tokenizer, length, batch)
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")  # Linux counts anew from here; elsewhere the peak of loading is in, too
    if way is not None:
        step(compressor, way, rows)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(function: Callable[..., float], *arguments: Any) -> float:
    """The result from a fresh process. Call it before this process grows: its peak is handed down."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def seconds(compressor: Compressor, rows: list[ConversationRow], repeats: int) -> list[dict[str, float]]:
    """Seconds of a step each way, taken in turns."""
    times = []
    for _ in range(repeats):
        taken = {}
        for way in WAYS:
            start = time.perf_counter()
            step(compressor, way, rows)
            taken[way] = time.perf_counter() - start
        times.append(taken)
    return times


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the model")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = arguments.limit or REPEATS
    cases = [(dtype, *case) for dtype in arguments.dtypes for case in CASES]
    threads = arguments.threads
    loaded = {dtype: in_own_process(peak_memory, dtype, None, 16, 1, threads) for dtype in arguments.dtypes}
    memory = {
        (*case, way): in_own_process(peak_memory, case[0], way, *case[1:], threads)
        for case in cases
        for way in WAYS
    }
    results = []
    for dtype in arguments.dtypes:
        compressor, tokenizer = load(dtype)
        for _, length, batch in [case for case in cases if case[0] == dtype]:
            rows = rows_of(tokenizer, length, batch)
            difference = gradient_difference(compressor, rows)  # warms up, too
            if dtype == "float32" and max(difference.values()) > TOLERANCE:
                raise RuntimeError(f"gradients differ by {difference}, more than {TOLERANCE}")
            times = seconds(compressor, rows, repeats)
            ratios = [taken["recurrent"] / taken["parallel"] for taken in times]
            tokens = sum(row.tokens for row in rows)
            result: dict[str, Any] = {
                "dtype": dtype,
                "segments": SEGMENTS,
                "tokens_per_segment": length,
                "rows_per_batch": batch,
                "tokens": tokens,
                "gradient_difference": difference,
                "loaded_mb": round(loaded[dtype]),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
            for way in WAYS:
                median = statistics.median(taken[way] for taken in times)
                result[way] = {
                    "seconds_per_row": round(median / batch, 4),
                    "tokens_per_second": round(tokens / median, 1),
                    "peak_mb": round(memory[dtype, length, batch, way]),
                }
            results.append(result)
            print(result, flush=True)
    store(
        "parallel_training",
        {
            "task": "one step (forward and backward, cross-entropy, no teacher), chitchat text",
            "repeats": repeats,
            "gradient_tolerance_float32": TOLERANCE,
            "rows": results,
        },
    )


if __name__ == "__main__":
    main()
