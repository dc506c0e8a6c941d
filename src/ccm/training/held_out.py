"""How good an adapter is on rows that it never saw, at every budget that it was trained for.

The recovered share is over the scored tokens of the later half of each row (from the fifth segment on in long ones).
With several sources its three NLL are means weighted like the mixture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.rule import get_rule
from ..evaluation.share import recovered_share
from .config import TrainConfig
from .engines import Engine
from .objectives import cross_entropy, summed_loss
from .packed import ArrayRow
from .targets import Row, find_targets

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Tokens of a pass, on a processor and on an accelerator.
BATCH, BATCH_THERE = 2048, 32768
#: Rows -> last hidden states (B, Q, d) and the columns of every segment.
Run = Callable[[Sequence[Row]], tuple[Tensor, Sequence[Sequence[tuple[int, int]]]]]


@torch.no_grad()
def mean_nll(rows: Sequence[Row], run: Run, head: Any, device: torch.device) -> float:
    """Negative log-likelihood, nats per scored token, of a model on a device."""
    total, count = 0.0, 0
    for part in batches(rows, lambda row: row.tokens, device):
        hidden, spans = run(part)
        for targets in find_targets(part, spans).values():
            if len(targets):
                total += float(targets.loss(hidden, None, head, cross_entropy))
                count += len(targets)
    return total / count


@torch.no_grad()
def nll(engine: Engine, rows: Sequence[ArrayRow], rule: str | None = None, **sizes: Any) -> float:
    """The same of a memory: nats per scored token of rows, by what an engine makes of them."""
    total, count = 0.0, 0
    how = None if rule is None else get_rule(rule)
    for part in batches(rows, lambda row: row.tokens, engine.compressor.model.device):
        found = engine.run(engine.prepare(part, how, **sizes))
        if len(found.roles):
            head = engine.compressor.head
            total += float(summed_loss(found.student, found.student, found.ids, head, cross_entropy))
            count += len(found.roles)
    return total / count


def batches(rows: Sequence[T], length: Callable[[T], int], device: torch.device) -> list[list[T]]:
    """Rows in their order, as many together as a pass takes."""
    most = BATCH if device.type == "cpu" else BATCH_THERE
    parts: list[list[T]] = []
    filled = most
    for row in rows:
        if filled + length(row) > most:
            parts.append([])
            filled = 0
        parts[-1].append(row)
        filled += length(row)
    return parts


class HeldOut:
    """Held-out rows by source, and what the base model makes of them.

    Args:
        rows: source -> rows, with their later segments scored.
        config: the run, for its mixture and its budgets.
    """

    def __init__(self, rows: dict[str, list[Row]], config: TrainConfig):
        self.rows = rows
        self.weights = config.weights
        self.budgets: dict[str, dict[str, Any]] = {"recovered_share": {}}
        self.budgets |= {f"recovered_share_rule_{rule}": {"rule": rule} for rule in config.rule_choices}
        self.budgets |= {f"recovered_share_{k}_slots": {"slots": k} for k in config.slot_choices}
        self.budgets |= {
            f"recovered_share_window_{window}": {"window": window, "sink": config.sink_with_window}
            for window in config.window_choices
            if window
        }
        self._references: dict[str, tuple[float, float]] = {}

    @property
    def figures(self) -> list[str]:
        """Names of what :meth:`evaluate` reports and a recipe can require."""
        by_source = [f"recovered_share_{name}" for name in self.rows] if len(self.rows) > 1 else []
        return [*self.budgets, *by_source]

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Perplexity and recovered shares."""
        rows = {name: [ArrayRow.from_row(row) for row in part] for name, part in self.rows.items()}
        if not self._references:
            self._references = {name: _reference(engine, part) for name, part in self.rows.items()}
            for name, (none, full) in self._references.items():
                if full >= none:
                    log.warning("%s: nothing to keep: full context is no better than none", name)
        report: dict[str, float] = {}
        for figure, sizes in self.budgets.items():
            found = {name: nll(engine, part, **sizes) for name, part in rows.items()}
            if not sizes:
                mean = sum(self.weights[name] * value for name, value in found.items())
                report["perplexity"] = round(math.exp(mean), 3)
                for name, value in found.items() if len(found) > 1 else ():
                    report[f"recovered_share_{name}"] = self._share({name: value})
            report[figure] = self._share(found)
        return report

    def _share(self, nll: dict[str, float]) -> float:
        none, full, own = (
            sum(self.weights[name] * value for name, value in part.items())
            for part in (
                {name: self._references[name][0] for name in nll},
                {name: self._references[name][1] for name in nll},
                nll,
            )
        )
        return round(recovered_share(none, full, own), 4)


def _reference(engine: Engine, rows: Sequence[Row]) -> tuple[float, float]:
    """NLL without context and with the whole of it."""
    alone = [row.part(i, i + 1) for row in rows for i in range(len(row.segments)) if any(row.roles[i])]
    none, full = (
        nll(engine, [ArrayRow.from_row(row) for row in part])
        for part in (alone, [row.flat() for row in rows])
    )
    return none, full
