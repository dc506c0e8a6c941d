"""``ccm bench``: contenders play the same turn again and again, and what was measured becomes a page."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import counted
from tiny import saved_folder

from ccm import cli
from ccm.bench import machine, page, run
from ccm.bench.contenders import Setting, Turn, history, named
from ccm.bench.contenders.memories import InMemory, Streaming
from ccm.bench.sizes import ANSWER, HEAD, NAMES, QUESTION
from ccm.bench.worker import Commands

TORCH = ["ccm", "full cache", "streaming-llm", "window", "resend"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return saved_folder(tmp_path_factory.mktemp("bench"), max_position_embeddings=2048)


@pytest.fixture
def small(monkeypatch) -> None:
    """A memory that needs no training, and texts that a tiny model can hold."""
    monkeypatch.setattr("ccm.bench.worker.PREFILL", 200)
    monkeypatch.setattr(InMemory, "memory", "streaming-llm:window=32,sink=4")
    monkeypatch.setattr(Streaming, "memory", "streaming-llm:window=28,sink=4")


@torch.inference_mode()
@pytest.mark.parametrize("name", TORCH)
def test_a_turn_goes_back_to_where_it_began(name, folder, small):
    commands = Commands(named(name)(Setting(folder)))
    before = commands.take(100)["kv_bytes"]
    for _ in range(2):
        turn = commands.turn()
        assert 0 <= turn["first"] <= turn["total"] and turn["between"] >= 0
        assert commands.contender.kv_bytes == before
    assert commands.prefill()["prefill"] >= 0
    if commands.about()["folds"]:
        assert (
            before == 36 * 2 * 3 * 2 * 8 * 4 or name == "streaming-llm"
        )  # entries, K and V, layers, heads, size
        assert commands.fold().keys() == {"fold", "prefill_of_it"} and commands.restore()["restore"] > 0
    if commands.about()["crowd"]:
        assert commands.answer(2)["tokens_per_second"] > 0
    assert commands.peak()["peak_bytes"] > 1e7


@torch.inference_mode()
def test_a_turn_is_that_of_a_session(folder, small):
    """Answers are written by the step of decoding, and their first segment is not read a second time."""
    commands = Commands(InMemory(Setting(folder)))
    commands.take(100)
    reader = commands.contender.method.reader
    with counted(reader) as passes:
        commands.turn()
    longest = commands.contender.method.longest
    question, rest = QUESTION - longest, HEAD + ANSWER - 2 * longest
    assert passes == [longest, question, HEAD, longest, rest]


def test_contenders_that_load_the_same_have_one_model(folder, small):
    ours, streaming = (named(name)(Setting(folder)) for name in ("ccm", "streaming-llm"))
    assert ours.method.reader.model is streaming.method.reader.model
    assert ours.method is not streaming.method


def test_what_a_full_cache_holds_is_the_history(folder, small):
    with torch.inference_mode():
        commands = Commands(named("full cache")(Setting(folder)))
        assert commands.take(100)["kv_bytes"] == 100 * 2 * 3 * 2 * 8 * 4


def test_times_of_a_turn():
    turn = Turn.of(10.0, [11.0, 11.5, 12.0, 14.0], 15.0)
    assert (turn.first, turn.between, turn.total) == (1.0, 0.5, 5.0)
    assert history(50, 50_000)[:20] == history(20, 50_000)  # all have the same
    assert max(history(500, 256)) < 256 and min(history(500, 256)) >= 100


class Said:
    """A worker that knows its answers; a later repetition takes longer."""

    def __init__(self, name: str, speed: float, **about: Any):
        self.name, self.speed, self.calls = name, speed, 0
        self.about = {
            "reach": 4000,
            "crowd": 4,
            "folds": True,
            "weight_bytes": 1000,
            "parameters": 500,
        } | about

    def do(self, what: str, **arguments: int) -> dict[str, float]:
        self.calls += 1
        keys = {"turn": ("first", "between", "total"), "fold": ("fold", "prefill_of_it")}.get(what, (what,))
        return dict.fromkeys(keys, self.calls / self.speed)


def test_an_accelerator_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    clock = machine.clock_of(1, torch.device("cuda", 1))
    assert clock() <= clock() and waited == [torch.device("cuda", 1)] * 2
    assert machine.clock_of(1) is time.process_time and machine.clock_of(2) is time.perf_counter


def test_what_was_measured_is_kept_as_it_comes(folder, monkeypatch, tmp_path):
    """A run that is stopped leaves a result of which a page can be made."""
    histories = iter((50, 90))
    monkeypatch.setattr(run, "HISTORIES", {True: histories})
    monkeypatch.setattr(run, "AMONG", {True: 50})
    monkeypatch.setattr(run, "CROWDS", {True: ()})
    monkeypatch.setattr("ccm.bench.worker.PREFILL", 100)

    def keep(result: dict[str, Any]) -> None:
        kept.append(json.loads(json.dumps(result)))
        raise KeyboardInterrupt

    kept: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run.bench(folder, quick=True, only=["window"], keep=keep)
    assert kept[0]["rows"]["window"]["turns"].keys() == {"50"} and next(histories) == 90
    assert "transformers on cpu, float32" in page.page(kept[0])


def test_repetitions_take_turns_and_the_first_is_not_counted():
    workers = [Said("a", 1), Said("b", 2)]
    found = run._interleaved(workers, 3, "turn")
    assert (
        found["a"]["total"] == {"median": 3, "least": 2, "most": 4} and found["b"]["total"]["median"] == 1.5
    )


def test_shares_of_the_limit():
    row: dict[str, Any] = {"weight_bytes": 900, "parameters": 50, "prefill": {"median": 1.0}}
    row["turns"] = {"250": {"kv_bytes": 100, "between": {"median": 4.0}}}
    found = run._with_shares(row, {"bandwidth": 500.0, "operations": 1024 * 200.0})
    assert found["turns"]["250"]["decode_share"] == 0.5 and found["prefill_share"] == 0.5


def result() -> dict[str, Any]:
    value = {"median": 1.5, "least": 1.0, "most": 2.0}
    turn = {"kv_bytes": 2_000_000, "first": value, "between": value, "total": value, "decode_share": 0.5}
    common = {
        "weight_bytes": 10,
        "parameters": 10,
        "peak_bytes": 10**9,
        "prefill": value,
        "prefill_share": 0.25,
        "packages": {"torch": "2", "transformers": "5"},
        "device": "cpu, float32",
    }
    memory = {**common, "turns": {"250": turn, "1000": turn}, "many": {"4": value}}
    memory |= {"fold": {**value, "median": 3.0}, "prefill_of_it": value, "restore": value}
    alone = {**common, "turns": {"250": turn}, "many": {}}
    rows = {name: memory if name in ("ccm", "streaming-llm") else alone for name in NAMES}
    rows["vllm"] = {
        **alone,
        "turns": {"250": turn, "1000": {**turn, "read": 12.34}},
        "packages": {"vllm": "1"},
    }
    rows["kvpress"] = {
        **alone,
        "turns": {"1000": {**turn, "read": 5.0}},
        "packages": {"torch": "2", "kvpress": "3"},
    }
    made = {"threads": 1, "cores": 2}
    return {
        "rows": rows,
        "limits": {"bandwidth": 1e10, "operations": 5e10},
        "quick": True,
        "repeats": 2,
        "environment": {**made, "load_before_and_after": [0.1, 1.1]},
    }


def test_the_page(tmp_path, capsys):
    text = page.page(result())
    assert "| ccm | 1.50 <small>(1.00-2.00)</small> s | 1.50 <small>(1.00-2.00)</small> s |" in text
    assert "| resend | 1.50 <small>(1.00-2.00)</small> s |  |" in text  # not measured so far
    assert "2.0× a prefill" in text and "bandwidth 10.0 GB/s" in text
    assert (
        "each; torch 2, transformers 5, vllm 1, kvpress 3; transformers on cpu, float32; 2 repetitions"
        in text
    )
    assert "To read 1,000 tokens of history once: 12.3 s for vllm, 5.0 s for kvpress." in text
    assert all(f"\n- **{name}**: " in text and text.count(f"\n| {name} | ") >= 4 for name in NAMES)
    pytest.importorskip("matplotlib")
    (tmp_path / "bench.json").write_text(json.dumps(result()))
    (tmp_path / "eval").mkdir()
    shutil.copy(Path(__file__).parents[2] / "results" / "eval" / "streams.json", tmp_path / "eval")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / page.PAGE).read_text() == text
    assert (tmp_path / "docs" / page.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_what_is_refused(capsys):
    assert cli.main(["bench", "--only", "ollama"]) == 2
    assert "unknown contender 'ollama'" in capsys.readouterr().err


def test_who_lacks_a_package_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(
        run, "_NEEDS", {"window": ("no_such_package", "a package"), "ccm": ("torch", "torch")}
    )
    assert run._can_run("ccm", sys.executable) and run._can_run("resend", "not asked")
    assert not run._can_run("window", sys.executable)
    assert "window is left out: it needs a package" in caplog.text and "--env 'window=PYTHON'" in caplog.text
    with pytest.raises(run.BenchError, match="no contender"):
        run.bench(only=["window"])


def test_who_shares_a_process():
    assert run._processes(dict.fromkeys(("ccm", "window", "streaming-llm"), "python")) == [
        (["ccm", "streaming-llm"], "python"),
        (["window"], "python"),
    ]
    apart = run._processes({"ccm": "python", "streaming-llm": "another"})
    assert apart == [(["ccm"], "python"), (["streaming-llm"], "another")]


def test_a_process_of_two(folder):
    settings = {"model": folder, "threads": 1, "device": "cpu", "dtype": "bfloat16"}
    with run.working(["window", "resend"], sys.executable, **settings) as workers:
        for worker in workers:
            assert worker.do("take", tokens=400) == {"kv_bytes": 0}
            assert worker.about["packages"]["torch"] == torch.__version__
            assert worker.about["device"] == "cpu, bfloat16"
            assert worker.do("turn")["total"] > 0
        assert workers[0].process is workers[1].process
        workers[0].process.process.kill()
        with pytest.raises(run.BenchError, match="resend: it ended"):
            workers[1].do("turn")


@pytest.mark.slow
def test_a_run_with_processes(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "HISTORIES", {True: (50, 90)})
    monkeypatch.setattr(run, "AMONG", {True: 90})
    monkeypatch.setattr(run, "CROWDS", {True: (1,)})
    python = tmp_path / "python"  # of another environment
    python.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    arguments = [
        "bench",
        "--quick",
        "--model",
        folder,
        "--only",
        "window",
        "--env",
        f"window={python}",
        "--json",
    ]
    assert cli.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["rows"]["window"]["turns"].keys() == {"50", "90"}
    assert (tmp_path / "used").exists()
