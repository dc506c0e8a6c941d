"""From nothing to an adapter: recipes that are written for a model and a machine, and what a run is said to take."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs
import torch
import transformers as hf
import yaml
from tiny import saved_folder

from ccm import cli
from ccm.data.sources import option_names, source_class
from ccm.errors import ConfigError, UnsupportedModelError
from ccm.training import TrainConfig, load_recipe, starter
from ccm.training.estimate import BUDGET, GROWTH, Line, Measured, Sample, foresee, measure
from ccm.training.starter import DATA, Fit, Machine, fit, write_recipe

GB = 10**9
GPU, CPU = Machine("cuda", "a GPU", 80 * GB, True), Machine("cpu", "4 CPU threads", 16 * GB, False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_logs(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def own_data(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat logs in place of the public data."""
    monkeypatch.setattr(starter, "DATA", runs.data(logs))


def llama(**sizes: int) -> Any:
    """A config of some billions of parameters; no weights are made for it."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128_000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return hf.LlamaConfig(**{**shape, **heads, "max_position_embeddings": 8192, **sizes})


def small() -> Any:
    return llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )


# ---------------------------------------------------------------------- sizes


def test_the_public_data_has_the_options_that_the_recipe_names() -> None:
    for name, options in DATA.items():
        assert options.keys() - {"weight"} <= set(option_names(source_class(name)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_grow_with_memory(device: str) -> None:
    fits = []
    for memory in (12, 24, 48, 96, 400):
        try:
            fits.append(fit(llama(), Machine(device, "it", memory * GB, True)))
        except ConfigError:
            assert not fits
    assert len(fits) >= 3
    tokens = [each.tokens / (1 + 9 * each.checkpointing) for each in fits]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]
    assert fits[0].load_in == "4bit" and fits[-1].load_in is None
    assert fits[0].checkpointing and not fits[-1].checkpointing


@pytest.mark.parametrize(
    ("machine", "config", "says"),
    [
        (GPU, small, Fit(65536, 1, False, True, None, None, 0)),
        (CPU, small, Fit(2048, 1, False, False, None, None, 0)),
    ],
)
def test_what_a_run_takes_stays_below_what_is_free(machine: Machine, config: Any, says: Fit) -> None:
    got = fit(config(), machine)
    assert got.nbytes < machine.memory
    assert got == Fit(**{**vars(says), "nbytes": got.nbytes})


def test_passes_that_are_small_for_want_of_memory_are_added_up() -> None:
    tight = fit(llama(), Machine("cuda", "it", 40 * GB, True))
    assert tight.tokens < 8192 and tight.accumulate >= 2
    assert fit(llama(), Machine("cuda", "it", 200 * GB, True)).accumulate == 1


def test_no_pass_is_longer_than_a_short_context() -> None:
    assert fit(llama(max_position_embeddings=512), GPU).tokens <= 384


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.BloomConfig(hidden_size=32, n_layer=2, n_head=2), "ALiBi"),
        (hf.MambaConfig(hidden_size=32, num_hidden_layers=2), "no keys and values"),
    ],
    ids=["bloom", "mamba"],
)
def test_a_family_that_carries_no_memory_is_refused_with_the_reason(config: Any, reason: str) -> None:
    """Their configs have no ``max_position_embeddings``."""
    with pytest.raises(UnsupportedModelError, match=reason):
        fit(config, CPU)


def test_a_checkpoint_in_bfloat16_is_read_as_floats_where_that_is_faster() -> None:
    config = small()
    config.dtype = torch.bfloat16
    assert fit(config, CPU).options == " --dtype float32"
    config.dtype = torch.bfloat16
    assert fit(config, GPU).options == ""


def test_a_model_that_fits_nowhere_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"2\.0 GB are free.*GB even with layers in 4bit"):
        fit(llama(), Machine("cuda", "it", 2 * GB, True))


# ---------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_recipe_reads_back_as_what_was_chosen(machine: Machine, model: str, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    chosen = write_recipe(path, model, machine)
    config = load_recipe(path)
    assert config.model == model and config.data == DATA and config.bf16 == machine.bfloat16
    assert (config.tokens_per_batch, config.accumulate) == (chosen.tokens, chosen.accumulate)
    assert config.minutes == (20 if machine is GPU else 60)
    assert f"ccm train {path}{chosen.options} --estimate" in path.read_text()


def test_what_cannot_be_fetched_is_left_out_and_named(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.which", lambda name: None if name == "npm" else name)
    write_recipe(tmp_path / "a.yaml", model, CPU)
    text = (tmp_path / "a.yaml").read_text()
    without = [name for name in sorted(DATA) if "npm" in {a.registry for a in source_class(name).archives}]
    assert without and yaml.safe_load(text)["data"].keys() == DATA.keys() - set(without)
    assert f"want of a program that fetches them: {', '.join(without)}." in text


def test_short_contexts_get_short_rows(tmp_path: Path) -> None:
    write_recipe(tmp_path / "a.yaml", saved_folder(tmp_path / "m"), CPU)
    assert load_recipe(tmp_path / "a.yaml").data["chitchat"]["turns"] == [10]


def test_without_a_model_it_says_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = Fit(2048, 1, False, False, None, None, 1)
    monkeypatch.setattr("ccm.training.starter.write_recipe", lambda *_: written)
    assert cli.main(["train", "--init", "--device", "cpu", "--out", str(tmp_path / "a.yaml")]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("for the embedded SmolLM2-135M-Instruct, as no model is named, on ")
    assert " GB free: 2,048 tokens a pass" in said


def test_written_estimated_and_trained(
    own_data: None,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    path = str(tmp_path / "new.yaml")
    assert cli.main(["train", "--init", model, "--out", path]) == 0
    said, then = capsys.readouterr().out.splitlines()
    assert said.startswith(f"for {model}, on ") and said.endswith(" tokens a pass")
    assert then.startswith(f"{path} is written; next: ccm train {path}")
    once = ["minutes=0", "steps=2", "eval_rows=1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main(["train", path, *once, "--estimate", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)["sections"]
    figures = {figure["name"]: figure["value"] for part in sections.values() for figure in part}
    assert figures["steps"] == 2 and figures["peak"] < figures["free"]
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", path, *once]) == 0
    capsys.readouterr()
    last = runs.log_of(tmp_path / "run")[-1]
    assert last["step"] == 2
    assert figures["tokens"] == pytest.approx(last["tokens"], rel=0.5)
    size = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
    assert size < figures["disk"]
    assert cli.main(["train", path, *once, "stage=base", "--estimate"]) == 0
    shown = capsys.readouterr().out
    assert "tokens a second" in shown and "measured" in shown
    assert not [str(seen.message) for seen in recwarn if "deprecated" in str(seen.message)]


def test_the_embedded_model_needs_no_name(
    own_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--init", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["recipe"] == "SmolLM2-135M-Instruct.yaml"
    config = load_recipe("SmolLM2-135M-Instruct.yaml")
    assert config.model is None and config.tokens_per_batch == written["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--init", "no-such-model"], "no model 'no-such-model'"),
        (["--init", "GPT2"], "'gpt2' is not supported"),
        (["--init", "MODEL", "--out", "THERE"], "is there already"),
        (["--init", "MODEL", "--out", "THERE/below.yaml"], "cannot write"),
        (["--init", "MODEL", "steps=3"], "leave the rest"),
        (["--init", "MODEL", "--estimate"], "leave the rest"),
        (["--init", "MODEL", "--device-map", "auto"], "--device-map"),
        (["--init", "MODEL", "--device", "cuda:9"], "cuda:9"),
        ([], "--init MODEL"),
        (["--estimate"], "--init MODEL"),
        (["THERE", "model=no-such-model", "--estimate"], "no model 'no-such-model'"),
        (["THERE", "model=GPT2", "--estimate"], "'gpt2' is not supported"),
        (["THERE", "data.jsonl.path=nowhere", "--estimate"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    words: str,
    model: str,
    logs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hf.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20).save_pretrained("gpt2")
    there = runs.write_recipe(tmp_path, logs)
    before = there.read_text()
    names = {"MODEL": model, "GPT2": "gpt2", "THERE": str(there)}
    for name, real in names.items():
        arguments = [word.replace(name, real) for word in arguments]
    files = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert not out and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert there.read_text() == before and sorted(tmp_path.rglob("*")) == files


def test_too_little_memory_is_said_before_the_weights_are_read(
    model: str,
    logs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    monkeypatch.setattr("ccm.models.load.load_model", lambda *args, **more: pytest.fail("read"))
    recipe = str(runs.write_recipe(tmp_path, logs))
    capsys.readouterr()
    for arguments in ([recipe, "--estimate"], ["--init", model, "--out", str(tmp_path / "new.yaml")]):
        assert cli.main(["train", *arguments, "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "too little memory" in err
    assert not (tmp_path / "new.yaml").exists()


def test_several_processes_are_not_measured(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", str(runs.write_recipe(tmp_path, logs)), "--estimate", "--device", "cpu"]) == 2
    assert "without torchrun" in capsys.readouterr().err


# ---------------------------------------------------------------------- the arithmetic


class Pass:
    """A row of some tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens


