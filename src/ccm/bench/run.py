"""One run of all contenders, each in a process of its own, in turns: what disturbs one disturbs all."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from .. import __version__
from ..errors import CCMError
from .sizes import NAMES, PREFILL

log = logging.getLogger(__name__)

#: What a quick run measures, and a whole one.
HISTORIES = {True: (250, 1_000), False: (250, 1_000, 4_000, 16_000, 100_000)}
CROWDS = {True: (1, 4), False: (1, 4, 16, 32)}
REPEATS = {True: 2, False: 3}
#: History at which folds, restores and many at once are measured: the memory is full by then.
AMONG = {True: 1_000, False: 4_000}
#: Contenders that need llama-cpp-python.
_IN_LLAMA = ("ccm in llama.cpp", "llama.cpp")


class BenchError(CCMError):
    """A contender failed."""


@dataclass
class Worker:
    """One contender's process."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    about: dict[str, Any]

    def do(self, what: str, **arguments: int) -> dict[str, Any]:
        """One command.

        Raises:
            BenchError: the process has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next answer of the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = self.log.read().strip().splitlines()
            raise BenchError(f"{self.name} ended: {last[-1] if last else 'it does not say why'}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def working(name: str, model: str | None, llama: str, threads: int) -> Iterator[Worker]:
    """A contender until the end of the block."""
    settings = json.dumps({"name": name, "model": model, "llama": llama, "threads": threads})
    command = [sys.executable, "-m", "ccm.bench.worker", settings]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            worker = Worker(name, process, errors, {})
            worker.about = worker.hear()
            yield worker
        finally:
            process.kill()
            process.wait()


def bench(
    model: str | None = None,
    llama: str = "default",
    threads: int = 1,
    quick: bool = False,
    only: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        model: folder, GGUF file or hub id; None is the embedded one.
        llama: GGUF file of the same model; "default" is that of the embedded one.
        threads: of the CPU, for every contender.
        quick: fewer and shorter.
        only: names of contenders; none: all of :data:`NAMES` that can run here.
        tell: hears what is being done.

    Returns:
        what ``results/bench.json`` holds (docs/performance.md).

    Raises:
        BenchError: a contender failed.
    """
    names = [name for name in only or NAMES if _can_run(name)]
    began = os.getloadavg()[0]
    with ExitStack() as stack:
        workers = []
        for name in names:
            tell(f"{name}: loading")
            workers.append(stack.enter_context(working(name, model, llama, threads)))
        found = []
        rows = {worker.name: {**worker.about, "turns": {}, "many": {}} for worker in workers}
        for tokens in HISTORIES[quick]:
            found.append(workers[0].do("limits"))  # again and again: they move with the load as well
            able = [worker for worker in workers if worker.about["reach"] >= tokens]
            _turns(able, tokens, REPEATS[quick], rows, tell)
            if tokens == AMONG[quick]:
                _alone(able, REPEATS[quick], rows, tell)
                _many(able, CROWDS[quick], REPEATS[quick], rows, tell)
        for worker in workers:
            rows[worker.name].update(worker.do("peak"))
    limits = {name: statistics.median(each[name] for each in found) for name in found[0]}
    loads = [round(began, 2), round(os.getloadavg()[0], 2)]
    return {
        "task": "a turn of 24 tokens in and 32 out, and what it is made of",
        "model": model or "embedded",
        "quick": quick,
        "repeats": REPEATS[quick],
        "limits": {name: round(value) for name, value in limits.items()},
        "rows": {name: _with_shares(row, limits) for name, row in rows.items()},
        "environment": _environment(threads, loads),
    }


def _can_run(name: str) -> bool:
    if name in _IN_LLAMA and importlib.util.find_spec("llama_cpp") is None:
        log.warning("%s is left out: it needs llama-cpp-python (docs/llama.md)", name)
        return False
    return True


# ---------------------------------------------------------------------- what is measured


def _turns(
    workers: Sequence[Worker], tokens: int, repeats: int, rows: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """A turn behind a history of so many tokens."""
    for worker in workers:
        tell(f"{worker.name}: a history of {tokens:,} tokens")
        rows[worker.name]["turns"][str(tokens)] = worker.do("take", tokens=tokens)
    tell(f"turns behind {tokens:,} tokens")
    for name, seconds in _interleaved(workers, repeats, "turn").items():
        rows[name]["turns"][str(tokens)].update(seconds)


def _alone(
    workers: Sequence[Worker], repeats: int, rows: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """What a turn is made of."""
    for what in ("prefill", "fold", "restore"):
        tell(what)
        able = [worker for worker in workers if what == "prefill" or worker.about["folds"]]
        for name, seconds in _interleaved(able, repeats, what).items():
            rows[name].update(seconds)


def _many(
    workers: Sequence[Worker],
    counts: Sequence[int],
    repeats: int,
    rows: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    """So many conversations that are answered at once."""
    for count in counts:
        tell(f"{count} at once")
        able = [worker for worker in workers if worker.about["crowd"] >= count]
        for name, found in _interleaved(able, min(repeats, 2), "answer", count=count).items():
            rows[name]["many"][str(count)] = found["tokens_per_second"]


def _interleaved(workers: Sequence[Worker], repeats: int, what: str, **arguments: int) -> dict[str, Any]:
    """Medians and spreads of one command, which the workers run one after the other, again and again."""
    found: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
    for number in range(repeats + 1):
        # each begins once, and the first round warms up
        for worker in (
            [*workers[number % len(workers) :], *workers[: number % len(workers)]] if workers else []
        ):
            result = worker.do(what, **arguments)
            if number:
                found[worker.name].append(result)
    return {
        name: {key: spread([result[key] for result in results]) for key in results[0]}
        for name, results in found.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    numbers = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


# ---------------------------------------------------------------------- what it could be at most


def _with_shares(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """With its share of the limit: of bytes that a token must read, and of operations that a prefill takes."""
    for turn in row["turns"].values():
        least = (row["weight_bytes"] + turn["kv_bytes"]) / limits["bandwidth"]
        turn["decode_share"] = float(f"{least / turn['between']['median']:.3g}")
    if "prefill" in row:
        least = 2 * row["parameters"] * PREFILL / limits["operations"]
        row["prefill_share"] = float(f"{least / row['prefill']['median']:.3g}")
    return row


def _environment(threads: int, loads: list[float]) -> dict[str, Any]:
    packages = ("torch", "transformers", "llama-cpp-python")
    return {
        "ccm": __version__,
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "threads": threads,
        "cores": os.cpu_count(),
        "load_before_and_after": loads,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
