"""The training loop: one parallel pass per batch of rows, the base model as its own teacher.

A run lives in a folder: ``checkpoint.pt`` (everything to go on after a kill), ``log.jsonl`` (one line per
report), ``adapter/`` (the best adapter by held-out recovered share).
"""

from __future__ import annotations

import io
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compressor import Compressor
from ..data import chitchat
from ..data.rows import ConversationRow, RowStream, held_out_rows
from ..errors import CCMError, ConfigError
from ..evaluation.share import parallel_nll, recovered_share, reference_nll
from ..storage.adapter_folder import CHANGEABLE
from ..storage.atomic import write_atomically
from .config import TrainConfig
from .objectives import OBJECTIVES, Objective, summed_loss

log = logging.getLogger(__name__)


class _Targets:
    """Tokens to be predicted: their place in the student's pass and in the teacher's, (row, column) each."""

    def __init__(self) -> None:
        self.where: list[tuple[int, int]] = []
        self.taught: list[tuple[int, int]] = []
        self.ids: list[int] = []

    def add(self, row: int, column: int, taught: int, token: int) -> None:
        self.where.append((row, column))
        self.taught.append((row, taught))
        self.ids.append(token)

    def loss(self, student: Tensor, teacher: Tensor, head: Any, objective: Objective) -> Tensor:
        at, from_ = torch.tensor(self.where).T, torch.tensor(self.taught).T
        targets = torch.tensor(self.ids, device=student.device)
        return summed_loss(student[at[0], at[1]], teacher[from_[0], from_[1]], targets, head, objective)


