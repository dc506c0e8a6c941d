"""Slices of training on a machine without network: bundles, what a slice leaves, and memory that runs out."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import runs
import torch
from runs import trainer, weights_of
from tiny import saved_folder, tiny_model

from ccm.training.recipe import load_recipe
from ccm.training.stages import Losses, MemoryStage

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
ROWS = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_logs(tmp_path_factory.mktemp("logs"))


def bundles(folder: Path, most: int = 40_000, rows: bytes = ROWS) -> list[Path]:
    """A tiny model without its weights, code that is a word, and rows that do not compress."""
    from pieces import OTHERS, archive, below, write_bundles

    model = folder / "model"
    if not model.exists():
        saved_folder(model)
        (model / "model.safetensors").unlink()
    hard = random.Random(0).randbytes(50_000)
    files = {
        "code.tar": (archive([("src/word.py", b"word")]), OTHERS),
        "model.tar": (archive(below(model)), OTHERS),
        "rows.pack": (rows + hard, {**OTHERS, "chunk": 20_000}),
    }
    return write_bundles(files, folder / "bundles", [GPU / "slice.py"], most)


def receive(bundle: Path, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GPU / "slice.py"), "receive", str(bundle), "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True)


def test_bundles_arrive_as_they_were_sent(tmp_path: Path) -> None:
    folders = bundles(tmp_path)
    assert len(folders) > 1
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 40_000
    root = tmp_path / "root"
    *early, last = [receive(folder, root) for folder in reversed(folders)]  # in any order
    assert all("still missing: bundle 1" in done.stdout for done in early)
    assert last.returncode == 0 and "weights: random" in last.stdout, last.stderr
    assert (root / "rows.pack").read_bytes() == ROWS + random.Random(0).randbytes(50_000)
    assert (root / "code/src/word.py").read_text() == "word"
    from slice import MODEL
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(root / MODEL).config.vocab_size > 90


def test_a_slice_does_not_wait_for_torch() -> None:
    told = "import slice, state, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], env={"PYTHONPATH": str(GPU)}).returncode == 0


#: Hides every package but those of a machine that holds torch, transformers, peft and what they need.
BARE = """
import re, sys
from importlib import metadata
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def named(name):
    return re.sub("[-_.]+", "-", name).lower()

there, asked = set(), ["torch", "transformers", "peft"]
while asked:
    name = named(asked.pop())
    if name not in there:
        there.add(name)
        try:
            needs = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:  # such as the libraries of a GPU
            continue
        asked += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
