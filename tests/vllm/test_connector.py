"""The connector inside a real vLLM on the CPU, in fp32: its tokens are those of transformers, or there are none."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from engine_contract import CONTEXT, compressor_of
from memories import GREEDY, PROMPT, answer, expected, ids, memory_of, post, put
from servers import redis_server
from vllm_servers import PYTHON, kv_transfer, serving

from ccm.errors import ConfigError
from ccm.methods import as_method
from ccm.serving.engine import EngineError
from ccm.serving.store import Limits, Snapshot, codec, open_store
from ccm.serving.vllm.client import Call, VllmServer
from ccm.serving.vllm.engine import VllmEngine
from ccm.serving.vllm.reference import KEY, Reference

BLOCK = 32

#: Segments and sizes by what is special about them, and the m that they give.
CASES = {
    "slots alone": ([9, 20, 7], {"sink": 0, "window": 0}, 6),
    "sink": ([9, 20, 7], {"sink": 3, "window": 0}, 9),
    "window": ([9, 20, 7], {"sink": 0, "window": 16}, 11),
    "all three": ([9, 20, 7, 5], {"sink": 3, "window": 16}, 19),
    "raw text alone": ([9], {"sink": 0, "window": 16}, 9),
    "one block": ([8] * 16, {"sink": 0, "window": 0}, BLOCK),
    "a block and one": ([1] * 17, {"sink": 1, "window": 0}, BLOCK + 3),
    "several blocks": ([5] * 40, {"sink": 4, "window": 16}, 93),
}


@pytest.fixture(scope="session")
def store(url):
    with open_store(url) as store:
        yield store


@pytest.fixture(scope="session")
def server(vllm):
    return VllmServer(vllm.url)


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_transformers(case, compressor, server, store):
    segments, sizes, length = CASES[case]
    memory = memory_of(compressor, segments, **sizes)
    assert memory.length == length
    for prompt in (PROMPT[:1], PROMPT, ids(70, 7)):
        assert answer(server, put(store, memory), prompt) == expected(compressor, memory, prompt)
    assert expected(compressor, memory) != expected(compressor, None)  # and the memory matters


def test_no_memory(compressor, server):
    assert answer(server, None) == expected(compressor, None)


def test_many_at_a_time(compressor, server, store):
    memories = [memory_of(compressor, [4 + i, 9, 30 - i], seed=i, sink=2, window=i) for i in range(12)]
    references = [put(store, memory) for memory in memories]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda reference: answer(server, reference), references))
    assert answers == [expected(compressor, memory) for memory in memories]


# ------------------------------------------------------------------ isolation


def test_twins_never_read_each_other(compressor, server, store, vllm):
    """Equal prompts and equal lengths, with prefix caching on: what is cached belongs to one memory."""
    twins = [memory_of(compressor, [5] * 20, seed=seed, sink=0, window=0) for seed in (1, 2)]
    want = [expected(compressor, memory) for memory in twins]
    assert want[0] != want[1]
    references = [put(store, memory, tenant) for memory, tenant in zip(twins, ("alice", "bob"), strict=True)]
    assert references[0].length == references[1].length > BLOCK
    for _ in range(3):
        assert [answer(server, reference) for reference in references] == want
    hits = vllm.metric("vllm:prefix_cache_hits_total")
    assert answer(server, references[0]) == want[0]
    assert vllm.metric("vllm:prefix_cache_hits_total") - hits == BLOCK  # the cache is on, and used


def test_without_a_salt_they_would(compressor, folder, url, store, tmp_path):
    """The negative control: the check of the salt left out, one user gets the other's memory."""
    twins = [memory_of(compressor, [5] * 20, seed=seed, sink=0, window=0) for seed in (1, 2)]
    want = [expected(compressor, memory) for memory in twins]
    bodies = []
    for memory in twins:
        reference = put(store, memory)
        bodies.append({"kv_transfer_params": reference.params(), "ignore_eos": True})
    options = ("--max-model-len", str(CONTEXT))
    with serving(folder, tmp_path / "log", *options, kv=kv_transfer(url, "unsalted")) as vllm:
        server = VllmServer(vllm.url)
        prompt = PROMPT[:1] * twins[0].length + PROMPT
        first, second = (answer(server, None, prompt, **body) for body in bodies)
    assert first == want[0]
    assert second != want[1]


