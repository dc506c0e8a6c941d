"""The two ways to canonical slot positions, trained on the same rows with the same draws.

(a) "after": COMP tokens are computed behind their segment, their keys are moved to the slot's place afterwards;
(b) "slot": COMP tokens are computed at the slot's place, nothing is moved.

    python benchmarks/positions.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from common import parser, store

import ccm
from ccm.compressor import CompressorConfig
from ccm.training import TrainConfig, Trainer

STEPS = 60


def train(way: str, rule: str, slots: int, seed: int, steps: int) -> dict[str, Any]:
    model, tokenizer = ccm.load_default_model()
    config = TrainConfig(
        compressor=CompressorConfig(slots=slots, rule=rule, sink=0, comp_positions=way, seed=seed),
        data={"chitchat": {"turns": [10]}},
        rows=2,
        steps=steps,
        eval_every=steps,
        seed=seed,
    )
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, tokenizer, config, folder)
        report = trainer.run(lambda line: losses.append(line["loss"]))
    tenth = max(1, steps // 6)
    return {
        "comp_positions": way,
        "rule": rule,
        "seed": seed,
        "loss": [round(sum(losses[i : i + tenth]) / tenth, 4) for i in range(0, steps, tenth)],
        "perplexity": report["perplexity"],
        "recovered_share": report["recovered_share"],
        "tokens": report["tokens"],
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for seed in (0, 1):
        for way in ("after", "slot"):
            rows.append(train(way, "concat", 4, seed, arguments.limit or STEPS))
            print(rows[-1], flush=True)
    store("positions", {"task": "validation chitchat after a short training", "rows": rows})


if __name__ == "__main__":
    main()
