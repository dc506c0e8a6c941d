"""Training steps by both engines on a CPU: rows packed one behind the other, against rows beside each other.

A step is what a distilling run does: student, teacher, loss over the whole vocabulary, backward pass. The rows are
the same small talk in rows of 10 turns and in rows of 6 to 64. Engines take turns. Seconds are those of the
processor, and the best of the repeats counts, because other work on the machine only ever adds. Take one thread.

    python benchmarks/training_speed.py --threads 1
    python benchmarks/training_speed.py --threads 1 --dtypes bfloat16
"""

from __future__ import annotations

import os
import platform
import time
from itertools import cycle
from typing import Any

import numpy as np
import torch
from common import parser, store

import ccm
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.data import load_chitchat
from ccm.data.rows import held_out_rows
from ccm.training.engines import Engine, Lean, Padded
from ccm.training.objectives import distill, summed_loss
from ccm.training.packed import ArrayRow

TOKENS, REPEATS, SLOTS = 2048, 3, 4
TURNS = {"rows of 10 turns": (10,), "rows of 6 to 64 turns": (6, 64, 10, 24, 6, 16)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(dtype: str) -> tuple[Compressor, Any]:
    """The embedded model with an adapter of the size of the shipped ones, and the tokenizer."""
    model, tokenizer = ccm.load_default_model(DTYPES[dtype])
    compressor = Compressor(model, CompressorConfig(slots=SLOTS, sink=0, rank=16, target_modules="all"))
    with torch.no_grad():  # an untrained adapter changes nothing, and half of its gradient is zero
        for parameter in compressor.lora_parameters:
            parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return compressor, tokenizer


def rows_of(tokenizer: Any, turns: tuple[int, ...]) -> list[ArrayRow]:
    """Rows of small talk with so many turns in turn, as many as fit; every token after the first turn is scored."""
    held_out = held_out_rows(load_chitchat("validation"), tokenizer)
    segments = cycle([segment for row in held_out for segment in row.segments])
    rows: list[ArrayRow] = []
    tokens = 0
    for count in cycle(turns):
        parts = [np.array(next(segments), np.int32) for _ in range(count)]
        row = np.concatenate(parts)
        if tokens + len(row) > TOKENS:
            return rows
        stops = np.cumsum([len(part) for part in parts]).astype(np.int32)
        roles = np.ones(len(row), np.uint8)
        roles[: stops[0]] = 0
        roles[stops[:-1]] = 0
        rows.append(ArrayRow(row, roles, stops))
        tokens += len(row)
    raise AssertionError("cycle ends")


def step(engine: Engine, rows: list[ArrayRow]) -> float:
    """One step, and its loss per token."""
    engine.compressor.zero_grad(set_to_none=True)
    found = engine.run(engine.prepare(rows, teacher=True))
    loss = summed_loss(found.student, found.teacher, found.ids, engine.compressor.head, distill)
    loss.backward()
    return float(loss.detach()) / len(found.roles)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the model")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in arguments.dtypes:
        compressor, tokenizer = load(dtype)
        engines = {"padded": Padded(compressor), "lean": Lean(compressor)}
        for name, turns in TURNS.items():
            rows = rows_of(tokenizer, turns)
            tokens = sum(len(row.ids) for row in rows)
            best = dict.fromkeys(engines, float("inf"))
            losses = {}
            for _ in range(arguments.limit or REPEATS):
                for kind, engine in engines.items():
                    start = time.process_time()
                    losses[kind] = round(step(engine, rows), 4)
                    best[kind] = min(best[kind], time.process_time() - start)
            results.append(
                {
                    "dtype": dtype,
                    "rows": name,
                    "count": len(rows),
                    "tokens": tokens,
                    "loss": losses,
                    "tokens_per_second": {kind: round(tokens / seconds, 1) for kind, seconds in best.items()},
                    "ratio": round(best["padded"] / best["lean"], 2),
                }
            )
            store(  # case by case: what is cut off keeps those that it has
                "training_speed",
                {
                    "task": "one step of distillation, embedded model, rank 16, 4 slots a segment, small talk",
                    "clock": "seconds of the processor",
                    "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
                    "repeats": arguments.limit or REPEATS,
                    "cases": results,
                },
                " and ".join(arguments.dtypes),
            )


if __name__ == "__main__":
    main()
