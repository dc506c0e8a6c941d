"""The paper's ablations, each a short training on the common schedule of ``recipes/baselines``: the same rows in the
same order, the same held-out rows, and the difference of the recovered share from the baseline with its paired 95 %
interval.

A variant resumes from its folder in ``runs/ablations``, is stored when it ends, and is then skipped: stop and
start as you like. Intervals are over held-out rows; what other initial weights change is shown by the variant
"seed". Slot mass was tried outside of the library, which has no place for it (docs/decisions.md).

    python benchmarks/ablations.py --list
    python benchmarks/ablations.py --only baseline no-recursion
    python benchmarks/ablations.py
    python benchmarks/ablations.py --page         docs/ablations.md from what is stored
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, parser
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import ccm
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.rule import get_rule
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, held_out_rows
from ccm.errors import CCMError, ConfigError, UnknownNameError
from ccm.evaluation.share import Nll, parallel_nll, recovered_share, reference_nll
from ccm.files.atomic import write_atomically
from ccm.methods.baselines import BASELINES
from ccm.training import TrainConfig, Trainer
from ccm.training.engines import under
from ccm.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "baselines" / "ccm-concat.yaml"
RUNS = ROOT / "runs" / "ablations"
TURNS, FIRST, HELD_OUT = 10, 4, 96  # of held-out rows: turns, first scored turn, how many


@dataclass(frozen=True)
class Variant:
    """What differs from the baseline: a line for people, and overrides of its recipe."""

    what: str
    overrides: tuple[str, ...] = ()


def variant(what: str, *overrides: str) -> Variant:
    return Variant(what, overrides)


BASELINE = "baseline"
VARIANTS = {
    BASELINE: variant("concat, 4 slots a segment, conditional LoRA of rank 8 on attention, self-distillation"),
    "seed": variant("the baseline from other initial weights: the noise between runs", "compressor.seed=1"),
    "slots-1": variant("1 slot a segment", "compressor.slots=1"),
    "slots-2": variant("2 slots a segment", "compressor.slots=2"),
    "slots-8": variant("8 slots a segment", "compressor.slots=8"),
    "merge-mean": variant(
        "merge by the mean, 16 slots in all", "compressor.slots=16", "compressor.rule=mean"
    ),
    "merge-ema": variant(
        "merge by a moving average, 16 slots in all", "compressor.slots=16", "compressor.rule=ema"
    ),
    "no-recursion": variant(
        "segments are compressed without sight of Mem(t-1)", "compressor.kind=gisting-online"
    ),
    # alpha / rank, and so the size of a step, stays that of the baseline
    "rank-2": variant("LoRA of rank 2", "compressor.rank=2", "compressor.alpha=4"),
    "rank-32": variant("LoRA of rank 32", "compressor.rank=32", "compressor.alpha=64"),
    "all-layers": variant("LoRA on feed-forward layers too", "compressor.target_modules=all"),
    "ce": variant("cross-entropy on the text instead of distillation", "objective=ce"),
    "target-ce": variant("cross-entropy on the last turn (the paper's)", "objective=target-ce"),
    "reconstruction": variant("writing a segment back from its slots, beside", "reconstruction=0.3"),
    "nested": variant("1, 2 or 4 slots drawn for each pass: one adapter for three budgets", "slot_choices=[1,2,4]"),
    "merge-4": variant("merge by the mean, 4 slots in all", "compressor.rule=mean"),
    "both-rules": variant(
        "concat or the mean drawn for each pass: one adapter for two rules", "rule_choices=[concat,mean]"
    ),
    "fp32": variant("the frozen model in fp32 while the adapter is trained", "bf16=false"),
    "steps-60": variant("twice the steps: 60", "steps=60", "eval_every=60"),
    "steps-120": variant("four times the steps: 120", "steps=120", "eval_every=120"),
    "data-32": variant("32 training conversations", "data.chitchat.limit=32"),
    "data-128": variant("128 training conversations", "data.chitchat.limit=128"),
}  # fmt: skip
#: Trained and stored until November 2026; the library has no such options any more.
PAST = {
    "unconditional": "LoRA on every token, not on COMP tokens alone: what reads the memory is tuned as well",
    "positions-slot": "COMP tokens computed at their slots' places",
}


def run(config: TrainConfig, folder: Path, held_out: Sequence[ConversationRow]) -> dict[str, Any]:
    """Train, and score on the frozen model in bfloat16; every drawn budget and rule is scored."""
    model, tokenizer = ccm.load_default_model(dtype=torch.bfloat16 if config.bf16 else torch.float32)
    trainer = Trainer(model, tokenizer, config, folder)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)

        def show(report: dict[str, Any]) -> None:
            line = f"loss {report['loss']:.3f}, {report['tokens_per_second']:.0f} tokens/s"
            bar.update(task, completed=trainer.progress, description=line)

        trainer.run(show)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log]
    tenth = max(1, len(losses) // 10)
    parts = [losses[k : k + tenth] for k in range(0, len(losses), tenth)]
    if not config.bf16:
        model, _ = ccm.load_default_model(dtype=torch.bfloat16)
    made_by = BASELINES.get(config.compressor.kind, Compressor)
    compressor = made_by.from_pretrained(model, trainer.adapter)
    result = {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "parameters": sum(p.numel() for p in trainer.parameters),
        "loss": [round(sum(part) / len(part), 4) for part in parts],
        "nll": per_row(parallel_nll(compressor, held_out, FIRST)),
    }
    by_rule: dict[str, list[float]] = {}
    for rule in config.rule_choices:
        with under(compressor, get_rule(rule)):
            by_rule[rule] = per_row(parallel_nll(compressor, held_out, FIRST))
    if by_rule:
        result["nll_by_rule"] = by_rule
    fewer = {
        k: parallel_nll(compressor, held_out, FIRST, slots=k) for k in sorted(set(config.slot_choices))[:-1]
    }
    if fewer:
        result["nll_with_fewer_slots"] = {str(k): per_row(nll) for k, nll in fewer.items()}
    return result


def per_row(nll: Nll) -> list[float]:
    return [round(total, 3) for total in nll.total]


def share_interval(
    references: dict[str, list[float]], method: list[float], baseline: list[float] | None = None
) -> tuple[float, float, float]:
    """Recovered share of a method, or its difference from a baseline, with the 95 % interval: (share, low, high).

    Rows are resampled, the same ones for both.

    Args:
        references: summed NLL per row with "none" and "full" context.
        method, baseline: summed NLL per row.
    """
    names = (references["none"], references["full"], method, method if baseline is None else baseline)
    totals = torch.tensor(names, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(totals.shape[1], (2000, totals.shape[1]), generator=generator)

    def shares(none: Tensor, full: Tensor, m: Tensor, b: Tensor) -> Tensor:
        share = recovered_share(none, full, m)
        return share if baseline is None else share - recovered_share(none, full, b)

    drawn = shares(*totals[:, picks].sum(-1)).sort().values
    ends = drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn))]
    share, low, high = (round(float(x), 4) for x in (shares(*totals.sum(-1)), *ends))
    return share, low, high


def summarize(result: dict[str, Any]) -> None:
    """Shares, and differences from the baseline where that has run, from the stored NLL of each row."""
    runs, references = result["variants"], result["references"]
    for scored in runs.values():
        scored["perplexity"] = round(math.exp(sum(scored["nll"]) / sum(references["tokens"])), 2)
        scored["recovered_share"], *scored["share_ci"] = share_interval(references, scored["nll"])
        if BASELINE in runs:
            scored["difference"], *scored["difference_ci"] = share_interval(
                references, scored["nll"], runs[BASELINE]["nll"]
            )
        for drawn in ("with_fewer_slots", "by_rule"):
            if f"nll_{drawn}" in scored:
                scored[f"recovered_share_{drawn}"] = {
                    k: share_interval(references, nll) for k, nll in scored[f"nll_{drawn}"].items()
                }


def read_stored(path: Path, schedule: dict[str, Any]) -> dict[str, Any] | None:
    """What is stored already, or None.

    Raises:
        ConfigError: it was made on another schedule.
    """
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    other = result["schedule"]
    if changed := [
        f"{name} {other.get(name)}, not {value}" for name, value in schedule.items() if other.get(name) != value
    ]:  # fmt: skip
        raise ConfigError(
            f"{path.name} holds runs with {'; '.join(changed)}: repeat these settings, or move it away"
        )
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(
        path, (json.dumps({**result, "environment": environment("bfloat16")}, indent=1) + "\n").encode()
    )


_INTRODUCTION = """\
# Ablations

