"""vLLM with a tiny model and our connector, started once; without its environment these tests are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_contract import CONTEXT, compressor_of
from tiny import tiny_model, tiny_tokenizer
from vllm_servers import PYTHON, Vllm, kv_transfer, serving

#: vLLM's attention on CPUs takes heads of 32 or more.
SHAPE = {"head_dim": 32}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if not PYTHON.exists():
                item.add_marker(pytest.mark.skip(reason="vLLM's environment is not there: make vllm-env"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def compressor():
    return compressor_of(model=SHAPE)


def saved(folder: Path, tokenizer, context: int = CONTEXT) -> Path:
    """The tiny model of these tests, in this folder."""
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": context, **SHAPE}
    tiny_model(**shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    """The model that :func:`compressor` has."""
    return saved(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="session")
def url(tmp_path_factory) -> str:
    """The store that vLLM reads."""
    return f"sqlite://{tmp_path_factory.mktemp('store')}/turns.db"


@pytest.fixture(scope="session")
def vllm(folder, url, tmp_path_factory) -> Iterator[Vllm]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    with serving(folder, log, "--max-model-len", str(CONTEXT), kv=kv_transfer(url)) as server:
        yield server
