"""What a run will take, from a few real steps of it: tokens, hours, memory and disk.

The steps are those of the trainer, on rows of the run's own data, at two sizes at least: a single short row, and as
much of a batch as time and memory allow. A line through them gives the rest.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from ..data.mixture import POOL
from ..errors import ConfigError
from ..models.load import load_config
from ..models.options import Loading
from ..planning.plan import Figure, Plan
from ..planning.sizes import Shape
from .config import TrainConfig
from .engines import Lean
from .held_out import HeldOut
from .intervals import up
from .stages import BaseStage, MemoryStage
from .starter import Machine
from .trainer import Trainer, _memory_errors

#: Seconds that the measured steps may take together.
BUDGET = 30.0
#: A pass has at most so many times the tokens of the one before.
GROWTH = 8
#: Tokens from nothing, on the embedded model, and what an adapter can do after them (docs/experiments.md).
REACHED = (
    (300_000, "nine tenths of small talk's context"),
    (2_700_000, "as the shipped adapters, several kinds of text"),
)

Clock = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """A step of one pass.

    Attributes:
        tokens: of the pass, with what it is filled up with.
        seconds: it took.
        peak: most bytes in use meanwhile.
    """

    tokens: int
    seconds: float
    peak: int


@dataclass(frozen=True)
class Line:
    """Through points by least squares; it does not fall, and is not below zero at zero."""

    base: float
    slope: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """The line of least squares, with no slope below 0 and no base below 0."""
        x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
        spread = sum((a - x) ** 2 for a, _ in points)
        slope = sum((a - x) * (b - y) for a, b in points) / spread if spread else y / x
        slope = min(max(slope, 0.0), y / x)
        return cls(y - slope * x, slope)

    def at(self, x: float) -> float:
        """Its value at ``x``."""
        return self.base + self.slope * x


@dataclass(frozen=True)
class Measured:
    """What :func:`foresee` goes by.

    Attributes:
        samples: passes, the smallest first.
        batches: tokens of batches as they come, and of the passes that they make.
        drawing: seconds of drawing a batch, where no other process does it.
        start: seconds until the first step.
        evaluation: seconds of one.
        parameters: that are trained.
        held: bytes that this process has of the machine's memory.
    """

    samples: tuple[Sample, ...]
    batches: tuple[tuple[int, int], ...]
    drawing: float
    start: float
    evaluation: float
    parameters: int
    held: int


class Peak:
    """Most bytes in use inside of the block: of a GPU, else of this process."""

    def __init__(self, device: torch.device):
        self.device, self.nbytes = device, 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._done.set()
        self._watch.join()

    def _poll(self) -> None:
        process = psutil.Process()
        while True:
            self.nbytes = max(self.nbytes, process.memory_info().rss)
            if self._done.wait(0.01):
                return


def check_weights(loading: Loading, dtype: str | None) -> None:
    """Before they are loaded: whether the weights alone fit.

    Args:
        loading: the model, and where it goes.
        dtype: of its weights; None is the checkpoint's.

    Raises:
        ConfigError: they do not, or there is no such model.
        UnsupportedModelError: the model cannot carry a memory.
    """
    machine = Machine.here(loading.check().device)
    config = load_config(loading.model)
    config.dtype = getattr(torch, dtype) if dtype else config.dtype
    needed = Shape.of(config, loading.load_in).weight_bytes
    if needed > machine.memory and not loading.device_map:
        raise ConfigError(
            f"too little memory: the weights take {needed / 1e9:.3g} GB and {machine.memory / 1e9:.3g} GB are "
            f"free on {machine.name}; take --load-in 4bit, or a smaller model"
        )


def estimate(
    model: Any,
    tokenizer: Any,
    config: TrainConfig,
    folder: Path,
    device: torch.device | None = None,
    started: float | None = None,
    clock: Clock = time.monotonic,
) -> Plan:
    """Measure a few steps, and foresee the run from them. The model is changed by them, and of no more use.

    Args:
        model, tokenizer, config, device: as for :class:`~ccm.training.trainer.Trainer`.
        folder: where the run would be; nothing is written there.
        started: when loading began, by the clock.
        clock: seconds.

    Raises:
        ConfigError: there is too little memory or disk for the run; says which setting would fit.
        CCMError: as :class:`~ccm.training.trainer.Trainer`.
    """
    began = clock() if started is None else started
    alone = replace(config, accumulate=1, data_workers=0, tensorboard=False)
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(model, tokenizer, alone, place, device=device)
        try:
            ready = clock()
            batches = list(islice(iter(trainer.rows), POOL))
            drawn = clock()
            with _memory_errors(lambda: "the first steps, at a fraction of tokens_per_batch"):
                samples = tuple(measure(trainer, batches, clock))
                evaluation = evaluate(trainer, clock)
        finally:
            trainer.close()
    where = trainer.processes.device
    measured = Measured(
        samples,
        tuple((tokens(batch), size(trainer, batch)) for batch in batches),
        0.0 if config.data_workers else (drawn - ready) / POOL,
        drawn - began,
        evaluation,
        sum(parameter.numel() for parameter in trainer.parameters),
        held(where),
    )
    return foresee(config, measured, Machine.here(where), folder)


def tokens(rows: Sequence[Any]) -> int:
    """Of all rows together."""
    return sum(row.tokens for row in rows)


def size(trainer: Trainer, rows: Sequence[Any], full: bool = True) -> int:
    """Tokens of the pass that a batch makes: accelerators have one size for all, padding fills up to the longest row.

    Args:
        trainer: whose engine runs it.
        rows: the batch.
        full: whether an accelerator's size is that of the run, or as small as the batch.
    """
    engine = _lean(trainer)
    if engine is None:
        return len(rows) * max((row.tokens for row in rows), default=0)
    return up(max(tokens(rows), trainer.config.tokens_per_batch * full)) if engine.width else tokens(rows)


def _lean(trainer: Trainer) -> Lean | None:
    engine = trainer.stage.engine if isinstance(trainer.stage, MemoryStage) else None
    return engine if isinstance(engine, Lean) else None


def held(device: torch.device) -> int:
    """Bytes of the machine's memory that this process has."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def measure(
    trainer: Trainer, batches: Sequence[Sequence[Any]], clock: Clock = time.monotonic
) -> Iterator[Sample]:
    """Steps of one pass: of the shortest row, of larger and larger parts of a batch, then whole ones.

    It ends when :data:`BUDGET` is spent, but not before the second size. Nothing is tried that would not fit, by the
    line through what the smaller ones took. The first step of a size has more to do, so it is made twice.
    """
    device = trainer.processes.device
    end = clock() + BUDGET

    def step(rows: Sequence[Any], full: bool) -> Sample:
        count = size(trainer, rows, full)
        if (engine := _lean(trainer)) and engine.width:
            engine.width = count
        trainer._ahead = None  # rows that were taken for a step of the run
        with Peak(device) as peak:
            start = clock()
            trainer.train_step(iter([rows]))
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds = clock() - start
        if trainer.parts > 1:
            raise ConfigError(
                f"too little memory: it ran out in a pass of {count:,} tokens on {device}; lower tokens_per_batch "
                f"({trainer.config.tokens_per_batch:,}), or set gradient_checkpointing=true"
            )
        return Sample(count, seconds, peak.nbytes)

    def twice(rows: Sequence[Any], full: bool) -> Sample:
        first = step(rows, full)
        if clock() + first.seconds > end and first.tokens > least:
            return first
        second = step(rows, full)
        return replace(second, peak=max(first.peak, second.peak))

    def affordable() -> float:
        """Tokens of the next pass, by time and memory."""
        last = done[-1]
        seconds = max(end - clock(), 3 * last.seconds if len(done) == 1 else 0.0)
        most = min(seconds / last.seconds, GROWTH) * last.tokens
        if len(done) == 1:
            return most
        line = Line.through([(sample.tokens, sample.peak) for sample in done])
        room = Machine.here(device).memory + held(device) - line.base
        return min(most, room / line.slope) if line.slope else most

    shortest = [min((row for batch in batches for row in batch), key=lambda row: row.tokens)]
    least = size(trainer, shortest, full=False)
    done = [twice(shortest, full=False)]
    while True:
        most = affordable()
        rows = max((_first(trainer, batch, most) for batch in batches), key=tokens)
        if size(trainer, rows, full=False) <= done[-1].tokens:
            break
        done.append(twice(rows, full=False))
    yield from done
    for batch in batches:
        if size(trainer, batch) <= affordable():
            yield step(batch, full=True)


