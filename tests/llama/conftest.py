"""A tiny model as a GGUF file; without llama-cpp-python the tests that run one are skipped (``make test-llama``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from engine_contract import CONTEXT, compressor_of
from gguf_files import write_gguf
from tiny import tiny_model, tiny_tokenizer

#: Heads that hold whole blocks of quantized numbers.
SHAPE = {"hidden_size": 128}


@pytest.fixture(scope="session")
def runs() -> None:
    """Tests that need llama.cpp itself ask for this."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not there: make llama-env")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def compressor():
    return compressor_of(model=SHAPE)


@pytest.fixture(scope="session")
def gguf(tmp_path_factory, tokenizer) -> Path:
    """The model that :func:`compressor` has."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **SHAPE}
    write_gguf(path, tiny_model(**shape), tokenizer)
    return path