class Clockwork:
    """A trainer whose passes take what a line says, by a clock of its own."""

    def __init__(self, base: float, slope: float):
        self.now, self.line, self.sizes = 0.0, Line(base, slope), []
        self.processes = type("Processes", (), {"device": torch.device("cpu")})
        self.stage, self.parts = None, 1

    def clock(self) -> float:
        return self.now

    def train_step(self, batches: Any) -> None:
        size = sum(row.tokens for row in next(batches))
        self.sizes.append(size)
        self.now += self.line.at(size)


def batches(count: int = 16) -> list[list[Pass]]:
    draw = random.Random(0)
    return [[Pass(length)] * 5 for length in draw.choices((200, 400, 600), k=count)]


def measured(**changes: Any) -> Measured:
    samples = tuple(Sample(n, 0.5 + 0.01 * n, GB + 2_000_000 * n) for n in (200, 1000, 1500))
    given = {"batches": ((1000, 1200), (2000, 2000)), "drawing": 0.5, "start": 60.0, "evaluation": 90.0}
    return Measured(**{"samples": samples, **given, "parameters": 1_000_000, "held": GB, **changes})


def test_steps_that_are_measured_grow_until_the_time_is_spent() -> None:
    fast = Clockwork(0.1, 0.0005)
    given = batches()
    samples = list(measure(fast, given, fast.clock))  # type: ignore[arg-type]
    assert fast.sizes[:2] == [200, 200] and samples[0].tokens == 200
    assert samples[1].tokens <= GROWTH * 200
    assert len(samples) > 10 and max(s.tokens for s in samples) == max(
        sum(r.tokens for r in b) for b in given
    )
    line = Line.through([(sample.tokens, sample.seconds) for sample in samples])
    assert (line.base, line.slope) == (pytest.approx(0.1), pytest.approx(0.0005))
    slow = Clockwork(0.0, 0.05)  # ten seconds for the shortest row
    samples = list(measure(slow, given, slow.clock))  # type: ignore[arg-type]
    assert len({sample.tokens for sample in samples}) == 2 and slow.now <= 3 * BUDGET


