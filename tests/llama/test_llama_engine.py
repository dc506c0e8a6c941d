"""The engine on llama.cpp: the contract of all engines, whose answers are those of sessions in transformers."""

from __future__ import annotations

import pytest
import torch
from engine_contract import CONTEXT, GREEDY, SIZES, TEXTS, EngineContract, close, run, turn
from tiny import tiny_model

from ccm import Session
from ccm.errors import ConfigError, MissingPackageError
from ccm.methods import as_method, get_method
from ccm.serving.engine import Job, PaddedEngine
from ccm.serving.llama import library
from ccm.serving.llama.engine import LlamaEngine
from ccm.serving.llama.layout import LayoutError
from ccm.serving.llama.library import Context
from ccm.serving.llama.reader import in_llama

pytestmark = pytest.mark.usefixtures("runs")


@pytest.fixture
def bound(compressor, tokenizer, gguf):
    """A method in llama.cpp."""

    def bound(**options):
        sizes = {name: options.pop(name) for name in SIZES if name in options}
        method = as_method(compressor, tokenizer, **SIZES | sizes)
        return in_llama(method, str(gguf), **{"kind": "f32", "positions": CONTEXT, "threads": 1, **options})

    return bound


@pytest.fixture
def make(bound, tokenizer):
    def make(rows=4, waiting=16, **sizes):
        if rows < 1:  # the engine's own words
            return PaddedEngine(as_method(bound().reader, tokenizer), tokenizer, rows=rows)
        return LlamaEngine(bound(sequences=rows, **sizes), tokenizer, waiting=waiting)

    return make


class TestLlama(EngineContract):
    def test_a_long_prompt_is_read_in_chunks(self, compressor, tokenizer, engine, monkeypatch):
        monkeypatch.setattr("ccm.serving.llama.engine.CHUNK", 16)
        self.test_a_long_prompt_without_a_memory(compressor, tokenizer, engine)


def test_a_session_in_llama_cpp_is_a_session_in_transformers(compressor, tokenizer, bound):
    """Slots, sink and window, over ten turns: the same answers, token for token, and the same memories."""
    torch.manual_seed(0)
    here, there = (
        Session(method, tokenizer) for method in (as_method(compressor, tokenizer, **SIZES), bound())
    )
    for text in TEXTS + TEXTS[:4]:
        answers = [session.generate(text, max_new_tokens=12, do_sample=False) for session in (here, there)]
        assert answers[0] == answers[1]
        assert close(here.memory, there.memory)
    assert here.memory.slots > 4 and here.memory.rows[0].tokens == there.memory.rows[0].tokens


@pytest.mark.parametrize("name", ["streaming-llm:window=24,sink=2", "snapkv:tokens=12,window=12"])
def test_memories_without_training(name, compressor, tokenizer, gguf):
    """Also those that look at queries, which llama.cpp does not give."""
    spec, _, options = name.partition(":")
    method = get_method(spec, **{k: int(v) for k, v in (pair.split("=") for pair in options.split(","))})
    method = method.bind(compressor.model, tokenizer)
    sessions = [Session(m, tokenizer) for m in (method, in_llama(method, str(gguf), kind="f32"))]
    for text in TEXTS:
        one, two = (session.generate(text, max_new_tokens=8, do_sample=False) for session in sessions)
        assert one == two and close(sessions[0].memory, sessions[1].memory)


@pytest.mark.parametrize(("kind", "error"), [("f16", 2e-3), ("q8_0", 6e-2)])
def test_smaller_keys_and_values(kind, error, bound, compressor):
    ids = [list(range(5, 25))]
    exact = compressor.compress(ids, slots=2, sink=2, window=0)
    (row,) = bound(kind=kind).fold(exact, ids).rows
    (expected,) = compressor.compress(ids, exact, slots=2, sink=2, window=SIZES["window"]).rows
    for part in ("slots", "window"):
        for got, wanted in zip(getattr(row, part), getattr(expected, part), strict=True):
            assert float((got - wanted).norm()) <= error * float(wanted.norm())


