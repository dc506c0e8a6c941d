"""The training loop: one parallel pass per batch of rows, the base model as its own teacher.

A run lives in a folder: ``checkpoint.pt`` (everything to go on after a kill), ``log.jsonl`` (one line per
step), ``adapter/`` (the best adapter by held-out figures), ``tensorboard/`` if asked for.

Draws are seeded by step and pass, so the state of a run holds no random generator.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CCMError, ConfigError
from ..files.atomic import write_atomically
from ..files.fingerprint import base_name, model_fingerprint
from ..models.load import bfloat16_units
from . import checkpoint
from .config import TrainConfig
from .distributed import Processes, compile_blocks, save_memory
from .packed import ArrayRow
from .rows import Drawn, PackedRows, held_out_rows, open_sources, training_rows, with_packed
from .signals import StopRequest, raise_for
from .stages import make_stage
from .targets import Row, marked

log = logging.getLogger(__name__)

OnReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Taken:
    """Batches of a step, taken and prepared.

    Attributes:
        step: that they are for.
        served: batches that the stream had given before.
        batches: rows of each pass.
        passes: what :meth:`Stage.prepare` made of them.
    """

    step: int
    served: int
    batches: list[list[Row | ArrayRow]]
    passes: list[Any]


class Trainer:
    """Trains one adapter; resumes from its folder. Every process of a run makes one.

    Args:
        model: the base model; it is frozen, and cast to bfloat16 if the configuration says so.
        tokenizer: of the model.
        config: the run.
        folder: where checkpoints, log and adapter go.
        extend: go on with a finished run for another ``steps`` or ``minutes``, with a learning rate that rises and
            falls once more.
        device: where this process trains; None takes an accelerator if there is one. A model that is spread or
            quantized stays where it is.

    Raises:
        ConfigError: the folder holds a run with another configuration.
        DataError: data cannot be read, or the packed file is not one for this model.
        MismatchError: the folder holds a run of another model.
        StorageError: the folder cannot be made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: TrainConfig,
        folder: str | Path,
        extend: bool = False,
        device: torch.device | None = None,
    ):
        config, packed = with_packed(config, tokenizer)
        #: The settings that a checkpoint holds: of a packed file what is in it, not where it lies.
        self.settings = replace(config, packed=packed.fingerprint) if packed else config
        self.config, self.folder, self.model = config, Path(folder), model
        self.processes = Processes(config, self.folder, device)
        model.requires_grad_(False)
        if config.bf16 and not getattr(model, "is_quantized", False):
            if model.device.type == "cpu" and bfloat16_units() == []:
                log.warning("this processor has no units for bfloat16: bf16=false may be many times as fast")
            model.to(torch.bfloat16)
        self.fingerprint = model_fingerprint(model)
        with _memory_errors(lambda: "loading; bf16=true halves the model, parallel=fsdp2 shares it out"):
            self.processes.place(model)
        with self.processes.main_first():  # one process downloads, the others find it done
            sources = packed or open_sources(config, tokenizer)
            held_out = held_out_rows(config, sources)
        self.stage = make_stage(model, config, held_out)
        if unknown := sorted(set(config.require) - set(self.stage.figures)):
            raise ConfigError(
                f"require.{unknown[0]}: no such figure; this run reports {', '.join(self.stage.figures)}"
            )
        self.parameters = self.stage.parameters
        self.processes.shard(model, self.parameters)
        if config.gradient_checkpointing:
            save_memory(model)
        if config.compile:
            compile_blocks(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
            fused=self.processes.device.type == "cuda" or None,
        )
        self.rows = training_rows(config, sources, self.processes.rank, self.processes.world)
        self.step, self.tokens, self.seconds, self.best, self.recall = 0, 0, 0.0, -math.inf, 0.0
        self._ahead: Taken | None = None  # for the next step
        self.parts = 1  # that each batch is split into, because memory ran out
        self.slice = (0, 0.0)  # step and seconds at which the schedule began
        self.saved = self.evaluated = 0  # steps of the last checkpoint and of the last evaluation
        self.report: dict[str, Any] = {}  # of the last step
        self._resume()
        if extend and self.progress >= 1.0:
            self.slice = (self.step, self.seconds)

    # ------------------------------------------------------------------ one step

    def train_step(self, batches: Iterator[Sequence[Drawn]]) -> float:
        """One optimizer step; the mean loss per supervised token over all passes and processes."""
        started = time.monotonic()
        config, processes = self.config, self.processes
        if self._ahead is not None and self._ahead.step == self.step:
            taken, self._ahead = self._ahead, None
        else:
            taken = self._take(batches)
        sums, count, known = self._gradients(taken)
        tokens = sum(row.tokens for batch in taken.batches for row in batch)
        processes.sum_gradients(self.parameters)
        (all_count,) = processes.sum([count])
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_div_(grads, max(1.0, all_count))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._looks_ahead:
            self._ahead = self._take(iter(self.rows), self.step + 1)  # while the device works
        loss, recall = sums.tolist()  # the one question to the device
        spent = time.monotonic() - started
        # the clock is shared as well, or processes would disagree on when to stop
        loss, recall, all_known, all_tokens, spent = processes.sum([loss, recall, known, tokens, spent])
        if not math.isfinite(loss):
            raise CCMError(
                f"the loss is {loss} at step {self.step}; the last checkpoint is intact: "
                "go on from it in another folder with a lower learning rate"
            )
        self.step += 1
        self.tokens += int(all_tokens)
        self.seconds += spent / processes.world
        if all_known:
            self.recall += (recall / all_known - self.recall) * (0.05 if self.recall else 1.0)
        return loss / max(1, all_count)

    @property
    def _looks_ahead(self) -> bool:
        """Whether the next step's rows are taken while the device is at this one's; taking them must not wait."""
        return self.processes.device.type != "cpu" and isinstance(self.rows, PackedRows)

    def _take(self, batches: Iterator[Sequence[Drawn]], step: int | None = None) -> Taken:
        """The next batches, and what of their passes the host does."""
        served = self.rows.served
        drawn = [next(batches) for _ in range(self.config.accumulate)]
        return self._prepared(
            [[row if isinstance(row, ArrayRow) else marked(row) for row in batch] for batch in drawn],
            self.step if step is None else step,
            served,
        )

    def _prepared(self, batches: list[list[Row | ArrayRow]], step: int, served: int) -> Taken:
        passes = []
        for k, batch in enumerate(batches):
            seed = f"{self.config.seed}-{step}-{k * self.processes.world + self.processes.rank}"
            size = math.ceil(len(batch) / self.parts)
            for rows in (batch[at : at + size] for at in range(0, len(batch), size)):
                passes.append(self.stage.prepare(rows, random.Random(seed)))
        return Taken(step, served, batches, passes)

    def _gradients(self, taken: Taken) -> tuple[Tensor, int, int]:
        """Add the gradients of a step's passes; returns sums of the loss over all and over recalled tokens, on the
        device, and the numbers of both.

        Where memory runs out the step begins anew in passes of half the rows, and later steps keep to them.
        """
        while True:
            try:
                return self._passes(taken.passes)
            except (RuntimeError, MemoryError) as error:
                single = max(map(len, taken.batches)) <= self.parts
                # layers that are sharded run in step with other processes, which would wait
                if single or self.processes.sharded or not _out_of_memory(error):
                    raise
            self.optimizer.zero_grad(set_to_none=True)  # some passes may have left theirs
            self.parts *= 2
            log.warning(
                "out of memory at step %d: batches run in %d parts from now on", self.step, self.parts
            )
            taken = self._prepared(taken.batches, taken.step, taken.served)
            if self.processes.device.type == "cuda":
                torch.cuda.empty_cache()

    def _passes(self, passes: Sequence[Any]) -> tuple[Tensor, int, int]:
        sums, count, known = torch.zeros(2, device=self.processes.device), 0, 0
        for prepared in passes:
            part = self.stage.run(prepared)
            part.loss.backward()
            sums += torch.stack([part.loss.detach().float(), part.recall.float()]).to(sums.device)
            count, known = count + part.tokens, known + part.recall_tokens
        return sums, count, known

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock, whichever is further."""
        step, seconds = self.step - self.slice[0], self.seconds - self.slice[1]
        by_clock = seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(step / self.config.steps, by_clock))

    def _schedule(self) -> float:
        warm = min(1.0, (self.step - self.slice[0] + 1) / self.config.warmup)
        return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    # ------------------------------------------------------------------ the run

    def run(self, on_report: OnReport | None = None) -> dict[str, Any]:
        """Train to the end. Returns the last report, an empty one if the run was finished already.

        Ctrl-C and SIGTERM finish the step at hand, save, and end the process with 130 or 143. A run that waits for
        rows saves at once. However a run ends, processes that draw rows end with it.

        Raises:
            CCMError: the loss is no number any more, or there is not enough memory.
            DataError: no more rows can be drawn.
            StorageError: no space; the last checkpoint is intact.
        """
        report: dict[str, Any] = {}
        self.processes.open_curves(self.step)
        with StopRequest() as stop, closing(self.rows), _memory_errors(self._to_lower):
            batches = iter(self.rows)
            if self.processes.world == 1:  # several stop together, between two steps
                batches = stop.idling(batches)
            while self.progress < 1.0 or self._to_be_evaluated:
                if not self._to_be_evaluated:  # else the run was stopped in the middle of its evaluation
                    self.report = self._report(self._next_step(batches, stop))
                report = self.report
                if due := self._to_be_evaluated:
                    self.save()  # evaluations may take minutes
                    report |= self.evaluate()
                    self._keep_the_best(report)
                    self.evaluated = self.step
                stopped = self.processes.most(stop.signal)
                if self.processes.main:
                    checkpoint.append_log(self.folder, report)
                    self.processes.curve(report)
                if due or stopped or self.step % self.config.save_every == 0:
                    self.save()
                if on_report:
                    on_report(report)
                if stopped:
                    raise_for(stopped)
        return report

    def _next_step(self, batches: Iterator[Sequence[Drawn]], stop: StopRequest) -> float:
        served = self.rows.served
        try:
            return self.train_step(batches)
        except (KeyboardInterrupt, SystemExit):
            if stop.idle:  # no part of the step has run
                self.rows.served = served
                self.save()
            raise

    def _to_lower(self) -> str:
        return (
            f"step {self.step} on {self.processes.device}; lower rows ({self.config.rows}) or tokens_per_batch "
            f"({self.config.tokens_per_batch}), or set gradient_checkpointing=true, with which a saved run goes on"
        )

    @property
    def _to_be_evaluated(self) -> bool:
        due = self.progress >= 1.0 or self.step % self.config.eval_every == 0
        return due and self.evaluated < self.step

    def _report(self, loss: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": round(loss, 4),
            "recall": round(self.recall, 4),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out rows. Every process makes all of them, so that none waits for another."""
        return self.stage.evaluate()

    def _keep_the_best(self, report: dict[str, Any]) -> None:
        if report[self.stage.best_by] > self.best:
            self.best = report[self.stage.best_by]
            if self.processes.main:
                self.export(report)

    @property
    def adapter(self) -> Path:
        """Folder of the best adapter so far."""
        return self.folder / "adapter"

    def export(self, report: dict[str, Any]) -> None:
        """Write the adapter with the record of how it was made."""
        self.stage.export(self.adapter)
        record = {
            "report": report,
            "base_model": base_name(self.model),
            "config": _without_paths(asdict(self.config)),
            "parameters": sum(p.numel() for p in self.parameters),
            "processes": self.processes.world,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        write_atomically(self.adapter / "training.json", (json.dumps(record, indent=2) + "\n").encode())

    def close(self) -> None:
        """Leave the process group and close TensorBoard's files."""
        self.processes.close()

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the whole state, atomically; only the first process does."""
        if self.processes.main:
            state = {
                "parameters": [p.detach().cpu() for p in self.parameters],
                "optimizer": self.optimizer.state_dict(),
                "counters": [self.step, self.tokens, self.seconds, self.best, self.recall, *self.slice],
                "evaluated": self.evaluated,
                "report": self.report,
                "served": self._ahead.served if self._ahead else self.rows.served,
            }
            checkpoint.save(self.folder, self.settings, self.fingerprint, state)
        self.saved = self.step

    def _resume(self) -> None:
        state = checkpoint.load(self.folder, self.settings, self.fingerprint)
        if state is not None:
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.data.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens, self.seconds, self.best, self.recall, *begun = state["counters"]
            self.slice = (begun[0], begun[1])
            self.evaluated = state.get("evaluated", self.step)  # older checkpoints came after the evaluation
            self.report = state.get("report", {})
            self.rows.served = state["served"]
            self.saved = self.step
            log.info("resumed at step %d", self.step)
        self.processes.wait()
        if self.processes.main:
            checkpoint.prepare(self.folder, self.step - self._to_be_evaluated)


@contextmanager
def _memory_errors(advice: Callable[[], str]) -> Iterator[None]:
    """What torch says of memory, in one line that ends with what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        words = str(error).partition("\n")[0]
        raise CCMError(f"out of memory at {advice()} ({words or type(error).__name__})") from error


def _out_of_memory(error: Exception) -> bool:
    words = str(error).partition("\n")[0]
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "out of memory" in words or "allocate memory" in words


def _without_paths(value: Any) -> Any:
    """Names in place of folders of this machine; the record is published with the adapter."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, str) and Path(value).exists():
        return Path(value).name
    return value