This page is written by `python benchmarks/ablations.py --page` from `results/ablations.json`.

What each choice of the method is worth. Every variant is trained from nothing on the same {steps} steps
({tokens:,} tokens of small talk, {minutes:.0f} minutes of one core) where it does not say otherwise, the model held
in bfloat16, and differs from the baseline in one thing. *Share* is the recovered share on {rows} held-out
conversations of ten turns: 0 is no context, 1 the whole of it. The difference to the baseline is paired, and its
95 % interval is over held-out rows; another draw of the initial weights (`seed`) moves the share by {seed:+.3f}, so a
smaller difference says little. Runs as short as these order the choices; they do not say where each would end, and
most of the share that they reach is the manner of small talk and not yet memory
([experiments.md](experiments.md#what-a-recovered-share-is-made-of))."""

_BUDGETS = """\
## One adapter for several budgets

The adapter `nested` was trained with 1, 2 or 4 slots drawn for each pass, and is read with the first k of its slots;
beside it adapters that were trained for one budget alone, all with the same tokens."""

_RULES = """\
## One adapter for both rules

The adapter `both-rules` was trained with the rule drawn for each pass, and is read by either; beside it
adapters that were trained for one rule alone, all with 4 COMP tokens a segment and the same tokens."""

#: Rule -> the variant that was trained for it alone.
_ONE_RULE = {"concat": BASELINE, "mean": "merge-4"}

#: Slots a segment -> the variant that was trained for them alone.
_ALONE = {"1": "slots-1", "2": "slots-2", "4": BASELINE}


def page(result: dict[str, Any]) -> str:
    """The stored results as Markdown.

    Raises:
        ConfigError: the baseline or the noise between runs is not known yet.
    """
    runs, schedule = result["variants"], result["schedule"]
    if missing := {BASELINE, "seed"} - runs.keys():
        raise ConfigError(f"the page needs {' and '.join(sorted(missing))}: run them first (--only)")
    lead = _INTRODUCTION.format(
        steps=schedule["steps"],
        rows=schedule["held_out_rows"],
        tokens=runs[BASELINE]["tokens"],
        minutes=runs[BASELINE]["seconds"] / 60,
        seed=runs["seed"]["difference"],
    )
    lines = [
        "| variant | what differs | trained | share | difference to the baseline |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, run in sorted(runs.items(), key=lambda entry: (entry[0] != BASELINE, -entry[1]["difference"])):
        cells = [
            f"`{name}`",
            PAST[name] if name in PAST else VARIANTS[name].what,
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['recovered_share']:.3f}",
        ]
        low, high = run["difference_ci"]
        difference = f"{run['difference']:+.3f} <sub>{low:+.3f} to {high:+.3f}</sub>"
        lines.append(f"| {' | '.join([*cells, '' if name == BASELINE else difference])} |")
    parts = [lead, "\n".join(lines)]
    if {"nested", *_ALONE.values()} <= runs.keys():
        parts += [_BUDGETS, _budgets(runs)]
    if {"both-rules", *_ONE_RULE.values()} <= runs.keys():
        parts += [_RULES, _rules(runs)]
    return "\n\n".join(parts).replace("-0.", "−0.") + "\n"


def _budgets(runs: dict[str, Any]) -> str:
    nested = runs["nested"]
    fewer = nested["recovered_share_with_fewer_slots"]
    lines = ["| slots a segment | `nested` | trained for this budget |", "| ---: | ---: | ---: |"]
    for slots, alone in _ALONE.items():
        share = fewer[slots][0] if slots in fewer else nested["recovered_share"]
        lines.append(f"| {slots} | {share:.3f} | {runs[alone]['recovered_share']:.3f} (`{alone}`) |")
    return "\n".join(lines)


def _rules(runs: dict[str, Any]) -> str:
    drawn = runs["both-rules"]["recovered_share_by_rule"]
    lines = ["| rule | `both-rules` | trained for this rule |", "| --- | ---: | ---: |"]
    for rule, alone in _ONE_RULE.items():
        lines.append(f"| {rule} | {drawn[rule][0]:.3f} | {runs[alone]['recovered_share']:.3f} (`{alone}`) |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--list", action="store_true", help="show the variants and end")
    arguments.add_argument("--page", action="store_true", help="write docs/ablations.md and end")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these variants")
    arguments.add_argument("--steps", type=int, help="training steps, other than the recipe's")
    given = arguments.parse_args()
    if given.list:
        print("\n".join(f"{name:16}{each.what}" for name, each in VARIANTS.items()))
        return
    if given.page:
        try:
            text = page(json.loads((RESULTS / "ablations.json").read_text()))
        except (OSError, CCMError) as error:
            arguments.error(str(error))
        write_atomically(ROOT / "docs" / "ablations.md", text.encode())
        return
    if any(x is not None and x <= 0 for x in (given.steps, given.limit)):
        arguments.error("--steps and --limit must be above zero")
    torch.set_num_threads(given.threads)
    try:
        run_all(given.only or list(VARIANTS), given.steps, given.limit)
    except CCMError as error:
        arguments.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the variants that had ended are stored", file=sys.stderr)
        sys.exit(130)


def run_all(names: Sequence[str], steps: int | None, limit: int | None) -> None:
    """Run the named variants that are not stored yet, and store each as it ends."""
    if unknown := set(names) - set(VARIANTS):
        raise UnknownNameError("variant", min(unknown), list(VARIANTS))
    same = () if steps is None else (f"steps={steps}", f"eval_every={steps}")
    base = load_recipe(RECIPE, same)
    path = RESULTS / "ablations.json"
    model, tokenizer = ccm.load_default_model(dtype=torch.bfloat16)
    validation = load_chitchat("validation", cap_per_user=None)
    held_out = held_out_rows(validation, tokenizer, TURNS, per_conversation=2)[: limit or HELD_OUT]
    schedule = {
        "steps": base.steps,
        "lr": base.lr,
        "rows_per_step": base.rows,
        "held_out_rows": len(held_out),
    }
    result = read_stored(path, schedule)
    if result is None:
        untrained = Compressor(model, CompressorConfig(slots=1, sink=0))
        none, full = (reference_nll(untrained, held_out, context, FIRST) for context in ("none", "full"))
        result = {
            "task": f"chitchat, validation users, rows of {TURNS} turns, targets from turn {FIRST + 1} on",
            "precision": "trained and scored on the model in bfloat16",
            "schedule": schedule,
            "references": {"tokens": none.tokens, "none": per_row(none), "full": per_row(full)},
            "variants": {},
        }
    for name in names:
        if name in result["variants"]:
            print(f"{name}: stored already, skipped", flush=True)
            continue
        what, folder = VARIANTS[name].what, RUNS / name
        print(f"{name}: {what}", flush=True)
        # the run's own last evaluation is not used
        config = load_recipe(RECIPE, (*same, "eval_rows=1", *VARIANTS[name].overrides))
        result["variants"][name] = {"what": what, **run(config, folder, held_out)}
        summarize(result)
        write(path, result)
        shutil.rmtree(folder)
    for name, scored in result["variants"].items():
        cells = [f"share {scored['recovered_share']:.3f} {scored['share_ci']}"]
        if "difference" in scored and name != BASELINE:
            cells.append(f"difference {scored['difference']:+.3f} {scored['difference_ci']}")
        print(f"{name:16}{'  '.join(cells)}")


if __name__ == "__main__":
    main()
