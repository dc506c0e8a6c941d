"""Fixtures of tests that make services: a module names this file in ``pytest_plugins``."""

from __future__ import annotations

import pytest
from services import SIZES
from tiny import tiny_compressor, tiny_tokenizer

from ccm.methods import as_method
from ccm.serving.engine import PaddedEngine
from ccm.serving.service import Service, Settings
from ccm.serving.store import open_store


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compressor(tokenizer):
    return tiny_compressor(model={"vocab_size": len(tokenizer), "max_position_embeddings": 512})


@pytest.fixture
def make(compressor, tokenizer, tmp_path):
    """Services on one store file."""
    made = []

    def service(limits=None, compressor=compressor, rows=4, **settings):
        store = open_store(f"sqlite://{tmp_path}/memories.db", limits)
        method = as_method(compressor, tokenizer, **SIZES)
        engine = PaddedEngine(method, tokenizer, rows=rows)
        made.append(Service(method, tokenizer, store, Settings("tiny", **settings), engine))
        return made[-1]

    yield service
    for service in made:
        service.close()


@pytest.fixture
def service(make):
    return make()
