"""The padded engine: what it answers to many at a time is what a session answers to one."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch
from tiny import tiny_compressor, tiny_tokenizer

from ccm import Session
from ccm.chat import closing, ends, header, render
from ccm.errors import ConfigError, MismatchError
from ccm.serving.engine import (
    EngineError,
    Job,
    OverloadedError,
    PaddedEngine,
    Result,
    Sampling,
    segments_of,
)
from ccm.serving.engine.sampling import Sampler, Writer
from ccm.session import Budget

BUDGET = Budget(slots=2, sink=2, window=16, segment=8)
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def compressor_of(family="llama", **config):
    return tiny_compressor(
        family, model={"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 256}, **config
    )


@pytest.fixture(scope="module")
def compressor():
    return compressor_of()


@pytest.fixture
def engine(compressor, tokenizer):
    engine = PaddedEngine(compressor, tokenizer, rows=4, waiting=16)
    yield engine
    engine.close()


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.pieces: list[str] = []

    def __call__(self, event: Any) -> None:
        self.events.put(event)

    def result(self, timeout: float = 60) -> Result:
        while isinstance(event := self.events.get(timeout=timeout), str):
            self.pieces.append(event)
        if isinstance(event, Exception):
            raise event
        return event


def turn(tokenizer, memory, text, sampling=GREEDY, budget=BUDGET):
    return Job(
        memory=memory,
        budget=budget,
        segments=segments_of(render(tokenizer, "user", text).ids, budget),
        prompt=tuple(header(tokenizer, "assistant")),
        sampling=sampling,
        closing=tuple(closing(tokenizer, "assistant")),
    )


def run(engine, jobs):
    heard = [Heard() for _ in jobs]
    for job, listener in zip(jobs, heard, strict=True):
        engine.submit(job, listener)
    return [listener.result() for listener in heard], heard


TEXTS = ["hi", "a much longer thing to say than that", "x y z", "what is it?", "no", "yes, and more of it"]


def close(a, b):
    return a.length == b.length and all(
        torch.allclose(x, y, atol=2e-4) for x, y in zip(a.rows[0].slots, b.rows[0].slots, strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_many_at_a_time_equal_a_session_each(family, tokenizer):
    """Two turns of six conversations on four rows: texts and memories are those of sessions alone."""
    compressor = compressor_of(family)
    sessions = [Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8) for _ in TEXTS]
    engine = PaddedEngine(compressor, tokenizer, rows=4)
    memories = [compressor.empty()] * len(TEXTS)
    for shift in range(2):
        said = TEXTS[shift:] + TEXTS[:shift]
        results, heard = run(engine, [turn(tokenizer, m, t) for m, t in zip(memories, said, strict=True)])
        for session, text, result, listener in zip(sessions, said, results, heard, strict=True):
            alone = session.generate(text, max_new_tokens=12, do_sample=False)
            assert result.text == alone
            assert "".join(listener.pieces) == result.text
            assert close(result.memory, session.memory)
            assert result.memory.tokens == session.memory.tokens
        memories = [result.memory for result in results]
    assert not close(memories[0], memories[1])  # and they do differ
    engine.close()


def test_rows_join_and_leave_at_any_time(compressor, tokenizer, engine):
    """Answers of different lengths, more jobs than rows: each as if it were alone."""
    jobs = [
        turn(tokenizer, compressor.empty(), text, Sampling(max_tokens=3 + 5 * i, temperature=0))
        for i, text in enumerate(TEXTS)
    ]
    together, _ = run(engine, jobs)
    alone = [run(engine, [job])[0][0] for job in jobs]
    assert [r.text for r in together] == [r.text for r in alone]
    for i, result in enumerate(together):
        assert result.tokens == 3 + 5 * i or result.finish_reason == "stop"
    assert {r.finish_reason for r in together} == {"length", "stop"}


def test_stateless_prompt_in_chunks(compressor, tokenizer, engine, monkeypatch):
    """A long prompt read in parts, while others write, equals transformers' own generate."""
    monkeypatch.setattr("ccm.serving.engine.padded.CHUNK", 16)
    ids = tokenizer.encode("tell me of whales and of ships at sea, " * 3)
    job = Job(compressor.empty(), BUDGET, prompt=tuple(ids), sampling=GREEDY, remember=False)
    (result, *_), _ = run(engine, [job, *(turn(tokenizer, compressor.empty(), text) for text in TEXTS)])
    stops = {"eos_token_id": sorted(ends(tokenizer)), "pad_token_id": tokenizer.pad_token_id}
    whole = compressor.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, **stops)
    assert result.text == tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True).strip()
    assert result.text and result.memory.length == 0


def test_append_without_an_answer(compressor, tokenizer, engine):
    job = Job(
        compressor.empty(), BUDGET, segments_of(render(tokenizer, "user", "my cat is Miso").ids, BUDGET)
    )
    (result,), (heard,) = run(engine, [job])
    session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)
    session.append("my cat is Miso")
    assert close(result.memory, session.memory) and result.text == "" and not heard.pieces


def test_cancelled_jobs_say_nothing_more_and_free_their_place(compressor, tokenizer, engine):
    begun = threading.Event()
    after: list[Any] = []
    slow = turn(tokenizer, compressor.empty(), "go on", Sampling(max_tokens=150, temperature=0))

    def listener(event: Any) -> None:
        after.append(event) if begun.is_set() else begun.set()

    tickets = [engine.submit(slow, listener) for _ in range(4)]
    assert begun.wait(30)
    for ticket in tickets:
        ticket.cancel()
    run(engine, [turn(tokenizer, compressor.empty(), text) for text in TEXTS])
    assert not any(isinstance(event, Result) for event in after)
    assert engine._jobs == 0 and engine._batch is None