# ------------------------------------------------------------------ what is read, and by whom


@pytest.fixture
def read(monkeypatch):
    """Tokens that llama.cpp has read, by call."""
    counts: list[int] = []
    decode = Context._decode

    def counted(self, pieces, logits):
        counts.append(sum(count for _, _, count in pieces))
        return decode(self, pieces, logits)

    monkeypatch.setattr(Context, "_decode", counted)
    return counts


def test_an_answer_is_not_read_again(bound, compressor, read):
    """A turn reads its question, what stands before the answer, each token of the answer, and what ends it: once."""
    method = bound(segment=64, window=64)
    memory, told = method.empty(), []
    for _ in range(3):
        read.clear()
        memory = method.fold(memory, [[5, 6, 7, 8]], answered=True)
        out = method.reader.generate([[9, 10]], memory, max_new_tokens=6, do_sample=False, eos_token_id=None)
        memory = method.fold(memory, [[*out[0].tolist(), 11, 12]])
        assert read == [4, 2, 1, 1, 1, 1, 1, 1 + 2]  # the last token drawn is read with what ends the answer
        told.append([*out[0].tolist(), 11, 12])
    expected = compressor.empty()
    for ids in told:
        for segment in ([5, 6, 7, 8], ids):
            expected = compressor.compress([segment], expected, sink=2, window=64)
    assert close(memory, expected)


def test_a_memory_is_placed_anew_for_every_fold_and_behind_them(bound, monkeypatch):
    """What was read behind it stays where it is: question and answer are taken in without another one."""
    put, placed = Context.put, []
    monkeypatch.setattr(Context, "put", lambda *given: (placed.append(1), put(*given)))
    method = bound(segment=16, window=16)
    memory, folds = method.empty(), 0
    for _ in range(4):
        placed.clear()
        before, slots_moved = memory.steps, folds > 0
        memory = method.fold(memory, [[5, 6, 7, 8]], answered=True)
        out = method.reader.generate([[9, 10]], memory, max_new_tokens=6, do_sample=False, eos_token_id=None)
        memory = method.fold(memory, [[*out[0].tolist(), 11, 12]])
        folds = memory.steps - before
        assert len(placed) == slots_moved + folds
    assert folds == 2


def test_twins_that_say_different_things_never_mix(bound, compressor, tokenizer):
    """Copies of one memory, told different things of one length, at one time and one after the other."""
    engine = LlamaEngine(bound(sequences=4), tokenizer)
    start = run(engine, [turn(tokenizer, compressor.empty(), "hello there")])[0][0].memory
    texts = [f"my name is {name}" for name in ("Ann", "Bob", "Cid", "Dan")]
    told = [r.memory for r in run(engine, [turn(tokenizer, start, text) for text in texts])[0]]
    for text, memory in zip(texts, told, strict=True):
        session = Session(compressor, tokenizer, **SIZES)
        for said in ("hello there", text):
            session.generate(said, max_new_tokens=12, do_sample=False)
        assert close(memory, session.memory)
        for _ in range(2):  # as it came in, and with the others beside it
            asked = run(engine, [turn(tokenizer, m, "who am I?") for m in (memory, *told)])[0]
            assert asked[0].text == session.fork().generate("who am I?", max_new_tokens=12, do_sample=False)
    assert not close(told[0], told[1])
    engine.close()


def test_a_text_of_the_same_length_behind_the_same_memory_is_another(bound, compressor):
    """The sequence still holds the first text when the memory with the second is asked for."""
    method = bound(sequences=1)
    empty = method.empty()
    one, two = (method.fold(empty, [ids], answered=True) for ids in ([5, 6, 7], [5, 9, 7]))
    method.fold(empty, [[5, 6, 7]], answered=True)
    logits = [
        method.reader.generate([[8]], memory, max_new_tokens=6, do_sample=False) for memory in (one, two)
    ]
    expected = [
        compressor.generate([[8]], memory, max_new_tokens=6, do_sample=False) for memory in (one, two)
    ]
    assert torch.equal(logits[0], expected[0]) and torch.equal(logits[1], expected[1])


