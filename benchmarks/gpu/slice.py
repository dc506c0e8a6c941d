"""A slice of training on a machine that holds Python and torch, and no network: unpack, measure, train, evaluate.

    python3 1/slice.py receive 1
    python3 2/slice.py all 2 --minutes 7 --budget 560

It keeps its own clock and ends before the budget does. What was reached is copied to --out as it comes.
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402

from pieces import BundleError, receive  # noqa: E402

MODEL = "cache/models/SmolLM2-135M-Instruct"
EVALUATE, CLOSE = 60.0, 20.0  # seconds: of the evaluation, and to save and copy
START = 40.0  # seconds before training's first step: 36 were measured on an H100
OTHER = 0.1  # share of training's time that goes into evaluations on held-out rows
EVERY = 20.0  # seconds between copies of what was reached


class Clock:
    """What is left of a budget of seconds, of which everything takes its share.

    Args:
        budget: seconds from ``started`` on.
        started: seconds since the epoch.
    """

    def __init__(self, budget: float, started: float):
        self.end = started + budget

    def left(self, reserved: float = 0.0) -> float:
        """Seconds until something must end that ``reserved`` seconds of other work follow."""
        return max(0.0, self.end - time.time() - reserved)


def minutes_of_training(left: float, most: float) -> float:
    """Minutes of steps in ``left`` seconds, at most ``most``: the trainer's clock counts nothing else."""
    return max(0.0, min(most, (left - START) * (1 - OTHER) / 60))


class Slice:
    """What is unpacked below a folder, and what is done with it.

    Args:
        root: the folder.
        out: where results go.
        recipe: of the run, a path below the code or any other.
        overrides: of the recipe.
    """

    def __init__(self, root: Path, out: Path, recipe: str, overrides: list[str]):
        self.root, self.out, self.run = root, out, root / "run"
        self.code, self.rows = root / "code", root / "rows.pack"
        self.adapter = self.run / "adapter"
        self.recipe, self.overrides = recipe, overrides

    @property
    def init(self) -> Path | None:
        """The adapter that training goes on from."""
        return self.root / "init" if (self.root / "init").exists() else None

    @property
    def described(self) -> list[str]:
        """The run, as arguments."""
        recipe = self.recipe if Path(self.recipe).exists() else str(self.code / self.recipe)
        return [recipe, f"packed={self.rows}", f"init_from={self.init or 'null'}", *self.overrides]

    def receive(self, bundle: Path) -> None:
        """Take in a bundle; once all are there the model is made.

        Raises:
            BundleError: it is damaged.
        """
        began = time.time()
        self.root.mkdir(parents=True, exist_ok=True)
        changed, missing = receive(bundle, self.root)
        model, weights, begun = self.root / MODEL, self.root / "weights", self.root / "begun"
        if changed & {"weights", "model.tar"}:
            shutil.rmtree(model, ignore_errors=True)
        if changed & {
            "weights",
            "model.tar",
            "init.tar",
            "begun.tar",
        }:  # what was trained here began elsewhere
            shutil.rmtree(self.run, ignore_errors=True)
        if missing:
            say(f"still missing: bundle {', '.join(map(str, missing))}")
            return
        if not model.exists():
            from weights import write_model

            part = self.root / "part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.root / "model", part)
            write_model(part, weights if weights.exists() else None)
            model.parent.mkdir(parents=True, exist_ok=True)
            part.rename(model)
        if begun.exists() and not self.run.exists():
            shutil.copytree(begun, self.run)
        kind = "the model's own" if weights.exists() else "random"
        say(f"everything is there, weights: {kind}; received in {time.time() - began:.1f} s")

    def check(self) -> None:
        """Raises: BundleError, where something has not arrived."""
        for path in (self.code, self.rows, self.root / MODEL / "model.safetensors"):
            if not path.exists():
                raise BundleError(f"{path} is not there: receive every bundle first")

    def measure(self, seconds: float) -> dict:
        """Speed and memory of a step at several sizes; empty where nothing could be measured."""
        result = self.out / "bench.json"
        result.unlink(missing_ok=True)
        command = [str(self.code / "benchmarks/gpu/bench.py"), *self.described, "--out", str(result)]
        self._run([*command, "--seconds", f"{seconds - 5:.0f}", "--started", str(time.time())], seconds)
        return json.loads(result.read_text()) if result.exists() else {}

    def train(self, minutes: float, seconds: float, measured: dict) -> None:
        """Train for so many minutes of steps, and end before so many seconds are over."""
        from state import CHECKPOINT, begin_anew, leave

        smaller = smaller_steps(measured)
        if (checkpoint := self.run / CHECKPOINT).exists():
            begin_anew(checkpoint, {"init_from": self.init and str(self.init), **smaller})
            if self.init and not self.adapter.exists():  # the best so far
                shutil.copytree(self.init, self.adapter)
        command = [
            "-m",
            "ccm",
            "train",
            *self.described,
            *(f"{name}={value}" for name, value in smaller.items()),
        ]
        ends, copied, said = time.time() + seconds, time.time(), self._progress(-1)
        say(f"training: {minutes:.2f} minutes of steps in {seconds:.0f} s")
        child = self._start([*command, "--minutes", f"{minutes:.4f}", "--out", str(self.run)])
        try:
            while child.poll() is None and time.time() < ends:
                time.sleep(0.5)
                if time.time() - copied > EVERY:
                    said, copied = self._progress(said), time.time()
                    say(f"kept: {leave(self.run, self.out)}")
            if child.poll() is None:
                say("training: out of time; it saves and stops")
        finally:
            end(child)
            self._progress(said)
            say(f"kept: {leave(self.run, self.out)}")
        if child.returncode not in (0, 143):
            say(f"training: ended with {child.returncode}")

    def evaluate(self, seconds: float) -> None:
        """What the page of results says of the adapter, by ``evaluate.py``."""
        script = self.code / "benchmarks/gpu/evaluate.py"
        if not script.exists() or not self.adapter.exists():
            say(f"evaluation: left out, {(self.adapter if script.exists() else script)} is not there")
            return
        command = [str(script), "--adapter", str(self.adapter), "--out", str(self.out / "eval.json")]
        self._run([*command, "--model", str(self.root / MODEL)], seconds)

    def turns(self, seconds: float) -> None:
        """Turns, decoding and many at once, of what torch runs, by ``ccm bench``; kept after every history."""
        ends = time.time() + seconds
        for file, decode_in, names in (
            ("turns_graph.json", "graph", ["ccm", "streaming-llm"]),
            ("turns.json", "auto", ["ccm", "streaming-llm", "full cache", "resend"]),
        ):
            command = ["-m", "ccm", "bench", "--model", str(self.root / MODEL), "--decode-in", decode_in]
            command += [part for name in names for part in ("--only", name)]
            self._run([*command, "--out", str(self.out / file)], max(0.0, ends - time.time()))

    # ------------------------------------------------------------------ processes

    def _progress(self, said: int) -> int:
        """Say how far the run is since ``said`` lines of its log, -1 for nothing; returns how many it has now."""
        log = self.run / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) > said >= 0:
            with suppress(ValueError):  # half a line
                last = json.loads(lines[-1])
                say(
                    " · ".join(f"{name} {last[name]}" for name in last if isinstance(last[name], int | float))
                )
        return len(lines)

    def _start(self, command: list[str]) -> subprocess.Popen:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(self.code / "src"))))
        environment = {**os.environ, "PYTHONPATH": path, "CCM_CACHE": str(self.root / "cache")}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        return subprocess.Popen([sys.executable, *command], env=environment)

    def _run(self, command: list[str], seconds: float) -> None:
        child = self._start(command)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            say(f"{Path(command[0]).name}: out of time")
        finally:
            end(child)
        if child.returncode not in (0, 143):
            say(f"{Path(command[0]).name}: ended with {child.returncode}")