def test_a_full_queue_refuses(compressor, tokenizer):
    engine = PaddedEngine(compressor, tokenizer, rows=1, waiting=1)
    heard = [Heard(), Heard()]
    job = turn(tokenizer, compressor.empty(), "go on", Sampling(max_tokens=60, temperature=0))
    for listener in heard:
        engine.submit(job, listener)
    with pytest.raises(OverloadedError) as caught:
        engine.submit(job, Heard())
    assert caught.value.retry_after >= 1
    assert heard[0].result().text == heard[1].result().text  # those inside are served
    engine.close()


def test_a_failing_step_fails_its_jobs_only(compressor, tokenizer, engine, monkeypatch):
    real = type(compressor).compress

    def compress(self, ids, *args, **kwargs):
        if (ids == 50).any():
            raise RuntimeError("no")
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(compressor), "compress", compress)
    bad = Job(compressor.empty(), BUDGET, ((50, 50),))
    heard = Heard()
    engine.submit(bad, heard)
    with pytest.raises(EngineError, match="RuntimeError"):
        heard.result()
    assert run(engine, [turn(tokenizer, compressor.empty(), "hi")])[0][0].tokens == 12
    assert engine.idle_seconds() == 0


def test_close_ends_running_turns(compressor, tokenizer):
    engine = PaddedEngine(compressor, tokenizer, rows=1)
    heard = [Heard(), Heard()]
    for listener in heard:
        engine.submit(
            turn(tokenizer, compressor.empty(), "a", Sampling(max_tokens=150, temperature=0)), listener
        )
    engine.close()
    for listener in heard:
        with pytest.raises(EngineError, match="stopped"):
            listener.result()
    with pytest.raises(EngineError):
        engine.submit(turn(tokenizer, compressor.empty(), "a"), Heard())


def test_what_cannot_run_is_refused(compressor, tokenizer, engine):
    with pytest.raises(ConfigError, match="context is 256"):
        engine.submit(Job(compressor.empty(), BUDGET, prompt=(5,) * 300), Heard())
    with pytest.raises(ConfigError, match="vocabulary"):
        engine.submit(Job(compressor.empty(), BUDGET, prompt=(10**6,)), Heard())
    other = compressor_of(rule="mean")
    with pytest.raises(MismatchError):
        engine.submit(turn(tokenizer, other.empty(), "a"), Heard())
    with pytest.raises(ConfigError, match="rows=0"):
        PaddedEngine(compressor, tokenizer, rows=0)


def test_answers_end_with_the_context(compressor, tokenizer, engine):
    job = Job(compressor.empty(), BUDGET, prompt=(5,) * 250, sampling=GREEDY, remember=False)
    (result,), _ = run(engine, [job])
    assert result.tokens == 6 and result.finish_reason == "length"


# ------------------------------------------------------------------ sampling and text


def test_seeds(compressor, tokenizer, engine):
    def answer(seed):
        sampling = Sampling(max_tokens=12, temperature=1.5, seed=seed)
        return run(engine, [turn(tokenizer, compressor.empty(), "a", sampling)])[0][0].text

    assert answer(1) == answer(1) != answer(2)


def test_sampling_follows_the_probabilities():
    """Frequencies of 4,000 draws, with and without a nucleus, and both penalties."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()

    def shares(**options):
        sampler = Sampler(Sampling(seed=0, **options), (3,))
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[sampler._draw(sampler._penalized(logits))] += 1
        return counts / 4000

    assert torch.allclose(shares(), logits.exp(), atol=0.03)
    nucleus = shares(top_p=0.7)
    assert nucleus[2:].sum() == 0 and abs(nucleus[0] - 2 / 3) < 0.03
    cold = shares(temperature=0.5)
    assert abs(cold[0] - 0.25 / 0.345) < 0.03
    assert shares(repetition_penalty=5.0)[3] < 0.01  # of the prompt; its logit is negative
    plain, penalized = (Sampler(Sampling(temperature=0, frequency_penalty=f), ()) for f in (0, 0.5))
    assert [plain.draw(logits) for _ in range(4)] == [0, 0, 0, 0]
    assert [penalized.draw(logits) for _ in range(4)] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 1.5}, {"stop": ("",)}, {"repetition_penalty": 0}],
)
def test_sampling_out_of_range(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Sampling(**change)


def write(tokenizer, text, *stop):
    writer = Writer(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(writer.put(token))
        if writer.stopped:
            break
    return writer, [*pieces, writer.end()]


def test_text_comes_in_whole_characters(tokenizer):
    """Every byte is a token here: no half of a character is given out, and nothing is lost."""
    text = "naïve 🙂 日本 end"
    writer, pieces = write(tokenizer, text)
    assert "".join(pieces) == text == writer.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert " 🙂" in pieces


def test_blanks_around_an_answer_go(tokenizer):
    writer, pieces = write(tokenizer, "\n  hello there \n ")
    assert "".join(pieces) == writer.text == "hello there"


def test_stop_texts_are_never_shown(tokenizer):
    writer, pieces = write(tokenizer, "one two STOP three", "STOP", "xyz")
    assert "".join(pieces) == writer.text == "one two" and writer.stopped
    writer, pieces = write(tokenizer, "one STO", "STOP")  # only a beginning of it
    assert "".join(pieces) == writer.text == "one STO" and not writer.stopped