# ------------------------------------------------------------------ what cannot be served


def refused(server, vllm, reference, reason, prompt=PROMPT, **options):
    """No token, and the reason in vLLM's log; it goes on serving."""
    before = len(vllm.text())
    parts = server.tokens(prompt, reference, {**GREEDY, **options}, Call())
    with pytest.raises(EngineError, match="its log says why"):
        assert next(parts) is None
    assert reason in vllm.text()[before:]


def test_refusals(compressor, server, store, vllm):
    memory = memory_of(compressor, [9, 20])
    good = put(store, memory)
    other = memory_of(compressor_of(model={"head_dim": 32, "hidden_size": 64}), [9, 20])
    placeholders = PROMPT[:1] * good.length + PROMPT
    unsalted = {"kv_transfer_params": good.params()}
    refused(server, vllm, replace(good, session="nobody's"), "no session")
    refused(server, vllm, replace(good, tenant="bob"), "no session")
    refused(server, vllm, replace(good, version=2), "has no version 2")
    refused(server, vllm, replace(good, length=good.length + 1), "positions, the request has")
    refused(server, vllm, put(store, other), "was made by model")
    for salt in ({}, {"cache_salt": "of my own"}):
        refused(server, vllm, None, "expected the salt of the memory", placeholders, **unsalted, **salt)
    whole = {**asked(good), "prompt": placeholders, "max_tokens": 4, "temperature": 0}
    assert post(vllm.url, whole) == 200
    assert (
        post(vllm.url, {**whole, "prompt_logprobs": 1}) == 500
    )  # vLLM would compute the placeholders themselves
    assert "prompt_logprobs: placeholders have none" in vllm.text()
    refused(server, vllm, None, "at least one more is needed", **asked(good))
    refused(server, vllm, None, "expected tenant", kv_transfer_params={KEY: {"tenant": "alice"}})
    assert answer(server, good) == expected(compressor, memory)


def asked(reference: Reference):
    """What belongs to a request for a memory, but its placeholders."""
    return {"cache_salt": reference.salt, "kv_transfer_params": reference.params()}


def test_more_than_the_context(compressor, server, store):
    memory = memory_of(compressor, [4] * 126, sink=0, window=0)
    with pytest.raises(ConfigError, match=str(CONTEXT)):
        answer(server, put(store, memory), ids(20, 1))


def test_a_damaged_memory(compressor, server, vllm, store):
    session = store.create("alice")
    payload, metadata = codec.encode(memory_of(compressor, [9, 20]))
    broken = payload[:-4] + bytes(4)
    stored = store.commit("alice", session, 0, Snapshot(broken, metadata))
    refused(server, vllm, Reference("alice", session, stored.version, 4), "no usable stored memory")


# ------------------------------------------------------------------ little room, chunks, preemption


