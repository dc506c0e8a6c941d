"""Two processes on the CPU (gloo, through torchrun) against one, step by step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import log_of, weights_of
from servers import free_port
from tiny import tiny_model

from ccm.training.distributed import decoder_layers, save_memory


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_logs(tmp_path_factory.mktemp("logs"))


CHANGES: dict[str, Any] = {
    "compressor": {"slots": 2, "rule": "mean", "target_modules": "all"},
    "reconstruction": 0.5,
}


def alone(folder: Path, logs: Path, **changes: Any) -> Path:
    """A run of this process."""
    runs.trainer(folder, logs, **CHANGES, **changes).run()
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Path:
    """One process that takes both batches of every step, one after the other."""
    return alone(tmp_path_factory.mktemp("runs") / "alone", logs, accumulate=2)


def assert_same(ours: Path, expected: Path) -> None:
    for a, b in zip(weights_of(ours), weights_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for line, other in zip(log_of(ours), log_of(expected), strict=True):
        assert line["tokens"] == other["tokens"]
        assert line == pytest.approx(other, abs=2e-3, rel=1e-5)


def test_two_processes_equal_one(tmp_path: Path, logs: Path, expected: Path) -> None:
    recipe = runs.write_recipe(tmp_path, logs, **CHANGES)
    done = runs.start(recipe, tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter: ") == 1  # one process speaks
    assert_same(tmp_path / "out", expected)
    # the run goes on with one process: weights, optimizer and place in the stream do not depend on their number
    resumed = runs.trainer(tmp_path / "out", logs, extend=True, **CHANGES)
    assert resumed.step == 6 and resumed.rows.served == 12
    resumed.run()
    assert [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, 13))


def test_two_machines_equal_one(tmp_path: Path, logs: Path, expected: Path) -> None:
    """Two launchers that find each other at an address, as on two machines with one folder."""
    recipe, port = runs.write_recipe(tmp_path, logs, parallel="fsdp2", **CHANGES), free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    meet = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    train = ["-m", "ccm", "train", str(recipe), "--out", str(tmp_path / "out")]
    machines = [
        subprocess.Popen(
            [*launch, *meet, "--node_rank", str(rank), *train],
            env=runs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    said = [machine.communicate()[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "".join(said).count("adapter: ") == 1
    assert_same(tmp_path / "out", expected)


def test_half_of_the_batches_are_not_enough(tmp_path: Path, logs: Path, expected: Path) -> None:
    """The control: without the second batch of every step the weights are others."""
    with pytest.raises(AssertionError):
        assert_same(alone(tmp_path, logs, accumulate=1), expected)


SHARDS = """
import json, sys
import torch
import runs
from pathlib import Path
from torch.distributed.tensor import DTensor

out, logs = Path(sys.argv[1]), Path(sys.argv[2])
changes = json.loads(sys.argv[3])
run = runs.trainer(out, logs, parallel="fsdp2", gradient_checkpointing=True, **changes)
layers = run.model.base_model.layers
frozen = {n: p for n, p in layers.named_parameters() if "lora_" not in n}
found = {
    "sharded": all(isinstance(p, DTensor) for p in frozen.values()),
    "here": sum(p.to_local().numel() for p in frozen.values()),
    "whole": sum(p.numel() for p in frozen.values()),
    "trained_is_whole": not any(isinstance(p, DTensor) for p in run.parameters),
}
run.run()
found["sharded_after"] = all(isinstance(p, DTensor) for p in layers.parameters() if not p.requires_grad)
if run.processes.main:
    (out / "found.json").write_text(json.dumps(found))
run.close()
"""


def test_fsdp2_holds_half_of_the_layers_and_equals_one_process(
    tmp_path: Path, logs: Path, expected: Path
) -> None:
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    environment = runs.environment()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path), str(logs), json.dumps(CHANGES)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sharded"] and found["sharded_after"] and found["trained_is_whole"]
    assert found["here"] == found["whole"] / 2
    assert_same(tmp_path, expected)


def test_sigterm_stops_both_and_saves(tmp_path: Path, logs: Path) -> None:
    """Both processes stop after the same step, though only one of them got the signal."""
    recipe = runs.write_recipe(tmp_path, logs, steps=100_000, save_every=100_000, eval_every=100_000)
    out = tmp_path / "out"
    process = subprocess.Popen(
        runs.command(recipe, out, processes=2),
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("the processes of torchrun cannot be found on this system")
    os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
    process.communicate(timeout=60)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["counters"][0]
    assert saved == log_of(out)[-1]["step"] >= 3


def test_checkpointing_is_asked_for_by_a_name_that_warns_of_nothing() -> None:
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_memory(model)
    assert all(layer.gradient_checkpointing and layer.training for layer in decoder_layers(model))
    assert not model.training, "dropout stays off"