def smaller_steps(measured: dict) -> dict[str, int]:
    """Overrides of a recipe whose steps are predicted not to fit the card."""
    if not measured or not (fits := measured.get("fits")) or measured["tokens_per_batch"] <= fits:
        return {}
    say(f"a step of {measured['tokens_per_batch']:,} tokens would not fit the card: {fits:,}")
    return {"tokens_per_batch": fits}


def end(child: subprocess.Popen) -> None:
    """Ask a process to save and stop, and wait for it a little."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(CLOSE / 2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def say(line: str) -> None:
    print(f"[{time.time() - STARTED:6.1f} s] {line}", flush=True)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("part", choices=("receive", "bench", "train", "evaluate", "turns", "all"))
    arguments.add_argument("bundle", nargs="?", type=Path, help="a bundle to take in first")
    arguments.add_argument("--recipe", default="recipes/one-gpu.yaml", help="of the run")
    arguments.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="in place of the recipe's"
    )
    arguments.add_argument("--minutes", type=float, default=1000.0, help="most minutes of training steps")
    arguments.add_argument(
        "--bench", type=float, default=60.0, help="seconds to measure steps; 0: not at all"
    )
    arguments.add_argument("--budget", type=float, default=560.0, help="seconds until all of it ends")
    arguments.add_argument(
        "--root", type=Path, default=Path("/tmp/ccm-slice"), help="where things are unpacked"
    )
    out = os.environ.get("OUT")
    arguments.add_argument(
        "--out", type=Path, default=out and Path(out), help="for results; else below --root"
    )
    chosen = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = chosen.root.resolve()
    work = Slice(root, (chosen.out or root / "out").resolve(), chosen.recipe, chosen.set)
    try:
        work_through(chosen, work)
    except (BundleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def work_through(chosen: argparse.Namespace, work: Slice) -> None:
    clock, everything = Clock(chosen.budget, STARTED), chosen.part == "all"
    if chosen.bundle:
        work.receive(chosen.bundle)
    if chosen.part == "receive":
        return
    work.check()
    work.out.mkdir(parents=True, exist_ok=True)
    measured = {}
    if chosen.part == "bench" or (everything and chosen.bench):
        measured = work.measure(min(chosen.bench, clock.left(CLOSE)))
    if everything or chosen.part == "train":
        seconds = clock.left(CLOSE + (EVALUATE if everything else 0))
        minutes = minutes_of_training(seconds, chosen.minutes)
        if minutes:
            work.train(minutes, seconds, measured)
        else:
            say("training: left out, the budget is too small")
    if chosen.part == "turns":
        work.turns(clock.left(CLOSE))
    if everything or chosen.part == "evaluate":
        work.evaluate(min(EVALUATE, clock.left(CLOSE / 2)) if everything else clock.left(CLOSE / 2))


if __name__ == "__main__":
    sys.exit(main())