def test_nothing_is_tried_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Growing:
        nbytes = 0

        def __init__(self, device: Any):
            pass

        def __enter__(self) -> Growing:
            return self

        def __exit__(self, *error: object) -> None:
            self.nbytes = 1_000_000 * fast.sizes[-1]

    fast = Clockwork(0.1, 0.0005)
    monkeypatch.setattr("ccm.training.estimate.Peak", Growing)
    monkeypatch.setattr("ccm.training.estimate.held", lambda device: 0)
    monkeypatch.setattr(Machine, "here", lambda device: Machine("cpu", "it", 1_700_000_000, False))
    list(measure(fast, batches(), fast.clock))  # type: ignore[arg-type]
    assert 1000 < max(fast.sizes) <= 1700


def test_hours_tokens_and_memory_follow_from_the_line(tmp_path: Path) -> None:
    config = TrainConfig(steps=100_000, minutes=60, accumulate=2, eval_every=50)
    plan = foresee(config, measured(), Machine("cpu", "it", 20 * GB, False), tmp_path)
    step = 2 * (0.5 + 0.01 * 1500 + 0.5)
    assert plan["speed"] == pytest.approx(3000 / step)
    assert plan["tokens"] == pytest.approx(3600 / step * 3000, rel=0.01)
    assert plan["steps"] == round(3600 / step) == 112
    assert plan["evaluation"] == pytest.approx(3 * 90 / 3600)
    assert plan["hours"] == pytest.approx(1 + (60 + 270) / 3600)
    assert plan["peak"] == pytest.approx(GB + 2_000_000 * 2000)
    assert plan["free"] == 21 * GB
    assert plan["hours_for_300k"] == pytest.approx(300_000 / plan["speed"] / 3600)
    ends = foresee(TrainConfig(steps=7), measured(), Machine("cpu", "it", 20 * GB, False), tmp_path)
    assert ends["tokens"] == 7 * 1500 and ends["training"] == pytest.approx(7 * (0.5 + 15 + 0.5) / 3600)


@pytest.mark.parametrize(
    ("changes", "memory", "words"),
    [
        ({}, 2 * GB, "set tokens_per_batch=960 or gradient_checkpointing=true"),
        ({"held": 0}, GB, "--load-in 4bit"),
        ({"parameters": 10**16}, 20 * GB, "too little disk"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_what_would(
    changes: dict[str, Any], memory: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        foresee(TrainConfig(), measured(**changes), Machine("cpu", "it", memory, False), tmp_path)


@pytest.mark.parametrize(
    ("points", "base", "slope"),
    [
        ([(1, 3), (2, 5), (3, 7)], 1, 2),
        ([(10, 5)], 0, 0.5),  # one size alone: in proportion
        ([(1, 5), (2, 4)], 4.5, 0),  # noise does not make larger passes cheaper
        ([(1, 1), (2, 5)], 0, 2),  # nor small ones free
    ],
)
def test_lines_neither_fall_nor_begin_below_zero(
    points: list[tuple[float, float]], base: float, slope: float
) -> None:
    line = Line.through(points)
    assert (line.base, line.slope) == (pytest.approx(base), pytest.approx(slope))
