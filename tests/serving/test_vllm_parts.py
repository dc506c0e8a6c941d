"""What of the connection to vLLM needs no vLLM: references, shares of heads, fingerprints from files, the client."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from tiny import random_rows, tiny_compressor, tiny_model, tiny_tokenizer

from ccm import cli
from ccm.core.live import Live
from ccm.errors import ConfigError, MismatchError, MissingPackageError, UnsupportedModelError
from ccm.files.fingerprint import model_fingerprint
from ccm.methods.base import METHODS
from ccm.models.generation import Drawing
from ccm.serving.build import _engine
from ccm.serving.engine import EngineError, OverloadedError, Sampling
from ccm.serving.metrics import Metrics
from ccm.serving.options import Options
from ccm.serving.store import NotFoundError, Snapshot, codec, open_store
from ccm.serving.vllm.checkpoint import Checkpoint
from ccm.serving.vllm.client import Call, VllmServer
from ccm.serving.vllm.engine import _options
from ccm.serving.vllm.loader import Loader, heads_of
from ccm.serving.vllm.reference import KEY, Reference

REFERENCE = Reference("alice", "s", 3, 7)


# ------------------------------------------------------------------ references


def test_references_travel_as_json():
    assert Reference.of(json.loads(json.dumps(REFERENCE.params()))) == REFERENCE
    assert Reference.of(None) is None and Reference.of({"do_remote_decode": False}) is None


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"length": 0}, {"version": "3"}, {"version": True}, {"tenant": None}, {"more": 1}],
)
def test_other_params_are_refused(change):
    with pytest.raises(ConfigError, match="kv_transfer_params"):
        Reference.of({KEY: REFERENCE.params()[KEY] | change})


def test_salts_differ_where_memories_do():
    """Also where ids could run into each other."""
    others = [replace(REFERENCE, **c) for c in ({"tenant": "bob"}, {"session": "t"}, {"version": 4})]
    others += [Reference("a", "bc", 1, 7), Reference("ab", "c", 1, 7)]
    assert len({r.salt for r in (REFERENCE, *others)}) == 6
    assert replace(REFERENCE, length=8).salt == REFERENCE.salt  # it is the same memory


def test_the_connector_needs_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "ccm.serving.vllm.connector", raising=False)
    with pytest.raises(MissingPackageError, match=r"docs/scaling\.md"):
        import ccm.serving.vllm.connector  # noqa: F401


# ------------------------------------------------------------------ loading


def test_shares_of_heads():
    """Every head is on some worker, in order; with more workers than heads each has one, and equally many have it."""
    for heads in (1, 2, 3, 4, 8):
        for workers in (n for n in (1, 2, 4, 8, 16, 3, 6) if heads % n == 0 or n % heads == 0):
            shares = [list(range(heads))[heads_of(rank, workers, heads)] for rank in range(workers)]
            assert {len(share) for share in shares} == {max(1, heads // workers)}
            held = [head for share in shares for head in share]
            assert held == sorted(held)
            assert {held.count(head) for head in range(heads)} == {max(1, workers // heads)}


@pytest.fixture
def stored(tmp_path):
    """A compressor with its model's files, a store, and a memory in it with a reference to it."""
    compressor = tiny_compressor("llama")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    memory = None
    for segment in random_rows([[5, 9, 6]])[0]:
        memory = compressor.compress([segment], memory, sink=2, window=8)
    store = open_store(f"dir://{tmp_path}/store")
    session = store.create("alice")
    store.commit("alice", session, 0, Snapshot(*codec.encode(memory)))
    return compressor, tmp_path / "model", store, memory, Reference("alice", session, 1, memory.length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_gets_its_heads_of_what_the_cache_would_hold(stored, dtype):
    compressor, folder, store, memory, reference = stored
    checkpoint = Checkpoint(str(folder), compressor.model.config)
    rotary = checkpoint.rotary(dtype)
    cache = Live.over(memory, rotary, dtype).cache
    for rank in range(2):
        loader = Loader(store, rotary, dtype, checkpoint.fingerprint(), heads_of(rank, 2, 2))
        keys, values = loader.load(reference)
        assert keys.dtype == dtype and keys.shape[:3] == (3, 1, memory.length)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            assert torch.equal(k[0], cache.layers[layer].keys[0, rank])
            assert torch.equal(v[0], cache.layers[layer].values[0, rank])


def test_what_is_not_loaded(stored):
    compressor, folder, store, _, reference = stored
    checkpoint = Checkpoint(str(folder), compressor.model.config)
    everything = slice(None)
    loader = Loader(
        store, checkpoint.rotary(torch.float32), torch.float32, checkpoint.fingerprint(), everything
    )
    for change in ({"tenant": "bob"}, {"session": "other"}, {"version": 2}):
        with pytest.raises(NotFoundError):
            loader.load(replace(reference, **change))
    with pytest.raises(ConfigError, match="placeholders"):
        loader.load(replace(reference, length=reference.length - 1))
    loader.fingerprint = "another"
    with pytest.raises(MismatchError, match="was made by model"):
        loader.load(reference)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gemma3_text"])
def test_fingerprints_and_rotary_from_files(family, tmp_path):
    """As the loaded model has them, in fp32 and bf16; and another model's differ."""
    model = tiny_model(family)
    expected = model_fingerprint(model)
    cos, sin, _ = tiny_compressor(family).rotary.stacked(torch.arange(20))
    for dtype in (torch.float32, torch.bfloat16):
        tiny_model(family).to(dtype).save_pretrained(tmp_path / str(dtype))
        checkpoint = Checkpoint(str(tmp_path / str(dtype)), model.config)
        assert checkpoint.fingerprint() == expected
        tables = checkpoint.rotary(torch.float32).stacked(torch.arange(20))
        assert torch.equal(tables[0], cos) and torch.equal(tables[1], sin)
    tiny_model(family, seed=1).save_pretrained(tmp_path / "other")
    assert Checkpoint(str(tmp_path / "other"), model.config).fingerprint() != expected


def test_files_without_the_plain_weights(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UnsupportedModelError, match="among its weights"):
        Checkpoint(str(tmp_path), tiny_model("llama").config).fingerprint()


# ------------------------------------------------------------------ the client


@contextmanager
def pretending(version: str = "0.32.1", status: int = 200, lines: tuple[Any, ...] = ()) -> Iterator[str]:
    """Something on loopback that talks as vLLM does."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            cards = {"data": [{"id": "m", "max_model_len": 99}]}
            self.answer(200, json.dumps({"version": version} if self.path == "/version" else cards).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if status != 200:
                return self.answer(status, json.dumps({"error": {"message": "because"}}).encode())
            events = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
            self.answer(200, "".join(f"data: {event}\n\n" for event in events).encode())

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def tokens(url: str) -> list[list[int]]:
    return list(VllmServer(url).tokens([1], REFERENCE, {}, Call()))


def test_tokens_of_a_stream():
    choice = [{"choices": [{"token_ids": ids}]} for ids in ([1, 2], [3], None)]
    with pretending(lines=(*choice, "[DONE]")) as url:
        assert tokens(url) == [[1, 2], [3], []]
        assert VllmServer(url).context == 99
    with pretending(lines=(*choice,)) as url, pytest.raises(EngineError, match="lost during the answer"):
        tokens(url)


def test_a_method_that_is_not_plain_is_refused(monkeypatch):
    class Placed(METHODS["none"]):
        plain = False

    monkeypatch.setattr("ccm.serving.store.open_store", lambda *given: 1 / 0)
    options, server = Options(store="dir:///nowhere", vllm="http://127.0.0.1:9"), object()
    with pytest.raises(ConfigError, match="vLLM cannot serve method none"):
        _engine(options, Placed().bind(tiny_model()), tiny_tokenizer(), Metrics(), server)
    with pytest.raises(ZeroDivisionError):  # the control: a plain one goes on to the store
        _engine(options, METHODS["none"]().bind(tiny_model()), tiny_tokenizer(), Metrics(), server)


def test_an_unsupported_vllm_is_refused():
    with pretending(version="0.31.2") as url, pytest.raises(ConfigError, match=r"0\.31\.2: expected 0\.32"):
        VllmServer(url)


def test_errors_of_vllm():
    for status, kind in ((400, ConfigError), (503, OverloadedError), (500, EngineError)):
        with pretending(status=status) as url, pytest.raises(kind, match="because"):
            tokens(url)
    with (
        pretending(lines=({"error": {"message": "because"}},)) as url,
        pytest.raises(EngineError, match="because"),
    ):
        tokens(url)
    with pretending() as url:
        gone = url
    with pytest.raises(EngineError, match="not reachable"):
        VllmServer(gone)
    with pytest.raises(ConfigError, match="expected a URL"):
        VllmServer("somewhere:8000")


def test_a_schema_is_passed_on():
    schema = '{"type": "object"}'
    options = _options(Sampling(schema=schema), Drawing(), 5, [2])
    assert options["structured_outputs"] == {"json": {"type": "object"}}
    assert "structured_outputs" not in _options(Sampling(), Drawing(), 5, [2])


def test_a_server_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ccm.models.options.Loading.load", None)
    store = f"sqlite://{tmp_path}/m.db"
    assert cli.main(["serve", "--port", "0", "--store", store, "--vllm", "http://127.0.0.1:1"]) == 2
    assert "vLLM at http://127.0.0.1:1 is not reachable" in capsys.readouterr().err