owners = metadata.packages_distributions()
hidden = {top for top, names in owners.items() if not there & set(map(named, names))} - {"ccm"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_a_slice_needs_no_package_that_its_machine_lacks() -> None:
    used = "import bench, held_out, ccm.cli.bench, ccm.training.trainer; print('all there')"
    done = subprocess.run(
        [sys.executable, "-c", f"{BARE}\n{used}\nimport gguf"],
        env={**runs.environment(), "PYTHONPATH": f"{GPU}:{GPU.parent}:{GPU.parents[1] / 'src'}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "all there\n", done.stderr
    assert done.stderr.endswith("No module named 'gguf'\n"), "the control: it would be there"


def test_what_changed_is_made_anew_and_nothing_else(tmp_path: Path) -> None:
    from pieces import receive as take

    root = tmp_path / "root"
    (folder,) = bundles(tmp_path, most=10_000_000)
    assert take(folder, root) == ({"code.tar", "model.tar", "rows.pack"}, [])
    assert take(folder, root) == (set(), [])
    (folder,) = bundles(tmp_path, most=10_000_000, rows=b"others")
    assert take(folder, root) == ({"rows.pack"}, [])
    assert (root / "rows.pack").read_bytes().startswith(b"others")


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "other"])
def test_a_damaged_bundle_is_refused(damage: str, tmp_path: Path) -> None:
    (folder,) = bundles(tmp_path, most=10_000_000)
    piece = max(folder.glob("*.xz"), key=lambda path: path.stat().st_size)
    content = piece.read_bytes()
    if damage == "flip":
        piece.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "cut":
        piece.write_bytes(content[:-5])
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        for path in folder.glob("*.xz"):
            path.unlink()
    done = receive(folder, tmp_path / "root")
    assert done.returncode == 2 and not (tmp_path / "root" / "rows.pack").exists()
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert (piece.name if damage in ("flip", "cut") else "manifest.json") in done.stderr


def test_only_bundles_are_overwritten(tmp_path: Path) -> None:
    from pieces import BundleError

    (tmp_path / "bundles" / "mine").mkdir(parents=True)
    with pytest.raises(BundleError, match="something else than bundles"):
        bundles(tmp_path)
    assert (tmp_path / "bundles" / "mine").exists()


def test_quantized_weights_come_out_as_gguf_has_them(tmp_path: Path) -> None:
    from weights import pack, unpack

    model = tiny_model(hidden_size=64, intermediate_size=96)
    back = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    config, expected = model.config, {}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name, weight in model.named_parameters():
        inner = name.removeprefix("model.layers.0.").removesuffix(".weight")
        if inner not in back:
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if "k_proj" in name else gguf.GGMLQuantizationType.Q4_1
        stored = weight.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if count := heads.get(inner.rpartition(".")[2]):  # as llama.cpp's converter orders the rows
            stored = stored.reshape(count, 2, -1, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
        blocks = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
        floats = gguf.quants.dequantize(blocks, kind)
        if count:
            floats = floats.reshape(count, -1, 2, floats.shape[1]).swapaxes(1, 2).reshape(floats.shape)
        expected[name] = torch.from_numpy(floats.copy())
        writer.add_tensor(f"blk.0.{back[inner]}.weight", blocks, raw_dtype=kind)
    expected["model.norm.weight"] = model.model.norm.weight.detach()
    writer.add_tensor("output_norm.weight", expected["model.norm.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "packed").write_bytes(pack(tmp_path / "a.gguf", config))
    got = unpack(tmp_path / "packed")
    assert got.keys() == expected.keys() and len(got) == 4
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def test_training_gets_what_the_fixed_shares_leave() -> None:
    from slice import CLOSE, EVALUATE, OTHER, START, Clock, minutes_of_training, smaller_steps

    clock = Clock(560.0, started=0.0)
    assert clock.left() == 0.0  # long over
    assert clock.end == 560.0
    left = 560.0 - CLOSE - EVALUATE
    assert minutes_of_training(left, 7.0) == pytest.approx(min(7.0, (left - START) * (1 - OTHER) / 60))
    assert minutes_of_training(left, 2.0) == 2.0
    assert minutes_of_training(START - 1, 7.0) == 0.0
    assert smaller_steps({}) == {}
    assert smaller_steps({"tokens_per_batch": 4096, "fits": None}) == {}
    assert smaller_steps({"tokens_per_batch": 4096, "fits": 8192}) == {}
    assert smaller_steps({"tokens_per_batch": 40960, "fits": 8192}) == {"tokens_per_batch": 8192}


def test_no_size_is_tried_that_will_not_fit() -> None:
    from bench import fitting

    taken = {"tokens_per_batch": 4096, "held_bytes": 10 * 2**30, "step_bytes": 8 * 2**30}
    assert fitting(taken, 80 * 2**30) == 31744  # of 62 GB at 2 MB a token
    assert fitting(taken, 20 * 2**30) == 4096


def test_steps_are_measured(tmp_path: Path, logs: Path, capsys: Any) -> None:
    from bench import STEPS, main

    recipe, out = runs.write_recipe(tmp_path, logs), tmp_path / "bench.json"
    assert main([str(recipe), "tokens_per_batch=512", "--seconds", "0", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["ended"] == "no time left for a larger step" and found["fits"] is None
    (size,) = found["sizes"]
    assert size["tokens_per_batch"] == 512 and 100 < size["tokens"] <= 512 and size["tokens_per_second"] > 0
    assert STEPS > 4 and "tokens_per_second" in capsys.readouterr().out
    assert main([str(recipe), "tokens_per_batch=0", "--out", str(out)]) == 2
    assert "tokens_per_batch" in capsys.readouterr().err


def test_what_a_slice_leaves_goes_on(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import state
    from bundle import start
    from pieces import BundleError

    trainer(tmp_path / "run", logs).run()
    before = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    monkeypatch.setattr(state, "FILE", 40_000)
    assert "too many" not in state.leave(tmp_path / "run", tmp_path / "out")
    files = list((tmp_path / "out").iterdir())
    assert max(path.stat().st_size for path in files) <= 40_000 and 3 < len(files) <= 8
    adapter, begun = start(tmp_path / "out")
    assert b"adapter_model.safetensors" in adapter and begun is not None and b"checkpoint.pt" in begun
    state.restore(tmp_path / "out", tmp_path / "next")
    state.begin_anew(tmp_path / "next" / "checkpoint.pt", {})
    going_on = trainer(tmp_path / "next", logs)
    assert (going_on.step, going_on.progress) == (6, 0.0) and going_on.best == before["counters"][3]
    for got, expected in zip(going_on.parameters, before["parameters"], strict=True):
        assert torch.equal(got, expected)
    (moments, *_), (expected, *_) = going_on.optimizer.state.values(), before["optimizer"]["state"].values()
    assert moments["exp_avg"].dtype == torch.float32 and float(moments["step"]) == 6
    torch.testing.assert_close(moments["exp_avg"], expected["exp_avg"], rtol=2**-7, atol=0)
    going_on.run()
    assert going_on.step == 12
    part = tmp_path / "out" / "left.0"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(BundleError, match="damaged"):
        state.restore(tmp_path / "out", tmp_path / "other")


def test_a_state_that_is_too_large_leaves_without_moments_or_stays(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import state

    trainer(tmp_path / "run", logs).run()
    sizes = [len(state.slim(tmp_path / "run" / "checkpoint.pt", moments)) for moments in (True, False)]
    log = len((tmp_path / "run" / "log.jsonl").read_bytes())
    adapter = sum(path.stat().st_size + 1024 for path in (tmp_path / "run" / "adapter").rglob("*"))
    most = sizes[1] + log + adapter + 12_000
    assert most < sizes[0] + adapter
    monkeypatch.setattr(state, "FILE", most // 4)
    assert "no moments" in state.leave(tmp_path / "run", tmp_path / "out")
    state.restore(tmp_path / "out", tmp_path / "next")
    going_on = trainer(tmp_path / "next", logs)
    assert going_on.step == 6 and not going_on.optimizer.state
    monkeypatch.setattr(state, "FILE", (adapter + log + 12_000) // 4)
    assert "no state" in state.leave(tmp_path / "run", tmp_path / "out")


def test_minutes_stand_in_for_the_recipes(tmp_path: Path, logs: Path, capsys: Any) -> None:
    from ccm import cli

    recipe = runs.write_recipe(tmp_path, logs)
    assert load_recipe(recipe).minutes == 0
    assert cli.main(["train", str(recipe), "--minutes", "2.5", "--show"]) == 0
    assert "minutes: 2.5\n" in capsys.readouterr().out


# ---------------------------------------------------------------------- memory runs out


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Passes of more rows run out of memory and leave gradients; returns the sizes that were tried."""
    prepare, run, tried = MemoryStage.prepare, MemoryStage.run, []

    def counted(stage: MemoryStage, rows: Sequence[Any], draw: random.Random) -> Any:
        return len(rows), prepare(stage, rows, draw)

    def short(stage: MemoryStage, prepared: Any) -> Losses:
        rows, prepared = prepared
        tried.append(rows)
        found = run(stage, prepared)
        if rows > most:
            found.loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(MemoryStage, "prepare", counted)
    monkeypatch.setattr(MemoryStage, "run", short)
    return tried


def test_a_step_without_memory_goes_on_in_halves_with_the_same_result(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # parts have the budgets of the whole
    settings = {"rows": 5, "accumulate": 2, "steps": 3, "rule_choices": ["concat", "mean"]}
    whole = trainer(tmp_path / "whole", logs, **settings)
    whole.run()
    tried = limited(monkeypatch, 2)
    split = trainer(tmp_path / "split", logs, **settings)
    split.run()
    assert split.parts == 4 and max(tried[3:]) <= 2  # found out once
    assert [record.message for record in caplog.records if "out of memory" in record.message] == [
        "out of memory at step 0: batches run in 2 parts from now on",
        "out of memory at step 0: batches run in 4 parts from now on",
    ]
    expected, got = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "split")
    )
    for one, other in zip(expected, got, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-4) and other["tokens"] == one["tokens"]
    for one, other in zip(weights_of(tmp_path / "whole"), weights_of(tmp_path / "split"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_row_without_memory_fails_as_before(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from ccm import cli

    tried = limited(monkeypatch, 0)
    assert cli.main(["train", str(runs.write_recipe(tmp_path, logs)), "--out", str(tmp_path / "out")]) == 2
    assert "error: out of memory at step 0" in capsys.readouterr().err and tried == [2, 1]
