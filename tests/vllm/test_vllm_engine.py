"""The engine that generates in vLLM: the contract of all engines, whose answers are those of sessions."""

from __future__ import annotations

import pytest
from engine_contract import SIZES, EngineContract

from ccm.methods import as_method
from ccm.serving.store import Limits, open_store
from ccm.serving.vllm.client import VllmServer
from ccm.serving.vllm.engine import VllmEngine


@pytest.fixture
def make(compressor, tokenizer, vllm, url):
    def make(rows=4, waiting=16, **sizes):
        store = open_store(url, Limits(ttl=3600))
        method = as_method(compressor, tokenizer, **SIZES | sizes)
        return VllmEngine(method, tokenizer, VllmServer(vllm.url), store, rows=rows, waiting=waiting)

    return make


class TestVllm(EngineContract):
    pass
