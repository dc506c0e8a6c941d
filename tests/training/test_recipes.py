"""Recipes: what they accept, what they say about mistakes, and that those of the repository are right."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ccm import cli
from ccm.core.config import CompressorConfig
from ccm.data.sources import option_names, source_class
from ccm.errors import ConfigError
from ccm.training import TrainConfig, load_recipe
from ccm.training.recipe import dump

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_an_empty_recipe_has_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, "")) == TrainConfig()


def test_every_type_is_read(tmp_path: Path) -> None:
    text = """
    compressor: {slots: 8, target_modules: [q_proj, v_proj], rule_options: {}}
    data: {chitchat: , jsonl: {path: logs, weight: 2}}
    lr: 1e-3
    minutes: 5
    slot_choices: [2, 8]
    bf16: false
    base_adapter: null
    require: {recovered_share: 0.5}
    """
    assert load_recipe(recipe(tmp_path, text)) == TrainConfig(
        compressor=CompressorConfig(slots=8, target_modules=("q_proj", "v_proj")),
        data={"chitchat": {}, "jsonl": {"path": "logs", "weight": 2}},
        lr=0.001,
        minutes=5.0,
        slot_choices=(2, 8),
        bf16=False,
        require={"recovered_share": 0.5},
    )


def test_overrides_reach_inside_and_win(tmp_path: Path) -> None:
    path = recipe(tmp_path, "steps: 10\ncompressor: {slots: 2, rank: 4}\n")
    got = load_recipe(path, ["compressor.slots=8", "data.jsonl.path=a=b", "slot_choices=[1, 8]", "lr=5e-4"])
    assert got.compressor == CompressorConfig(slots=8, rank=4)
    assert (got.steps, got.slot_choices, got.lr) == (10, (1, 8), 5e-4)
    assert got.data == {"jsonl": {"path": "a=b"}}


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("stpes: 3", [], ["stpes", "did you mean steps?"]),
        ("compressor: {slot: 3}", [], ["compressor.slot", "compressor.slots"]),
        ("steps: many", [], ["steps", "'many'", "whole number"]),
        ("steps: 1.5", [], ["steps", "1.5", "whole number"]),
        ("steps: true", [], ["steps", "True", "whole number"]),
        ("bf16: 1", [], ["bf16", "true or false"]),
        ("lr: fast", [], ["lr", "'fast'", "a number"]),
        ("lr: 0", [], ["lr", "more than 0"]),
        ("model: 3", [], ["model", "text or null"]),
        ("slot_choices: 4", [], ["slot_choices", "list of a whole number"]),
        ("slot_choices: [1, x]", [], ["slot_choices[1]", "'x'"]),
        ("rule_choices: [conca]", [], ["rule", "conca", "concat"]),
        ("slot_choices: [9]", [], ["slot_choices", "9", "compressor.slots = 4"]),
        ("window_choices: [-1]", [], ["window_choices", "0 or more"]),
        ("compressor: 4", [], ["compressor", "keys with values"]),
        ("compressor: {rank: 0}", [], ["rank", "0"]),
        ("data: {}", [], ["data", "ccm data list"]),
        ("data: {chitchat: {weight: 0}}", [], ["data.chitchat.weight", "above 0"]),
        ("data: [chitchat]", [], ["data", "keys with values"]),
        ("objective: luck", [], ["objective", "luck", "target-ce"]),
        ("stage: middle", [], ["stage", "middle"]),
        ("parallel: magic", [], ["parallel", "magic"]),
        ("stage: base\nbase_adapter: x", [], ["stage", "base_adapter"]),
        ("resegment: 2", [], ["resegment", "share"]),
        ("- 1", [], ["expected keys"]),
        ("a: [", [], ["no YAML"]),
        ("", ["steps"], ["steps", "key=value"]),
        ("steps: 3", ["steps.a=1"], ["steps.a=1", "no keys inside"]),
        ("", ["steps=["], ["steps=[", "no YAML"]),
    ],
)
def test_mistakes_name_file_and_key(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    for word in [*words, *([] if overrides else ["recipe.yaml"])]:
        assert word in str(caught.value)


def test_a_missing_recipe_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "none.yaml" in err and "No such file" in err


def test_show_prints_every_setting_and_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "slot_choices: [1, 2]")
    assert cli.main(["train", str(path), "compressor.rank=3", "--show"]) == 0
    shown = capsys.readouterr().out
    assert set(yaml.safe_load(shown)) == {field.name for field in dataclasses.fields(TrainConfig)}
    again = recipe(tmp_path, shown)
    assert load_recipe(again) == TrainConfig(slot_choices=(1, 2), compressor=CompressorConfig(rank=3))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_right(path: Path) -> None:
    config = load_recipe(path)
    assert load_recipe(path) == config and yaml.safe_load(dump(config))
    for name in config.data:
        assert set(config.options(name)) <= set(option_names(source_class(name)))


def test_there_are_the_recipes_that_the_documentation_names() -> None:
    assert {"cpu-minutes", "cpu-hours", "one-gpu", "multi-gpu"} <= {path.stem for path in RECIPES}


def test_the_recipe_in_the_documentation_is_right(tmp_path: Path) -> None:
    text = (RECIPES[0].parent.parent / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    path = recipe(tmp_path, block)
    assert set(load_recipe(path).data) == {"jsonl"}
    for line in re.findall(
        r"^\s*(?:\S+=\S+ )*(?:ccm|torchrun .* -m ccm) train chats\.yaml(.*)$", text, re.MULTILINE
    ):
        overrides = [
            word for word in re.sub(r"--(?:out|load-in|device|dtype) \S+|--\w+|#.*", "", line).split()
        ]
        assert load_recipe(path, overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cpu_minutes_learns_what_it_requires(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "cpu-minutes.yaml"
    command = [sys.executable, "-m", "ccm", "train", str(path), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # 1 is a share below what the recipe requires
    report = json.loads(done.stdout)
    assert report["recovered_share"] >= load_recipe(path).require["recovered_share"] > 0.5
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