# ------------------------------------------------------------------ bad input


def test_the_file_of_another_model(compressor, tokenizer, tmp_path):
    from conftest import SHAPE
    from gguf_files import write_gguf

    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **SHAPE}
    write_gguf(tmp_path / "other.gguf", tiny_model(seed=1, **shape), tokenizer)
    method = as_method(compressor, tokenizer, **SIZES)
    with pytest.raises(ConfigError, match="not the model that the memory is for"):
        in_llama(method, str(tmp_path / "other.gguf"))
    write_gguf(tmp_path / "deep.gguf", tiny_model(num_hidden_layers=4, **shape), tokenizer)
    with pytest.raises(ConfigError, match="give the GGUF file of that model"):
        in_llama(method, str(tmp_path / "deep.gguf"))


def test_what_is_no_model(bound, compressor, tokenizer, tmp_path):
    method = as_method(compressor, tokenizer, **SIZES)
    with pytest.raises(ConfigError, match="no such file"):
        in_llama(method, str(tmp_path / "none.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, or not")
    with pytest.raises(ConfigError, match="cannot load it"):
        in_llama(method, str(tmp_path / "bad.gguf"))
    with pytest.raises(ConfigError, match="type 'f64'"):
        bound(kind="f64")


def test_too_little_context(compressor, tokenizer, gguf):
    """For the memory with one more segment: before anything is said."""
    method = get_method("streaming-llm", window=300, sink=4).bind(compressor.model, tokenizer)
    with pytest.raises(ConfigError, match=r"grows to 304 positions, \d+ with the next segment"):
        in_llama(method, str(gguf), positions=CONTEXT)


def test_a_state_that_is_laid_out_otherwise(bound, monkeypatch):
    monkeypatch.setattr("ccm.serving.llama.layout._MAGIC", 1)
    with pytest.raises(LayoutError, match=r"mark is \d+, expected 1; install the release"):
        bound()


def test_a_state_that_does_not_keep_what_is_written(bound, monkeypatch):
    put = Context.put

    def forgetful(self, sequence, blob):
        blob[-8:-4] = 0
        put(self, sequence, blob)

    monkeypatch.setattr(Context, "put", forgetful)
    with pytest.raises(LayoutError, match="does not keep what is written"):
        bound()


def test_a_build_without_the_calls():
    class Old:
        __version__ = "0.2.90"

    with pytest.raises(ConfigError, match=r"0\.2\.90 has no llama_adapter_lora_init"):
        library.check_calls(Old)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(MissingPackageError, match=r"compressed-context-memory\[llama\]"):
        library.library()


def test_generate_refuses_what_it_cannot_do(bound):
    with pytest.raises(ConfigError, match="without num_beams"):
        bound().reader.generate([[5]], max_new_tokens=3, num_beams=2)


def test_a_failure_of_llama_cpp_ends_its_turns_alone(bound, compressor, tokenizer, monkeypatch):
    engine = LlamaEngine(bound(sequences=2), tokenizer)
    before = run(engine, [turn(tokenizer, compressor.empty(), "hi")])[0][0]
    real = Context._decode

    def failing(self, pieces, logits):
        if any(50 in part.content for part, _, _ in pieces):
            raise library.LlamaError("no")
        return real(self, pieces, logits)

    monkeypatch.setattr(Context, "_decode", failing)
    from engine_contract import Heard

    from ccm.serving.engine import EngineError

    heard = Heard()
    engine.submit(Job(compressor.empty(), prompt=(5, 50, 6), sampling=GREEDY), heard)
    with pytest.raises(EngineError):
        heard.result()
    assert not any(place.held for place in engine.llama.places)
    assert run(engine, [turn(tokenizer, compressor.empty(), "hi")])[0][0].text == before.text
    engine.close()
