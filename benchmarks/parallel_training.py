"""Training by one parallel pass against the recursion with backpropagation through time: same rows, same machine.

Rows have 16 segments of chitchat, of about 16 and of about 64 tokens. Both ways give the cross-entropy of the
same tokens and the same gradient, which is checked in the run (float32). Timings are taken in turns; peak memory is
that of a process of its own for each; on a GPU, that of torch's allocator. The recursion reads and folds a segment
in one forward pass, and goes through the rows of a batch in step. Leave bfloat16 out on a processor without units for
it: it would take hours.

    python benchmarks/parallel_training.py
    python benchmarks/parallel_training.py --dtypes float32
    python benchmarks/parallel_training.py --device cuda
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from common import parser, store
from torch import Tensor

import ccm
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, held_out_rows
from ccm.training.recursion import parallel_losses, recurrent_losses

SEGMENTS, REPEATS = 16, 5
CASES = {  # by device: tokens of a segment, rows of a batch
    "cpu": ((16, 1), (16, 4), (64, 1)),
    "cuda": ((16, 1), (16, 4), (16, 16), (64, 1), (64, 16)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = {"parallel": parallel_losses, "recurrent": recurrent_losses}
# of the difference of gradients in float32 (on a GPU without TF32, as torch has it by default, or it would be rounded
# to 10 bits); bfloat16 alone moves either by 0.16 in norm
TOLERANCE = 1e-3


def load(dtype: str, device: str = "cpu") -> tuple[Compressor, Any]:
    """The embedded model with an adapter of the size of the shipped ones, and the tokenizer."""
    model, tokenizer = ccm.load_default_model(DTYPES[dtype], device)
    compressor = Compressor(model, CompressorConfig(slots=4, sink=0, target_modules="all"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an untrained adapter changes nothing, and half of its gradient is zero
        for parameter in compressor.lora_parameters:
            # drawn on the CPU, so that every device has the same numbers
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))
    return compressor, tokenizer


def rows_of(tokenizer: Any, length: int, batch: int) -> list[ConversationRow]:
    """Rows of conversation, cut into segments of 3/4 to 5/4 of ``length`` tokens, all of which are scored."""
    held_out = held_out_rows(load_chitchat("validation"), tokenizer)
    # the largest batch takes more text than there is
    text = cycle(token for row in held_out for segment in row.segments for token in segment)
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


def peak_on_gpu(compressor: Compressor, way: str, rows: list[ConversationRow]) -> float:
    """Peak GPU memory of one step, in MB, with the model."""
    compressor.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    step(compressor, way, rows)
    return torch.cuda.max_memory_allocated() / 2**20


def now(device: str) -> float:
    """Seconds of a clock, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(
    compressor: Compressor, rows: list[ConversationRow], repeats: int, device: str
) -> list[dict[str, float]]:
    """Seconds of a step each way, taken in turns."""
    times = []
    for _ in range(repeats):
        taken = {}
        for way in WAYS:
            start = now(device)
            step(compressor, way, rows)
            taken[way] = now(device) - start
        times.append(taken)
    return times


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the model")
    options.add_argument("--device", choices=CASES, default="cpu", help="of the model")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = arguments.limit or REPEATS
    device, threads = arguments.device, arguments.threads
    loaded: dict[str, float] = {}
    memory: dict[tuple[str, int, int, str], float] = {}
    if device == "cpu":
        loaded = {
            dtype: in_own_process(peak_memory, dtype, None, 16, 1, threads) for dtype in arguments.dtypes
        }
        memory = {
            (dtype, *case, way): in_own_process(peak_memory, dtype, way, *case, threads)
            for dtype in arguments.dtypes
            for case in CASES[device]
            for way in WAYS
        }
    results = []
    for dtype in arguments.dtypes:
        compressor, tokenizer = load(dtype, device)
        if device == "cuda":
            loaded[dtype] = torch.cuda.memory_allocated() / 2**20
        for length, batch in CASES[device]:
            rows = rows_of(tokenizer, length, batch)
            difference = gradient_difference(compressor, rows)  # warms up, too
            if dtype == "float32" and max(difference.values()) > TOLERANCE:
                raise RuntimeError(f"gradients differ by {difference}, more than {TOLERANCE}")
            times = seconds(compressor, rows, repeats, device)
            if device == "cuda":
                for way in WAYS:
                    memory[dtype, length, batch, way] = peak_on_gpu(compressor, way, rows)
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
            store(  # row by row: what is cut off keeps those that it has
                "parallel_training" if device == "cpu" else f"parallel_training_{device}",
                {
                    "task": "one step (forward and backward, cross-entropy, no teacher), chitchat text",
                    "device": torch.cuda.get_device_name() if device == "cuda" else device,
                    "repeats": repeats,
                    "gradient_tolerance_float32": TOLERANCE,
                    "rows": results,
                },
            )
        del compressor
        gc.collect()  # its hooks refer to each other, and the next model's memory is measured without it


if __name__ == "__main__":
    main()
