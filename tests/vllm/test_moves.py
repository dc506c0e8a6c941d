"""A conversation that goes on elsewhere: on another engine, or in a vLLM that was killed and started again."""

from __future__ import annotations

import pytest
from conftest import SHAPE, saved
from engine_contract import SIZES, Heard, compressor_of, run, turn
from vllm_servers import free_port, kv_transfer, start

from ccm import Session
from ccm.methods import as_method
from ccm.serving.engine import EngineError, PaddedEngine, Sampling
from ccm.serving.store import open_store
from ccm.serving.vllm.client import VllmServer
from ccm.serving.vllm.engine import VllmEngine

#: Positions for an answer that takes vLLM many seconds: a busy machine may be slow to kill it.
LONG = 4096
SAID = ["my cat is Miso", "and I live in Lyon", "what is it?", "no", "x y z", "hi", "once more"]


@pytest.fixture
def session(compressor, tokenizer):
    return Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)


def say(engine, tokenizer, memory, text):
    (result,), _ = run(engine, [turn(tokenizer, memory, text)])
    return result


def test_between_engines_in_mid_course(compressor, tokenizer, session, vllm, url):
    """Turn by turn on another engine: every answer is the one of a session that never moved."""
    method = as_method(compressor, tokenizer, **SIZES)
    engines = [
        PaddedEngine(method, tokenizer),
        VllmEngine(method, tokenizer, VllmServer(vllm.url), open_store(url)),
    ]
    memory = compressor.empty()
    for i, text in enumerate(SAID):
        result = say(engines[i % 2], tokenizer, memory, text)
        assert result.text == session.generate(text, max_new_tokens=12, do_sample=False)
        memory = result.memory
    for engine in engines:
        engine.close()


def test_vllm_killed_and_started_again(tokenizer, url, tmp_path):
    """The turn that it was killed in fails; the next one goes on with everything that was said before."""
    folder = saved(tmp_path / "model", tokenizer, LONG)
    compressor = compressor_of(model={**SHAPE, "max_position_embeddings": LONG})
    session = Session(compressor, tokenizer, **SIZES)
    options = ("--max-model-len", str(LONG))
    port = free_port()
    vllm = start(folder, tmp_path / "first", *options, port=port, kv=kv_transfer(url))
    try:
        vllm.wait()
        method = as_method(compressor, tokenizer, **SIZES)
        engine = VllmEngine(method, tokenizer, VllmServer(vllm.url), open_store(url))
        memory = compressor.empty()
        for text in SAID[:3]:
            memory = say(engine, tokenizer, memory, text).memory
            session.generate(text, max_new_tokens=12, do_sample=False)
        heard = Heard()
        long = Sampling(max_tokens=LONG - 256, temperature=0, stop=())

        def killing(event: object) -> None:  # at once, where it is heard
            if isinstance(event, str) and heard.events.empty():
                vllm.stop(hard=True)
            heard(event)

        engine.submit(turn(tokenizer, memory, "a", long), killing)
        with pytest.raises(EngineError, match="lost during the answer"):
            heard.result()
        assert heard.pieces
        down = Heard()
        engine.submit(turn(tokenizer, memory, "a"), down)
        with pytest.raises(EngineError, match="lost during the answer"):
            down.result()
        vllm = start(folder, tmp_path / "second", *options, port=port, kv=kv_transfer(url))
        vllm.wait()
        result = say(engine, tokenizer, memory, SAID[3])
        assert result.text == session.generate(SAID[3], max_new_tokens=12, do_sample=False)
        assert not open_store(url).sessions("vllm turns")  # nothing is left of the turns
        engine.close()
    finally:
        vllm.stop(hard=True)
