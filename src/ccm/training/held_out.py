"""How good an adapter is on rows that it never saw, at every budget that it was trained for.

    recovered share = (NLL_none - NLL_memory) / (NLL_none - NLL_full)

over the scored tokens of the later half of each row (from the fifth segment on in long ones). With several sources
the three are means weighted like the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..compressor import Compressor
from ..rules import get_rule
from .config import TrainConfig
from .objectives import cross_entropy
from .targets import Row, find_targets

#: Rows -> last hidden states (B, Q, d) and the columns of every segment.
Run = Callable[[Sequence[Row]], tuple[Tensor, Sequence[Sequence[tuple[int, int]]]]]

#: Rows of a pass, on a processor and on an accelerator.
BATCH, BATCH_THERE = 4, 32


@torch.no_grad()
def mean_nll(rows: Sequence[Row], run: Run, head: Any, device: torch.device) -> float:
    """Negative log-likelihood, nats per scored token, of a model on a device."""
    total, count = 0.0, 0
    batch = BATCH if device.type == "cpu" else BATCH_THERE
    for k in range(0, len(rows), batch):
        part = rows[k : k + batch]
        hidden, spans = run(part)
        for targets in find_targets(part, spans).values():
            if len(targets):
                total += float(targets.loss(hidden, None, head, cross_entropy))
                count += len(targets)
    return total / count


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

    def evaluate(self, compressor: Compressor) -> dict[str, float]:
        """Perplexity and recovered shares."""
        if not self._references:
            self._references = {name: self._reference(compressor, name) for name in self.rows}
        report: dict[str, float] = {}
        for figure, sizes in self.budgets.items():
            run = _runner(compressor, **sizes)
            head, device = compressor.head, compressor.model.device
            nll = {name: mean_nll(rows, run, head, device) for name, rows in self.rows.items()}
            if not sizes:
                mean = sum(self.weights[name] * value for name, value in nll.items())
                report["perplexity"] = round(math.exp(mean), 3)
                for name, value in nll.items() if len(nll) > 1 else ():
                    report[f"recovered_share_{name}"] = self._share({name: value})
            report[figure] = self._share(nll)
        return report

    def _reference(self, compressor: Compressor, name: str) -> tuple[float, float]:
        """NLL without context and with the whole of it."""
        run, rows = _runner(compressor), self.rows[name]
        alone = [row.part(i, i + 1) for row in rows for i in range(len(row.segments)) if any(row.roles[i])]
        none, full = (
            mean_nll(part, run, compressor.head, compressor.model.device)
            for part in (alone, [row.flat() for row in rows])
        )
        return none, full

    def _share(self, nll: dict[str, float]) -> float:
        none, full, own = (
            sum(self.weights[name] * value for name, value in part.items())
            for part in (
                {name: self._references[name][0] for name in nll},
                {name: self._references[name][1] for name in nll},
                nll,
            )
        )
        return round((none - own) / (none - full), 4)


@contextmanager
def under_rule(compressor: Compressor, rule: str | None) -> Iterator[None]:
    """Passes go by another rule for a while; None is the compressor's own."""
    own = compressor.rule
    if rule is not None:
        compressor.rule = get_rule(rule)
    try:
        yield
    finally:
        compressor.rule = own


def _runner(compressor: Compressor, rule: str | None = None, **sizes: int) -> Run:
    def run(rows: Sequence[Row]) -> tuple[Tensor, Sequence[Sequence[tuple[int, int]]]]:
        with under_rule(compressor, rule):
            layout = compressor.lay_out([row.segments for row in rows], **sizes)
            return compressor.hidden(layout), layout.spans

    return run
