"""Whether the slots of ccm-stream carry this book, or how books are written: slots of another novel in their place.

A stretch of Moby-Dick is scored segment by segment under its own sink, slots and window; with the slots of Persuasion
instead; and under sink and window without slots, of the same recent tokens and of the same number of keys.

    python benchmarks/foreign_stream.py
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from common import parser, store

import ccm
from ccm.data.books import load_books
from ccm.evaluation.share import turn_nll

SEGMENT, FOLDED, SCORED = 64, 24, 64  # tokens of a segment; segments that fill the memory; scored after them
START = {"Moby-Dick": 200_000, "Persuasion": 60_000}  # characters
CHARACTERS = 12  # more than a token of prose has


def segments(tokenizer: Any, title: str, count: int) -> list[list[int]]:
    text = load_books()["test"][title][START[title] :][: CHARACTERS * SEGMENT * count]
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [ids[k * SEGMENT : (k + 1) * SEGMENT] for k in range(count)]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ccm.load_default_model(dtype=torch.float32)
    memory = ccm.get_method("ccm-concat", adapter="ccm-stream")
    other, own = memory.open(model, tokenizer), memory.open(model, tokenizer)
    for segment in segments(tokenizer, "Persuasion", FOLDED):
        other.append(segment)
    windows = {keys: ccm.get_method("streaming-llm", window=keys - 4).open(model) for keys in (132, 196)}
    nll: dict[str, list[float]] = {}
    for t, segment in enumerate(segments(tokenizer, "Moby-Dick", FOLDED + (arguments.limit or SCORED))):
        if t >= FOLDED:
            foreign = own.fork()
            foreign.keep(slots=other.memory.rows[0].slots)
            runs = {"own slots": own, "slots of another novel": foreign}
            runs |= {f"no slots, {keys} keys": run for keys, run in windows.items()}
            for name, run in runs.items():
                total, tokens = turn_nll(run.logits(segment), segment, (1, SEGMENT))
                nll.setdefault(name, []).append(total / tokens)
        for run in (own, *windows.values()):
            run.append(segment)
    rows = []
    for name, values in nll.items():
        worse = [a - b for a, b in zip(values, nll["own slots"], strict=True)]
        half = 1.96 * statistics.stdev(worse) / math.sqrt(len(worse))
        mean = statistics.fmean(worse)
        rows.append(
            {
                "memory": name,
                "perplexity": round(math.exp(statistics.fmean(values)), 2),
                "nats_over_own_slots": round(mean, 4),
                "ci": [round(mean - half, 4), round(mean + half, 4)],
            }
        )
    store(
        "foreign_stream",
        {"task": f"{len(worse)} segments of Moby-Dick", "keys": own.memory.length, "rows": rows},
    )


if __name__ == "__main__":
    main()
