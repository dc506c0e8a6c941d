"""Headers of GGUF files: read once, whoever asks, and what they say of a model's heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from tiny import tiny_model, tiny_tokenizer

import ccm
from ccm.core.reader import Reader
from ccm.models.header import read_once
from ccm.models.load import load_config
from ccm.models.options import Loading
from ccm.serving.llama import hollow


def written(path: Path, family: str = "llama", **changes: Any) -> tuple[str, Any]:
    """A tiny model as a file."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ab"])  # what the only merge of these files makes
    model = tiny_model(family, vocab_size=len(tokenizer), **changes)
    write_gguf(path, model, tokenizer, family)
    return str(path), model


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that gguf has read, one for each reading."""
    done, read = [], gguf.GGUFReader.__init__

    def noted(self: gguf.GGUFReader, path: str, mode: str = "r") -> None:
        done.append(Path(path).name)
        read(self, path, mode)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", noted)
    return done


def test_tokenizer_config_and_weights_come_from_one_reading(tmp_path: Path, readings: list[str]) -> None:
    one, _ = written(tmp_path / "one.gguf")
    ccm.load_model(one)
    assert readings == ["one.gguf"]
    model, _ = hollow.load(Loading(one, dtype="auto", device="cpu"))
    hollow.read(Reader(model), one, [1, 2, 3])
    assert readings == ["one.gguf"] * 2
    (tmp_path / "copy.gguf").write_bytes(Path(one).read_bytes())
    model, _ = hollow.load(Loading(one, dtype="auto", device="cpu"))
    hollow.read(Reader(model), str(tmp_path / "copy.gguf"), [1, 2, 3])
    assert readings[2:] == ["one.gguf", "copy.gguf"]
    ccm.load_model(one)
    assert readings[4:] == ["one.gguf"], "nothing is kept: the file may be another by then"


def test_gguf_is_as_before_behind_a_shared_reading(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "m.gguf")
    plain, before = gguf.GGUFReader(path), gguf.GGUFReader
    with pytest.raises(ZeroDivisionError), read_once():
        shared = gguf.GGUFReader(path)
        with read_once():
            assert gguf.GGUFReader(tmp_path / "." / "m.gguf") is shared
        assert gguf.GGUFReader(path) is shared and isinstance(shared, before)
        raise ZeroDivisionError
    assert gguf.GGUFReader is before and gguf.GGUFReader(path) is not shared
    assert list(shared.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert shared.fields[name].contents() == field.contents()
    for one, other in zip(shared.tensors, plain.tensors, strict=True):
        assert one.name == other.name and np.array_equal(one.data, other.data)


@pytest.mark.parametrize(("family", "width"), [("qwen3", 16), ("qwen3", 128), ("qwen3", None), ("llama", 16)])
def test_heads_are_as_wide_as_the_file_says(tmp_path: Path, family: str, width: int | None) -> None:
    """transformers takes all heads of qwen3 for 128 wide."""
    path, model = written(tmp_path / "m.gguf", family, **({} if width is None else {"head_dim": width}))
    loaded, _ = ccm.load_model(path)
    empty, _ = hollow.load(Loading(path, dtype="auto", device="cpu"))
    assert (
        load_config(path).head_dim == loaded.config.head_dim == empty.config.head_dim == model.config.head_dim
    )
    ids = torch.tensor([[3, 1, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(empty(ids).logits, model(ids).logits)
