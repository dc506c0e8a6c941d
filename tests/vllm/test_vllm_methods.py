"""Methods without an adapter behind a real vLLM: the answers of sessions, token for token."""

from __future__ import annotations

import pytest
from engine_contract import check_many_at_a_time
from method_cases import NAMES, small_method

from ccm.methods.base import METHODS
from ccm.methods.compressed import Trained
from ccm.models.load import load_model
from ccm.serving.store import Limits, open_store
from ccm.serving.vllm.client import VllmServer
from ccm.serving.vllm.engine import VllmEngine


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "float32", "cpu")[0]


@pytest.mark.parametrize(
    "name", [n for n in NAMES if METHODS[n].plain and not issubclass(METHODS[n], Trained)]
)
def test_an_answer_is_that_of_a_session(name, model, tokenizer, vllm, url):
    method = small_method(name, {}).bind(model, tokenizer)
    store = open_store(url, Limits(ttl=3600))
    engine = VllmEngine(method, tokenizer, VllmServer(vllm.url), store, rows=4, waiting=16)
    try:
        check_many_at_a_time(engine, method, tokenizer)
    finally:
        engine.close()