def _first(trainer: Trainer, batch: Sequence[Any], most: float) -> Sequence[Any]:
    """The first rows of a batch, as many as make a pass of at most so many tokens."""
    count = 0
    while count < len(batch) and size(trainer, batch[: count + 1], full=False) <= most:
        count += 1
    return batch[:count]


def evaluate(trainer: Trainer, clock: Clock = time.monotonic) -> float:
    """Seconds of an evaluation, from one of a few held-out rows."""
    stage = trainer.stage
    rows = stage.held_out.rows if isinstance(stage, MemoryStage) else cast(BaseStage, stage).held_out
    by_length = sorted(
        ((name, row) for name, part in rows.items() for row in part), key=lambda pair: pair[1].tokens
    )
    there = trainer.processes.device.type != "cpu"
    chosen = by_length[:: -(-len(by_length) // 32)] if there else by_length[:1]
    few = {name: [row for source, row in chosen if source == name] for name, _ in chosen}
    start = clock()
    if isinstance(stage, MemoryStage):
        HeldOut(few, trainer.config).evaluate(stage.engine)
    else:
        cast(BaseStage, stage).held_out = few
        stage.evaluate()
    return (clock() - start) * tokens([row for _, row in by_length]) / tokens([row for _, row in chosen])


def foresee(config: TrainConfig, measured: Measured, machine: Machine, folder: Path) -> Plan:
    """A run from what was measured.

    Raises:
        ConfigError: there is too little memory or disk for it.
    """
    samples, count = measured.samples, len(measured.batches)
    line = Line.through([(sample.tokens, sample.seconds) for sample in samples])
    step_tokens = config.accumulate * sum(had for had, _ in measured.batches) / count
    step = config.accumulate * (sum(line.at(size) for size, _ in measured.batches) / count + measured.drawing)
    training = min(60 * config.minutes or math.inf, config.steps * step)
    steps = max(1, round(training / step))
    seen, speed = steps * step_tokens, step_tokens / step
    evaluations = -(-steps // config.eval_every)
    memory = Line.through([(sample.tokens, sample.peak) for sample in samples])
    largest = max(taken for _, taken in measured.batches)
    peak, room = memory.at(largest), machine.memory + measured.held
    if peak > room:
        fits = int((room - memory.base) / memory.slope) // 64 * 64 if room > memory.base else 0
        do = f"set tokens_per_batch={fits} or gradient_checkpointing=true"
        raise ConfigError(
            f"too little memory: passes of {largest:,} tokens would take {peak / 1e9:.3g} GB and "
            f"{room / 1e9:.3g} GB are free on {machine.name}; "
            + (do if fits > samples[0].tokens else "set gradient_checkpointing=true, or take --load-in 4bit")
        )
    # parameters and two moments, written beside the last one; the adapter likewise
    disk = 4 * measured.parameters * 2 * (3 + 1)
    free = shutil.disk_usage(
        next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    ).free
    if disk > free:
        raise ConfigError(
            f"too little disk: the run takes {disk / 1e9:.3g} GB and {free / 1e9:.3g} GB are free for {folder}; "
            "give another folder with --out"
        )
    how = f"{len(samples)} steps of {samples[0].tokens:,} to {max(s.tokens for s in samples):,} tokens"
    clock = "by the clock" if config.minutes and training < config.steps * step else "by its steps"
    hours = measured.start + training + evaluations * measured.evaluation
    sections = {
        "What it learns from": [
            Figure("tokens", "tokens that the run sees", seen, "tokens", "calculated", f"ends {clock}"),
            Figure(
                "steps", "steps", steps, "", "calculated", f"of {step_tokens:,.0f} tokens, {step:.3g} s each"
            ),
            *(
                Figure(
                    f"hours_for_{known // 1000}k",
                    f"{known:,} tokens",
                    known / speed / 3600,
                    "h",
                    "calculated",
                    f"from nothing, on the embedded model: {what}",
                )
                for known, what in REACHED
            ),
        ],
        "Time": [
            Figure("speed", "tokens a second", speed, "1/s", "measured", f"{how} on {machine.name}"),
            Figure("start", "until the first step", measured.start / 3600, "h", "measured", ""),
            Figure("training", "training", training / 3600, "h", "calculated", clock),
            Figure(
                "evaluation",
                "evaluations",
                evaluations * measured.evaluation / 3600,
                "h",
                "calculated",
                f"{evaluations}, from one of a few rows",
            ),
            Figure("hours", "all together", hours / 3600, "h", "calculated"),
        ],
        "Memory": [
            Figure(
                "peak",
                "at most",
                peak,
                "bytes",
                "calculated",
                f"for {largest:,} tokens; {samples[0].peak / 1e9:.3g} GB at {samples[0].tokens:,} "
                f"and {max(s.peak for s in samples) / 1e9:.3g} GB at {max(s.tokens for s in samples):,} measured",
            ),
            Figure("free", "free", room, "bytes", "measured", machine.name),
        ],
        "Disk": [
            Figure(
                "disk",
                "checkpoints and adapter",
                disk,
                "bytes",
                "calculated",
                f"{measured.parameters:,} trained",
            ),
            Figure("free_disk", "free", free, "bytes", "measured"),
        ],
    }
    return Plan(
        config.model or "the embedded model",
        f"{config.minutes:g} minutes" if config.minutes else f"{config.steps} steps",
        sections,
    )
