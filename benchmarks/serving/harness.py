"""What the server's benchmarks share: a real ``ccm serve`` process on loopback, its clients, and records of a run."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch

sys.path.append(str(Path(__file__).parent.parent))
from common import RESULTS, environment

ROOT = RESULTS.parent
CCM = Path(sys.executable).with_name("ccm")
#: Another name of whatever model is served.
MODEL = "ccm"
#: A timed repeat counts if other programs took at most this share of the machine meanwhile.
DISTURBED = 0.15


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the server")
    arguments.add_argument("--quick", action="store_true", help="a small version of it; nothing is stored")
    return arguments


def placed_parser(description: str) -> argparse.ArgumentParser:
    """As :func:`parser`, of a benchmark that may run elsewhere than on the CPU."""
    arguments = parser(description)
    arguments.add_argument("--device", default="cpu", help="of the server's model, such as cuda")
    arguments.add_argument("--dtype", default="float32", help="of its weights")
    return arguments


def placed(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Options of ``ccm serve`` for where its model goes."""
    return "--device", arguments.device, "--dtype", arguments.dtype


class Server:
    """A ``ccm serve`` process; started again after a kill, it is reached at the same attributes.

    Args:
        folder: for its store and its log.
        threads: CPU threads.
        options: further options of ``ccm serve``.
    """

    def __init__(self, folder: Path, threads: int, *options: str):
        self.log = folder / "server.log"
        self.command = [str(CCM), "serve", "--port", "0", "--threads", str(threads), *options]
        if "--adapter" not in options:
            self.command += ["--adapter", "ccm-merge"]  # of all figures in results/serving
        if "--device" not in options:
            self.command += ["--device", "cpu"]
        if "--store" not in options:
            self.command += ["--store", f"sqlite://{folder}/memories.db"]
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.start()

    def start(self) -> None:
        began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            self.process.wait()
            raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-2000:]}")
        self.url = found[0]
        self.start_seconds = time.monotonic() - began
        self.usage = psutil.Process(self.process.pid)

    def client(self, key: str = "none") -> openai.OpenAI:
        """The stock client; it repeats nothing by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=600)

    def cpu_seconds(self) -> float:
        return float(sum(self.usage.cpu_times()[:2]))

    def rss(self) -> float:
        """Resident memory in MB."""
        return self.usage.memory_info().rss / 1e6

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextmanager
def serving(folder: Path, threads: int, *options: str) -> Iterator[Server]:
    """A server until the end of the block."""
    server = Server(folder, threads, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


class Others:
    """How busy the machine was with anything but this benchmark and its server, as a share of all cores."""

    def __init__(self, server: Server):
        self.processes = [psutil.Process(), server.usage]
        self.before = self._now()

    def _now(self) -> tuple[float, float, float]:
        cpu = psutil.cpu_times()
        busy = sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice
        own = sum(sum(process.cpu_times()[:2]) for process in self.processes)
        return time.monotonic(), busy, own

    def share(self) -> float:
        """Since it was made."""
        elapsed, busy, own = (now - was for now, was in zip(self._now(), self.before, strict=True))
        return round(max(busy - own, 0) / (elapsed * (os.cpu_count() or 1)), 3)


def undisturbed(repeats: int, measure: Callable[[int], dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """So many rows of ``measure(n)`` whose ``others_cpu_share`` is small, and how many others there were.

    Raises:
        RuntimeError: the machine is too busy.
    """
    rows: list[dict[str, Any]] = []
    for n in range(6 * repeats):
        row = measure(n)
        if row["others_cpu_share"] <= DISTURBED:
            rows.append(row)
        if len(rows) == repeats:
            return rows, n + 1 - repeats
    raise RuntimeError(
        f"other programs took more than {DISTURBED:.0%} of the machine too often: try again later"
    )


def ask(
    client: openai.OpenAI, text: str | Sequence[dict[str, str]], session: str | None, **options: Any
) -> Any:
    """One chat completion, greedy unless told otherwise."""
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    headers = {} if session is None else {"X-Session-Id": session}
    options = {"model": MODEL, "temperature": 0, **options}
    return client.chat.completions.create(messages=messages, extra_headers=headers, **options)  # type: ignore[call-overload]


def streamed(*args: Any, **options: Any) -> tuple[str, float]:
    """The text of a streamed chat completion, and the seconds to its first piece of text."""
    began, first, pieces = time.perf_counter(), 0.0, []
    for chunk in ask(*args, stream=True, **options):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            pieces.append(chunk.choices[0].delta.content)
    return "".join(pieces), first


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and range."""
    numbers = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()}


def _source() -> dict[str, Any]:
    """The commit that was measured, and files of the source that differed from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    changed = [line[3:] for line in git("status", "--porcelain", "src").splitlines()]
    return {"commit": git("rev-parse", "--short", "HEAD").strip(), "uncommitted_source": changed}


#: Taken at the start: others may change the source during a run.
SOURCE = _source()


def machine(threads: int) -> dict[str, Any]:
    """Versions, and facts of the machine."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", facts)
    packages = {package: version(package) for package in ("fastapi", "openai", "uvicorn")}
    return {
        **environment(),
        **packages,
        **SOURCE,
        "source_changed_during_the_run": _source() != SOURCE,
        "threads": threads,
        "cores": os.cpu_count(),
        "cpu": name[1] if name else "unknown",
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def store(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Print a result and keep it as ``results/serving/NAME.json``, unless it is quick; returns what was reached.

    Results of another device or type than the CPU's float32 have these in their name.
    """
    where = {name: getattr(arguments, name) for name in ("device", "dtype") if hasattr(arguments, name)}
    if where not in ({}, {"device": "cpu", "dtype": "float32"}):
        name = "-".join((name, *where.values()))
        if where["device"].startswith("cuda"):
            where["gpu"] = torch.cuda.get_device_name(where["device"])
    text = json.dumps({**result, "environment": {**machine(arguments.threads), **where}}, indent=1)
    if not arguments.quick:
        (RESULTS / "serving").mkdir(parents=True, exist_ok=True)
        (RESULTS / "serving" / f"{name}.json").write_text(text + "\n")
    print(text)
    return bool(result["reached"])
