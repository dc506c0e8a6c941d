"""One run of all contenders in turns: what disturbs one disturbs all. Each has a process, or shares one."""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from .. import __version__
from ..errors import CCMError
from ..models.placement import AUTO
from .sizes import NAMES, PREFILL

log = logging.getLogger(__name__)

#: What a quick run measures, and a whole one.
HISTORIES = {True: (250, 1_000), False: (250, 1_000, 4_000, 16_000, 100_000)}
CROWDS = {True: (1, 4), False: (1, 4, 16, 32)}
REPEATS = {True: 2, False: 3}
#: History at which folds, restores and many at once are measured: the memory is full by then.
AMONG = {True: 1_000, False: 4_000}
#: What some need beside this library: as it is imported, and as it is told of.
_NEEDS = {
    "ccm in llama.cpp": ("llama_cpp", "llama-cpp-python (docs/llama.md)"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python (docs/llama.md)"),
    "vllm": ("vllm", "vLLM (make vllm-env)"),
    "kvpress": ("kvpress", "kvpress (make kvpress-env)"),
}
#: Contenders that go into the process of another, so that both read the same weights where they lie.
TOGETHER = {"streaming-llm": "ccm"}


class BenchError(CCMError):
    """A contender failed."""


class Process:
    """One process of contenders; the first thing that it says is ``about`` each."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]):
        self.process, self.log = process, log
        self.about: dict[str, Any] = self._hear()

    def ask(self, **order: Any) -> dict[str, Any]:
        """One command.

        Raises:
            BenchError: the process has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = self.log.read().strip().splitlines()
            raise BenchError(f"it ended: {last[-1] if last else 'it does not say why'}")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass
class Worker:
    """One contender in its process."""

    name: str
    process: Process

    @property
    def about(self) -> dict[str, Any]:
        """What it says of itself."""
        found: dict[str, Any] = self.process.about[self.name]
        return found

    def do(self, what: str, **arguments: int) -> dict[str, Any]:
        """One command.

        Raises:
            BenchError: the process has ended.
        """
        try:
            return self.process.ask(do=what, of=self.name, **arguments)
        except BenchError as error:
            raise BenchError(f"{self.name}: {error}") from error


@contextmanager
def working(names: Sequence[str], python: str, **settings: Any) -> Iterator[list[Worker]]:
    """Contenders in a process of this interpreter, until the end of the block."""
    command = [python, "-m", "ccm.bench.worker", json.dumps({"names": names, **settings})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            try:
                own = Process(process, errors)
            except BenchError as error:
                raise BenchError(f"{', '.join(names)}: {error}") from error
            yield [Worker(name, own) for name in names]
        finally:
            process.kill()
            process.wait()


def bench(
    model: str | None = None,
    llama: str = "default",
    threads: int = 1,
    quick: bool = False,
    device: str = AUTO,
    dtype: str = AUTO,
    decode_in: str = AUTO,
    only: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        model: folder, GGUF file or hub id; None is the embedded one.
        llama: GGUF file of the same model; "default" is that of the embedded one.
        threads: of the CPU, for every contender.
        quick: fewer and shorter.
        device, dtype: where torch runs the model, and in which type; llama.cpp and vLLM go by their build.
        decode_in: from what the memories of this library write answers.
        only: names of contenders; none: all of :data:`NAMES` that can run here.
        env: Python interpreters of other environments, by contender.
        tell: hears what is being done.
        keep: gets what there is after every history, so that a run that is stopped leaves something.

    Returns:
        what ``results/bench.json`` holds (docs/performance.md).

    Raises:
        BenchError: a contender failed, or none can run.
    """
    pythons = {name: (env or {}).get(name, sys.executable) for name in only or NAMES}
    pythons = {name: python for name, python in pythons.items() if _can_run(name, python)}
    if not pythons:
        raise BenchError("no contender is left to measure")
    began = os.getloadavg()[0]
    settings = {"model": model, "llama": llama, "threads": threads}
    settings |= {"device": device, "dtype": dtype, "decode_in": decode_in}
    with ExitStack() as stack:
        found: dict[str, Worker] = {}
        for names, python in _processes(pythons):
            tell(f"{', '.join(names)}: loading")
            started = working(names, python, **settings)
            found |= {worker.name: worker for worker in stack.enter_context(started)}
        workers = [found[name] for name in pythons]
        limits = []
        rows = {worker.name: {**worker.about, "turns": {}, "many": {}} for worker in workers}
        for tokens in HISTORIES[quick]:
            limits.append(workers[0].do("limits"))  # again and again: they move with the load as well
            able = [worker for worker in workers if worker.about["reach"] >= tokens]
            _turns(able, tokens, REPEATS[quick], rows, tell)
            if tokens == AMONG[quick]:
                _alone(able, REPEATS[quick], rows, tell)
                _many(able, CROWDS[quick], REPEATS[quick], rows, tell)
            for worker in workers:
                rows[worker.name].update(worker.do("peak"))
            most = {name: statistics.median(each[name] for each in limits) for name in limits[0]}
            result = {
                "task": "a turn of 24 tokens in and 32 out, and what it is made of",
                "model": model or "embedded",
                "quick": quick,
                "repeats": REPEATS[quick],
                "limits": {name: round(value) for name, value in most.items()},
                "rows": {name: _with_shares(row, most) for name, row in rows.items()},
                "environment": {
                    "ccm": __version__,
                    "python": platform.python_version(),
                    "threads": threads,
                    "cores": os.cpu_count(),
                    "load_before_and_after": [round(began, 2), round(os.getloadavg()[0], 2)],
                },
            }
            keep(result)
    return result


def _can_run(name: str, python: str) -> bool:
    if name not in _NEEDS:
        return True
    module, package = _NEEDS[name]
    look = f"import sys, importlib.util as util; sys.exit(util.find_spec({module!r}) is None)"
    if subprocess.run([python, "-c", look]).returncode == 0:
        return True
    log.warning(
        "%s is left out: it needs %s; where another environment has it: --env '%s=PYTHON'",
        name,
        package,
        name,
    )
    return False


def _processes(pythons: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Contenders that go into one process, and its interpreter."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, python in pythons.items():
        found.setdefault((TOGETHER.get(name, name), python), []).append(name)
    return [(names, python) for (_, python), names in found.items()]


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
