"""Speed and memory of training steps of growing size on this machine, as one JSON file.

A size is tried only if what the last one took predicts that it fits the card.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ccm.errors import CCMError
from ccm.models.load import load_model
from ccm.training import TrainConfig, Trainer
from ccm.training.recipe import load_recipe

SMALLEST, STEPS = 4096, 8
CARD = 0.9  # share of the card's memory that a step may be predicted to take


def fitting(last: dict[str, Any], total: int) -> int:
    """Tokens of the largest step that is predicted to fit a card of ``total`` bytes."""
    room = CARD * total - last["held_bytes"]
    return int(last["tokens_per_batch"] * room / max(1, last["step_bytes"])) // 1024 * 1024


def steps_of(config: TrainConfig, started: float) -> dict[str, Any]:
    """Measure some steps of a run whose folder goes away; ``started``: when the command began."""
    card = torch.cuda.is_available()
    model, tokenizer = load_model(config.model, "bfloat16" if config.bf16 else None, "auto")
    seen: list[tuple[float, int, float]] = []  # when, tokens so far, bytes at most

    def on_report(report: dict[str, Any]) -> None:
        seen.append((time.time(), report["tokens"], torch.cuda.max_memory_allocated() if card else 0))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, tokenizer, config, folder)
        gc.collect()
        if card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if card else 0
        try:
            trainer.run(on_report)
        finally:
            trainer.close()
    *steps, _ = seen  # an evaluation belongs to the last
    pairs = list(pairwise(steps[1:]))  # the first two warm up
    taken = steps[-1][2] - held
    return {
        "tokens_per_batch": config.tokens_per_batch,
        "tokens": steps[-1][1] // len(steps),
        "tokens_per_second": round(statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)),
        "bytes_per_token": round(taken * len(steps) / steps[-1][1]),
        "step_bytes": taken,
        "held_bytes": held,
        "seconds_to_first_step": round(steps[0][0] - started, 1),
    }


def sizes(config: TrainConfig, seconds: float, started: float) -> Iterator[dict[str, Any]]:
    """Measure steps of twice as many tokens each time, until the card, the time or the gain ends."""
    card = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if card else 0
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if card else "cpu",
        "tokens_per_batch": config.tokens_per_batch,
        "fits": None,  # tokens of a step, as far as is known
        "ended": None,
        "sizes": [],
    }
    size = min(SMALLEST, config.tokens_per_batch)
    while not result["ended"]:
        began, before = time.time(), result["sizes"][-1:]
        last = steps_of(replace(config, tokens_per_batch=size, rows=size), started)
        now, size = time.time(), 2 * size
        result["sizes"].append(last)
        result["fits"] = fitting(last, total) if card else None
        if card and result["fits"] < size:
            result["ended"] = f"{size:,} tokens are predicted to take more than {CARD:.0%} of the card"
        elif now - started + 2 * (now - began) > seconds:
            result["ended"] = "no time left for a larger step"
        elif before and last["tokens_per_second"] < 1.05 * before[0]["tokens_per_second"]:
            result["ended"] = "a larger step is no faster"
        yield result


def main(given: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("recipe")
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments.add_argument("--out", type=Path, required=True, help="the JSON file")
    arguments.add_argument("--seconds", type=float, default=60.0, help="no further size after so many")
    arguments.add_argument("--started", type=float, default=time.time(), help="when the command began")
    chosen = arguments.parse_args(given)
    try:
        config = load_recipe(chosen.recipe, chosen.overrides)
        once = {"minutes": 0.0, "eval_every": 10**9, "save_every": 10**9, "eval_rows": 1, "require": {}}
        for result in sizes(replace(config, steps=STEPS, **once), chosen.seconds, chosen.started):
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")
            print(", ".join(f"{name} {value:,}" for name, value in result["sizes"][-1].items()), flush=True)
    except CCMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"ended: {result['ended']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
