"""The paper's ablations, each a short training on a common schedule: the same rows in the same order, the same
held-out rows, and the difference of the recovered share from the baseline with its paired 95 % interval.

A variant is stored when it ends, and skipped when it is stored already: stop and start as you like. The intervals
are over held-out rows; what another seed changes is shown by the variant "seed". Slot mass is not built in
(docs/decisions.md), so it has no variant.

    python benchmarks/ablations.py --list
    python benchmarks/ablations.py --only baseline no-recursion
    python benchmarks/ablations.py
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, parser
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ccm
from ccm.attention import PLAN, additive
from ccm.compressor import Compressor, CompressorConfig
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, RowStream, held_out_rows
from ccm.errors import CCMError, ConfigError, UnknownNameError
from ccm.evaluation.share import Nll, parallel_nll, recovered_share, reference_nll
from ccm.segments import Layout
from ccm.storage.atomic import write_atomically
from ccm.training.recursion import parallel_losses

TURNS, ROWS, FIRST = 10, 4, 4  # turns per row, rows per step, first scored turn of held-out rows
LR, WARMUP = 1.5e-3, 20
TOKENS, HELD_OUT = 80_000, 96


class Unconditional(Compressor):
    """The adapter acts on every token of a pass over a memory, not on COMP tokens alone.

    A pass without any COMP token (the teacher, the references) is the base model's.
    """

    def hidden(self, layout: Layout) -> Tensor:
        everywhere = (layout.segment >= 0).nonzero(as_tuple=True)

        def widen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            plan = kwargs[PLAN]
            plan.gate = everywhere if plan.gate is not None else None

        return _with_hook(self, widen, super().hidden, layout)

    def _over(self, memory: Any, ids: Tensor, mask: Tensor, n: int = 0, at: Tensor | None = None) -> Any:
        cache, call = super()._over(memory, ids, mask, n, at)
        call[PLAN].gate = torch.cat([mask, mask.new_ones(len(mask), n)], dim=1).nonzero(as_tuple=True)
        return cache, call


class Alone(Compressor):
    """No recursion: h(t) = g_comp(c(t)), every segment is compressed without sight of Mem(t-1).

    Hiding the memory from COMP tokens would not be enough, because the text that they read has seen it. So the pass
    runs on two copies of the row: the text of the first reads the memory and is scored, that of the second sees
    nothing but its own segment, and COMP tokens read the second. Without sink and window only.
    """

    def hidden(self, layout: Layout) -> Tensor:
        def add_copies(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            plan = kwargs[PLAN]
            plan.mask = additive(_alone(layout, plan.mask == 0), plan.mask.dtype)
            return args, {**kwargs, "attention_mask": plan.mask}

        twice = {
            name: getattr(layout, name).repeat(1, 2) for name in ("input_ids", "text_position", "position")
        }
        for name, nothing in (("segment", -1), ("comp", -1), ("folded", 0)):
            own = getattr(layout, name)
            twice[name] = torch.cat([own, torch.full_like(own, nothing)], dim=1)
        states = _with_hook(self, add_copies, super().hidden, replace(layout, **twice))
        return states[:, : layout.input_ids.shape[1]]


def _alone(layout: Layout, visible: Tensor) -> Tensor:
    """The mask of :class:`Alone` from that of its doubled layout, both (B, 1, 2Q, S + 2Q).

    Rows are [first copy | second copy], columns [memory | first copy | second copy].
    """
    batch, width = layout.segment.shape
    comp = layout.comp >= 0
    same = layout.segment.unsqueeze(2) == layout.segment.unsqueeze(1)
    same &= torch.ones(width, width, dtype=torch.bool, device=comp.device).tril()
    text = same & ~comp.unsqueeze(1)
    slots = same & comp.unsqueeze(1)
    no_memory = text.new_zeros(batch, width, visible.shape[-1] - 2 * width)
    comp_sees = torch.cat([no_memory, slots, text], dim=-1)
    copy_sees = torch.cat([no_memory, torch.zeros_like(slots), text], dim=-1)
    first = torch.where(comp.unsqueeze(2), comp_sees, visible[:, 0, :width])
    return torch.cat([first, copy_sees], dim=1).unsqueeze(1)


def _with_hook(compressor: Compressor, hook: Any, run: Any, layout: Layout) -> Tensor:
    handle = compressor.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return run(layout)
    finally:
        handle.remove()


@dataclass(frozen=True)
class Variant:
    """What differs from the baseline.

    Attributes:
        what: one line for people.
        changes: of the baseline's CompressorConfig.
        kind: the compressor's class.
        objective: of the training.
        conversations: how many to train on; None is all.
    """

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    kind: type[Compressor] = Compressor
    objective: str = "distill"
    conversations: int | None = None

    def compressor(self, dtype: torch.dtype, device: str) -> tuple[Compressor, Any]:
        """Untrained, on a fresh base model; and the tokenizer."""
        model, tokenizer = ccm.load_default_model(dtype=dtype, device=device)
        config = CompressorConfig(**{"slots": 4, "rank": 8, "target_modules": "all", **self.changes})
        return self.kind(model, config), tokenizer


BASELINE = "baseline"
VARIANTS = {
    BASELINE: Variant("concat, 4 slots, conditional LoRA of rank 8 on all linear layers, self-distillation"),
    "seed": Variant("the baseline from other initial weights: the noise between runs", {"seed": 1}),
    "unconditional": Variant("LoRA on every token, not on COMP tokens alone", kind=Unconditional),
    "slots-1": Variant("1 slot a segment", {"slots": 1}),
    "slots-2": Variant("2 slots a segment", {"slots": 2}),
    "slots-8": Variant("8 slots a segment", {"slots": 8}),
    "merge-mean": Variant("merge by the mean, 16 slots in all", {"slots": 16, "rule": "mean"}),
    "merge-ema": Variant("merge by a moving average, 16 slots in all", {"slots": 16, "rule": "ema"}),
    "no-recursion": Variant("segments are compressed without sight of Mem(t-1)", kind=Alone),
    # alpha / rank, and so the size of a step, stays that of the baseline
    "rank-2": Variant("LoRA of rank 2", {"rank": 2, "alpha": 4.0}),
    "rank-32": Variant("LoRA of rank 32", {"rank": 32, "alpha": 64.0}),
    "attention": Variant("LoRA on the attention projections only", {"target_modules": "attention"}),
    "positions-slot": Variant("COMP tokens computed at their slots' places", {"comp_positions": "slot"}),
    "ce": Variant("cross-entropy on the text (the paper's) instead of distillation", objective="ce"),
    "data-32": Variant("32 training conversations", conversations=32),
    "data-128": Variant("128 training conversations", conversations=128),
}


@dataclass(frozen=True)
class Budget:
    """How long to train: student tokens, or minutes if given."""

    tokens: int
    minutes: float | None = None

    def progress(self, tokens: int, seconds: float) -> float:
        return seconds / (60 * self.minutes) if self.minutes else tokens / self.tokens


def train(compressor: Compressor, stream: RowStream, objective: str, budget: Budget) -> dict[str, Any]:
    """Train in place by parallel passes; a record of the run.

    AdamW, linear warm-up, cosine down to a tenth at the end of the budget.
    """
    batches, parameters = iter(stream), compressor.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, betas=(0.9, 0.98))
    losses: list[float] = []
    tokens, progress, started = 0, 0.0, time.monotonic()
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)
        while progress < 1.0:
            batch = next(batches)
            loss, count = parallel_losses(compressor, batch, objective)
            (loss / count).backward()
            losses.append(float(loss.detach()) / count)
            if not math.isfinite(losses[-1]):
                raise CCMError(f"the loss is {losses[-1]} at step {len(losses)}; this variant is not stored")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            warm = min(1.0, len(losses) / WARMUP)
            optimizer.param_groups[0]["lr"] = LR * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(row.tokens for row in batch)
            seconds = time.monotonic() - started
            progress = min(1.0, budget.progress(tokens, seconds))
            speed = f"loss {losses[-1]:.3f}, {tokens / seconds:.0f} tokens/s"
            bar.update(task, completed=progress, description=speed)
    tenth = max(1, len(losses) // 10)
    means = [sum(part) / len(part) for k in range(0, len(losses), tenth) if (part := losses[k : k + tenth])]
    return {
        "steps": len(losses),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in parameters),
        "loss": [round(mean, 4) for mean in means],
    }


def run(variant: Variant, budget: Budget, held_out: Sequence[ConversationRow], device: str) -> dict[str, Any]:
    """Train a variant with the frozen model in bfloat16, score it with the model in float32."""
    compressor, tokenizer = variant.compressor(torch.bfloat16, device)
    train_split = load_chitchat("train", cap_per_user=64)
    conversations = [talk for talk in train_split if len(talk.turns) >= TURNS]
    stream = RowStream(conversations[: variant.conversations], tokenizer, (TURNS,), ROWS)
    record = train(compressor, stream, variant.objective, budget)
    exact, _ = variant.compressor(torch.float32, device)
    with torch.no_grad():
        for to, trained in zip(exact.trainable_parameters(), compressor.trainable_parameters(), strict=True):
            to.copy_(trained)
    return {**record, "nll": per_row(parallel_nll(exact, held_out, FIRST))}


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
    for run in runs.values():
        run["perplexity"] = round(math.exp(sum(run["nll"]) / sum(references["tokens"])), 2)
        run["recovered_share"], *run["share_ci"] = share_interval(references, run["nll"])
        if BASELINE in runs:
            run["difference"], *run["difference_ci"] = share_interval(
                references, run["nll"], runs[BASELINE]["nll"]
            )


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
        f"{name} {other[name]}, not {value}" for name, value in schedule.items() if other[name] != value
    ]:
        raise ConfigError(
            f"{path.name} holds runs with {'; '.join(changed)}: repeat these settings, or move it away"
        )
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps({**result, "environment": environment()}, indent=1) + "\n").encode())


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--list", action="store_true", help="show the variants and end")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these variants")
    budget = arguments.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens", type=int, default=TOKENS, help="student tokens to train each (%(default)s)"
    )
    budget.add_argument("--minutes", type=float, help="minutes to train each, in place of equal tokens")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    given = arguments.parse_args()
    if given.list:
        print("\n".join(f"{name:16}{variant.what}" for name, variant in VARIANTS.items()))
        return
    if any(x is not None and x <= 0 for x in (given.tokens, given.minutes, given.limit)):
        arguments.error("--tokens, --minutes and --limit must be above zero")
    torch.set_num_threads(given.threads)
    try:
        run_all(given.only or list(VARIANTS), Budget(given.tokens, given.minutes), given.limit, given.device)
    except CCMError as error:
        arguments.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the variants that had ended are stored", file=sys.stderr)
        sys.exit(130)


def run_all(names: Sequence[str], budget: Budget, limit: int | None, device: str) -> None:
    """Run the named variants that are not stored yet, and store each as it ends."""
    if unknown := set(names) - set(VARIANTS):
        raise UnknownNameError("variant", min(unknown), list(VARIANTS))
    path = RESULTS / "ablations.json"
    untrained, tokenizer = VARIANTS[BASELINE].compressor(torch.float32, device)
    validation = load_chitchat("validation", cap_per_user=None)
    held_out = held_out_rows(validation, tokenizer, TURNS, per_conversation=2)[: limit or HELD_OUT]
    schedule = {
        "budget": f"{budget.minutes} minutes" if budget.minutes else f"{budget.tokens} tokens",
        "lr": LR,
        "rows_per_step": ROWS,
        "turns": TURNS,
        "held_out_rows": len(held_out),
    }
    result = read_stored(path, schedule)
    if result is None:
        none, full = (reference_nll(untrained, held_out, context, FIRST) for context in ("none", "full"))
        result = {
            "task": "chitchat, validation users, rows of 10 turns, targets from turn 5 on",
            "precision": "trained on the model in bfloat16, scored on the model in float32",
            "schedule": schedule,
            "references": {"tokens": none.tokens, "none": per_row(none), "full": per_row(full)},
            "variants": {},
        }
    for name in names:
        if name in result["variants"]:
            print(f"{name}: stored already, skipped", flush=True)
            continue
        variant = VARIANTS[name]
        print(f"{name}: {variant.what}", flush=True)
        result["variants"][name] = {"what": variant.what, **run(variant, budget, held_out, device)}
        summarize(result)
        write(path, result)
    for name, scored in result["variants"].items():
        cells = [f"share {scored['recovered_share']:.3f} {scored['share_ci']}"]
        if "difference" in scored and name != BASELINE:
            cells.append(f"difference {scored['difference']:+.3f} {scored['difference_ci']}")
        print(f"{name:16}{'  '.join(cells)}")


if __name__ == "__main__":
    main()