class Trainer:
    """Trains one compressor; resumes from its folder.

    Args:
        model, tokenizer: the base model; it is frozen, and cast to bfloat16 if the configuration says so.
        config: the run.
        folder: where checkpoints, log and adapter go.

    Raises:
        ConfigError: the folder holds a run with another configuration.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: TrainConfig, folder: str | Path):
        self.config, self.folder = config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        model.requires_grad_(False)
        if config.bf16:
            model.to(torch.bfloat16)
        if config.init_from:
            changes = {name: getattr(config.compressor, name) for name in CHANGEABLE}
            self.compressor = Compressor.from_pretrained(model, config.init_from, **changes)
        else:
            self.compressor = Compressor(model, config.compressor)
        self.parameters = self.compressor.trainable_parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )
        self.objective = OBJECTIVES[config.objective]
        train = chitchat.load_chitchat("train", cap_per_user=config.cap_per_user)
        self.rows = RowStream(
            train, tokenizer, config.turns, config.rows, config.facts, config.echoes, config.seed
        )
        self.held_out = held_out_rows(chitchat.load_chitchat("validation"), tokenizer, config.turns[0])[
            : config.eval_rows
        ]
        self.step, self.tokens, self.seconds, self.best = 0, 0, 0.0, -math.inf
        self.recall = 0.0
        self._references: tuple[float, float] | None = None
        self._resume()

    # ------------------------------------------------------------------ one step

    def losses(self, batch: Sequence[ConversationRow], draw: random.Random) -> tuple[Tensor, int]:
        """Summed loss over the supervised tokens of a batch, and their number."""
        config, compressor = self.config, self.compressor
        sizes: dict[str, int] = {}
        if config.slot_choices:
            sizes["slots"] = draw.choice(config.slot_choices)
        if config.window_choices and (window := draw.choice(config.window_choices)):
            sizes.update(window=window, sink=config.sink_with_window)
        layout = compressor.lay_out([r.segments for r in batch], **sizes)
        student = compressor.hidden(layout)
        with torch.no_grad():
            plain = compressor.lay_out([[sum(r.segments, ())] for r in batch])
            teacher = compressor.hidden(plain) if config.objective == "distill" else student
        text, recall = _Targets(), _Targets()
        for r, row in enumerate(batch):
            offset = 0
            known_by_memory = {(i, t) for i, start, stop in row.recall for t in range(start, stop)}
            for i, (ids, (start, stop)) in enumerate(zip(row.segments, row.content, strict=True)):
                column = layout.spans[r][i][0]
                for t in range(start, stop) if i else ():
                    kind = recall if (i, t) in known_by_memory else text
                    kind.add(r, column + t - 1, offset + t - 1, ids[t])
                offset += len(ids)
        if config.objective != "distill":
            text.taught = text.where
        loss = text.loss(student, teacher, compressor.head, self.objective)
        if recall.ids:
            recall.taught = recall.where
            extra = recall.loss(student, student, compressor.head, OBJECTIVES["ce"])
            self.recall = 0.95 * self.recall + 0.05 * float(extra.detach()) / len(recall.ids)
            loss = loss + config.recall_weight * extra
        return loss, len(text.ids) + len(recall.ids)

    def train_step(self, batches: Iterator[list[ConversationRow]]) -> float:
        """One optimizer step; the mean loss per supervised token."""
        started = time.monotonic()
        total, count = 0.0, 0
        for k in range(self.config.accumulate):
            batch = next(batches)
            draw = random.Random(f"{self.config.seed}-{self.step}-{k}")
            loss, tokens = self.losses(batch, draw)
            loss.backward()
            total, count = total + float(loss.detach()), count + tokens
            self.tokens += sum(r.tokens for r in batch)
        if not math.isfinite(total):
            raise CCMError(
                f"the loss is {total} at step {self.step}; the last checkpoint is intact: "
                "go on from it in another folder with a lower learning rate"
            )
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.monotonic() - started
        return total / count

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock, whichever is further."""
        by_clock = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.step / self.config.steps, by_clock))

    def _schedule(self) -> float:
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    # ------------------------------------------------------------------ the run

    def run(self, on_report: Any = None) -> dict[str, Any]:
        """Train to the end; checkpoints on the way and on Ctrl-C. Returns the last report."""
        batches = iter(self.rows)
        report: dict[str, Any] = {}
        try:
            while self.progress < 1.0:
                loss = self.train_step(batches)
                report = {
                    "step": self.step,
                    "loss": round(loss, 4),
                    "recall": round(self.recall, 4),
                    "tokens": self.tokens,
                    "seconds": round(self.seconds, 1),
                    "tokens_per_second": round(self.tokens / self.seconds, 1),
                }
                if self.step % self.config.eval_every == 0 or self.progress >= 1.0:
                    report |= self.evaluate()
                    if report["recovered_share"] > self.best:
                        self.best = report["recovered_share"]
                        self.export(report)
                if self.step % self.config.save_every == 0 or self.progress >= 1.0:
                    self.save()
                with (self.folder / "log.jsonl").open("a") as file:
                    file.write(json.dumps(report) + "\n")
                if on_report:
                    on_report(report)
        except KeyboardInterrupt:
            self.save()
            raise
        return report

    def export(self, report: dict[str, Any]) -> None:
        """Write the adapter with the record of how it was made."""
        folder = self.folder / "adapter"
        self.compressor.save_pretrained(folder)
        record = {
            "report": report,
            "data": {
                "name": f"{chitchat.PACKAGE} {chitchat.VERSION}",
                "train_conversations": len(self.rows.rendered),
                "validation_rows": len(self.held_out),
            },
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        write_atomically(folder / "training.json", (json.dumps(record, indent=2) + "\n").encode())

    def evaluate(self) -> dict[str, Any]:
        """Held-out perplexity and recovered share, later turns only (from the fifth on in rows of ten)."""
        first = min(4, self.config.turns[0] // 2)
        if self._references is None:
            none, full = (
                reference_nll(self.compressor, self.held_out, c, first).mean for c in ("none", "full")
            )
            self._references = none, full
        none, full = self._references

        def score(**sizes: int) -> tuple[float, float]:
            nll = parallel_nll(self.compressor, self.held_out, first, **sizes).mean
            return round(math.exp(nll), 3), round(recovered_share(none, full, nll), 4)

        perplexity, share = score()
        report = {"perplexity": perplexity, "recovered_share": share}
        for k in self.config.slot_choices:
            report[f"recovered_share_{k}_slots"] = score(slots=k)[1]
        if window := max(self.config.window_choices, default=0):
            sizes = {"window": window, "sink": self.config.sink_with_window}
            report[f"recovered_share_window_{window}"] = score(**sizes)[1]
        return report

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the whole state, atomically."""
        state = {
            "config": json.dumps(asdict(self.config), sort_keys=True),
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.step, self.tokens, self.seconds, self.best, self.rows.served],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["config"] != json.dumps(asdict(self.config), sort_keys=True):
            raise ConfigError(
                f"{self.folder} holds a run with another configuration; give another folder, or delete {path.name}"
            )
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.seconds, self.best, self.rows.served = state["counters"]
        log.info("resumed at step %d", self.step)