def test_preempted_and_in_chunks(compressor, folder, url, store, tmp_path):
    """Ten blocks for eight requests, 16 tokens a step: memories are loaded again, and answers are the same."""
    memories = [memory_of(compressor, [5] * (9 + i), seed=i, sink=3, window=0) for i in range(8)]
    references = [put(store, memory) for memory in memories]
    prompts = [ids(40 + i, i) for i in range(8)]
    options = ("--max-num-batched-tokens", "16", "--max-num-seqs", "8", "--num-gpu-blocks-override", "11")
    context = ("--max-model-len", str(CONTEXT))
    with serving(folder, tmp_path / "log", *options, *context, kv=kv_transfer(url)) as vllm:
        server = VllmServer(vllm.url)

        def ask(i: int) -> list[int]:
            return answer(server, references[i], prompts[i], max_tokens=100)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        assert vllm.metric("vllm:num_preemptions_total") > 0
        # and what is cancelled gives its blocks back, whether it is being loaded, read or written
        calls = [Call() for _ in range(8)]

        def read(i: int) -> None:
            list(server.tokens(prompts[i], references[i], GREEDY | {"max_tokens": 150}, calls[i]))

        threads = [Thread(target=read, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for delay, call in zip((0, 0, 0.1, 0.1, 0.3, 0.3, 0.6, 0.6), calls, strict=True):
            time.sleep(delay / 4)
            call.close()
        for thread in threads:
            thread.join(60)
        deadline = time.monotonic() + 60
        while vllm.metric("vllm:kv_cache_usage_perc") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert vllm.metric("vllm:kv_cache_usage_perc") == 0
        assert vllm.metric("vllm:num_requests_running") + vllm.metric("vllm:num_requests_waiting") == 0
        assert ask(0) == answers[0]
    for i in range(8):
        assert answers[i] == expected(compressor, memories[i], prompts[i], 100)


# ------------------------------------------------------------------ the store


def test_a_store_that_is_not_reachable(compressor, folder, tmp_path):
    """Requests fail while it is away, none is answered without its memory, and all is well when it is back."""
    with redis_server() as redis:
        memory = memory_of(compressor, [9, 20])
        options = ("--max-model-len", str(CONTEXT))
        with serving(folder, tmp_path / "log", *options, kv=kv_transfer(redis.url)) as vllm:
            server = VllmServer(vllm.url)
            reference = put(open_store(redis.url), memory)
            want = expected(compressor, memory)
            assert answer(server, reference) == want
            redis.crash()
            unseen = replace(reference, tenant="bob")
            refused(server, vllm, unseen, "was not loaded")
            redis.start()
            assert answer(server, reference) == want


# ------------------------------------------------------------------ vLLM with other settings


def test_vllm_without_the_connector_is_found_out(compressor, tokenizer, folder, url, tmp_path):
    """It would answer from placeholders; the engine does not start."""
    with (
        serving(folder, tmp_path / "log", "--max-model-len", str(CONTEXT)) as vllm,
        pytest.raises(ConfigError, match="answers without the memory"),
    ):
        VllmEngine(as_method(compressor), tokenizer, VllmServer(vllm.url), open_store(url))


def test_another_store_or_model_is_found_out(compressor, tokenizer, vllm, url, tmp_path):
    elsewhere = open_store(f"sqlite://{tmp_path}/other.db", Limits(ttl=60))
    with pytest.raises(ConfigError, match="cannot load a memory of this server"):
        VllmEngine(as_method(compressor), tokenizer, VllmServer(vllm.url), elsewhere)
    other = compressor_of(model={"head_dim": 32, "hidden_size": 64})
    with pytest.raises(ConfigError, match="cannot load a memory of this server"):
        VllmEngine(as_method(other), tokenizer, VllmServer(vllm.url), open_store(url))


def test_settings_that_it_cannot_work_with():
    """It is asked before vLLM serves, and says what is wrong."""
    script = Path(__file__).with_name("settings_inside.py")
    done = subprocess.run([PYTHON, script], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("good") == said.pop("long window") == ""
    reasons = {
        "policy": "ConfigError: kv_load_failure_policy: got 'recompute', expected 'fail'",
        "no store": 'ConfigError: kv_connector_extra_config: expected {"store": URL}',
        "version": "ConfigError: vLLM 0.33.0: expected 0.32.x",
        "short window": "UnsupportedModelError: a layer's sliding window of 16 tokens",
    }
    assert set(said) == set(reasons)
    for name, reason in reasons.items():
        assert said[name].startswith(reason)
