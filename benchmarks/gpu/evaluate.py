"""An adapter on the held-out rows, with what the base model makes of them: all figures but those of its rivals.

    python benchmarks/gpu/evaluate.py --adapter runs/chat/adapter --out eval.json

What rivals make of the same rows is in ``results/held_out_baselines.json``; ``held_out.py table`` puts both together.
The file is written figure by figure; what it holds of this very adapter is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import held_out
import held_out_rows

from ccm.core.compressor import Compressor
from ccm.training.engines import Padded


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--adapter", required=True, help="a folder, or a name")
    options.add_argument("--rows", type=Path, default=held_out_rows.FILE, help="made by `held_out.py rows`")
    options.add_argument("--out", type=Path, required=True, help="JSON")
    options.add_argument("--model", help="a folder; the embedded model if it is not given")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--rules", nargs="*", default=[], choices=held_out.RULES, help="beside its own")
    options.add_argument("--limit", type=int, help="rows of a source")
    options.add_argument(
        "--rivals",
        action="store_true",
        help="fitted entries, windows and memories without training as well (minutes)",
    )
    given = options.parse_args()
    began = time.monotonic()
    rows = held_out_rows.load(given.rows)
    model, tokenizer = held_out.opened(given.model, given.device)
    compressor = Compressor.from_pretrained(model, given.adapter)
    engine = Padded(compressor)
    figures = held_out.Figures.open(given.out, compressor.fingerprint())
    own = held_out.budgets(given.rules)
    rivals = {**held_out.fitted(tokenizer), **held_out.baselines(tokenizer)}
    wanted = {**own, **rivals}
    wanted = {name: wanted[name] for name in dict.fromkeys(("none", "full", *wanted))}
    for figure, measure in wanted.items():
        if given.rivals or figure in own or figure in held_out.REFERENCES:
            for source, part in rows.items():
                figures.measure(engine, source, part, figure, measure, given.limit)
            sys.stdout.write(f"{time.monotonic() - began:7.1f} s  {figure}\n")
    baselines = held_out.Figures.open(held_out.RESULTS / "held_out_baselines.json")
    shown = ["window as slots 4", "attention-matching", *held_out.budgets(given.rules)]
    shown = [name for name in shown if not name.startswith("last")]
    sys.stdout.write(held_out.table(rows, [baselines, figures], shown) + "\n")


if __name__ == "__main__":
    main()
