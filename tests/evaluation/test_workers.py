"""Several processes that measure into one folder: nothing twice, nothing lost, nobody left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from runs import environment
from test_evaluation import EMPTY, evaluation, no_clock, plan
from tiny import tiny_model

from ccm.evaluation import workers
from ccm.evaluation.records import Records
from ccm.evaluation.runner import Evaluation
from ccm.evaluation.workers import Workers, how_many

TEXTS = ("none", "full", "streaming-llm@mean-pool", "mean-pool")
KEY = ("task", "method", "item")


def toys(limit: int) -> Evaluation:
    return evaluation(plan({}, *TEXTS, limit=limit))


def toys_on_one_thread(limit: int) -> Evaluation:
    """In a new process: the last digits depend on the number of threads, and other tests change it in this one."""
    torch.set_num_threads(1)
    return toys(limit)


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def keys(folder: Path) -> list[tuple[str, str, str]]:
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(record["task"], record["method"], record["item"]) for record in map(json.loads, lines)]


def test_they_start_from_any_thread(tmp_path: Path) -> None:
    """A notebook's server or a web handler, where Python allows no signal handlers."""

    def measure() -> int:
        with Workers(1, toys_on_one_thread, 1, tmp_path):
            wait_for(lambda: len(keys(tmp_path)) == 4)
        return len(keys(tmp_path))

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(measure).result() == 4


def test_two_processes_make_the_table_of_one(tmp_path: Path, one_thread: None) -> None:
    alone = toys(6).run(tmp_path / "alone")
    with Workers(2, toys_on_one_thread, 6, tmp_path / "shared"):
        wait_for(lambda: len(keys(tmp_path / "shared")) == 24)
    found = keys(tmp_path / "shared")
    assert len(set(found)) == len(found) == 24, "nothing is measured twice"
    together = toys(6).run(tmp_path / "shared", processes=3)
    assert keys(tmp_path / "shared") == found, "all of it was there"
    assert no_clock(together["rows"]) == no_clock(alone["rows"])
    assert (alone["machine"]["processes"], together["machine"]["processes"]) == (1, 3)
    assert not list((tmp_path / "shared").glob(".claim-*"))


def test_one_that_is_not_needed_any_more_ends_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is still at its imports, which an interruption would break off with a traceback."""
    with Workers(2, toys, 1, tmp_path) as helpers:
        for process in helpers.processes:
            os.kill(process.pid or 0, signal.SIGINT)  # Ctrl-C on the terminal reaches all of its processes
        time.sleep(0.5)
    assert capfd.readouterr() == ("", "")
    assert all(process.exitcode == -signal.SIGKILL for process in helpers.processes)


def test_an_item_is_claimed_by_one(tmp_path: Path) -> None:
    first, second = Records(tmp_path, EMPTY), Records(tmp_path, EMPTY)
    with first.claim(KEY) as ours:
        assert ours
        with second.claim(KEY) as theirs, second.claim(("task", "method", "other")) as other:
            assert other and not theirs
        first.add(KEY, {"item": "item"})
        assert second.get(KEY) is None
    with second.claim(KEY) as ours:
        assert ours and second.get(KEY) is not None, "whoever claims an item sees that it is done"
    second.add(("task", "method", "other"), {"item": "other"})
    first.refresh()
    assert first.all() == second.all() == Records(tmp_path, EMPTY).all()


def test_methods_that_another_process_adds_are_in_the_summary(tmp_path: Path) -> None:
    mine = evaluation(plan({}, "none", "full", limit=1))
    folder, seen = tmp_path / "out", []

    def meanwhile(progress: Any) -> None:
        seen.append(progress)
        if len(seen) == 1:
            evaluation(plan({}, "mean-pool", limit=1)).measure(folder)

    rows = mine.run(folder, meanwhile)["rows"]
    assert {row["method"] for row in rows} == {"none", "full", "mean-pool"}


def hold_for_ever(folder: Path) -> None:
    with Records(folder, EMPTY).claim(KEY):
        (folder / "held").touch()
        time.sleep(600)


def test_what_a_killed_process_had_claimed_is_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=hold_for_ever, args=(tmp_path,), daemon=True
    )
    process.start()
    wait_for((tmp_path / "held").exists)
    store = Records(tmp_path, EMPTY)
    with store.claim(KEY) as ours:
        assert not ours
    process.kill()
    process.join()
    with store.claim(KEY) as ours:
        assert ours


def test_an_evaluation_waits_for_what_another_process_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measures what waits for that afterwards."""
    mine = toys(2)
    other = Records(tmp_path / "out", mine.settings())
    whole = {tuple(key): record for key, record in _records(toys(2), tmp_path / "whole").items()}
    key = next(k for k in whole if k[1] == "mean-pool")
    waits: list[float] = []
    claim = other.claim(key)

    def wait(seconds: float) -> None:
        waits.append(seconds)
        assert len(keys(tmp_path / "out")) == 6, "all but the item and the window of its size"
        other.add(key, whole[key])
        claim.__exit__(None, None, None)

    monkeypatch.setattr("ccm.evaluation.runner.time", SimpleNamespace(sleep=wait))
    assert claim.__enter__()
    mine.run(tmp_path / "out")
    assert len(waits) == 1
    assert keys(tmp_path / "out")[6:] == [key, (key[0], "streaming-llm@mean-pool", key[2])]


def _records(made: Evaluation, folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["task"], r["method"], r["item"]): r for r in made.measure(folder).all()}


PARENT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_workers import Workers, toys, wait_for
if __name__ == "__main__":
    with Workers(1, toys, 2000, Path({out!r})) as helpers:
        print(helpers.processes[0].pid, flush=True)
        wait_for(Path({out!r}, "records.jsonl").exists)
        {then}
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_helpers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    then = f"os.kill(os.getpid(), {int(number)})"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"), then=then))
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True)
    assert done.returncode, "it did not come to its end"
    assert done.stderr.count("KeyboardInterrupt") == (number == signal.SIGINT), done.stderr
    helper = int(done.stdout)
    wait_for(lambda: not _runs(helper), 30)
    before = keys(tmp_path / "out")
    assert before and len(set(before)) == len(before)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


def test_as_many_processes_as_cores_memory_and_work_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert how_many(model, 10**6) == 4
    assert how_many(model, 3 * workers._WORTH) == 3
    assert how_many(model, 0) == 1
    monkeypatch.setattr(model, "get_memory_footprint", lambda: psutil.virtual_memory().total)
    assert how_many(model, 10**6) == 1, "the weights fit only once"
