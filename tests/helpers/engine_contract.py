"""What every engine does, whoever writes its answers: a suite to inherit, and what its tests are made of."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_compressor, tiny_tokenizer

from ccm import Session
from ccm.chat.template import answer_ends
from ccm.chat.turns import render, turns_of
from ccm.errors import ConfigError, MismatchError
from ccm.methods.bits.packed import Packed
from ccm.serving.engine import Engine, EngineError, Job, Kept, OverloadedError, Result, Sampling, segments_of

SIZES = {"slots": 2, "sink": 2, "window": 16, "segment": 8}
GREEDY = Sampling(max_tokens=12, temperature=0)
TEXTS = ["hi", "a much longer thing to say than that", "x y z", "what is it?", "no", "yes, and more of it"]
CONTEXT = 256


def compressor_of(family="llama", model=None, **config):
    shape = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": CONTEXT, **(model or {})}
    return tiny_compressor(family, model=shape, **config)


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


def turn(tokenizer, memory, text, sampling=GREEDY, longest=SIZES["segment"]):
    return Job(
        memory=memory,
        segments=segments_of(render(tokenizer, "user", text).ids, longest),
        prompt=tuple(turns_of(tokenizer).head),
        sampling=sampling,
        remember=lambda text: Kept(segments_of(answered(tokenizer, text), longest)),
    )


def answered(tokenizer, text):
    """An answer as it is remembered; an empty one has its frame alone."""
    template = turns_of(tokenizer)
    said = tokenizer.encode(text, add_special_tokens=False)
    return (*template.head, *said, *template.tail)


def run(engine, jobs):
    heard = [Heard() for _ in jobs]
    for job, listener in zip(jobs, heard, strict=True):
        engine.submit(job, listener)
    return [listener.result() for listener in heard], heard


def close(a, b, method=None):
    """Whether two memories of one conversation hold the same; codes may be rounded to the number beside."""
    within = 5e-5
    if isinstance(method, Packed):
        a, b, within = method.expanded(a), method.expanded(b), 1e-3
    return a.length == b.length and all(
        x.shape == y.shape and float((x - y).norm()) <= within * float(y.norm())
        for part in ("sink", "slots", "window")
        for x, y in zip(getattr(a.rows[0], part), getattr(b.rows[0], part), strict=True)
    )


def check_many_at_a_time(engine, memory, tokenizer, **options):
    """Two turns of six conversations: texts and memories are those of sessions alone."""
    sessions = [Session(memory, tokenizer, **options) for _ in TEXTS]
    longest = sessions[0].method.longest
    memories = [memory.empty()] * len(TEXTS)
    for shift in range(2):
        said = TEXTS[shift:] + TEXTS[:shift]
        jobs = [turn(tokenizer, m, t, longest=longest) for m, t in zip(memories, said, strict=True)]
        results, heard = run(engine, jobs)
        for session, text, result, listener in zip(sessions, said, results, heard, strict=True):
            alone = session.generate(text, max_new_tokens=12, do_sample=False)
            assert result.text == alone
            assert "".join(listener.pieces) == result.text
            assert close(result.memory, session.memory, session.method)
            assert result.memory.tokens == session.memory.tokens
        memories = [result.memory for result in results]
    if memories[0].slots:
        assert not all(
            close(memories[0], other, sessions[0].method) for other in memories[1:]
        )  # and they do differ


class EngineContract:
    """Subclasses have fixtures ``compressor``, ``tokenizer`` and ``make``, which gives engines of 4 + 16 jobs.

    ``make`` takes sizes of the method, other than :data:`SIZES`, too.
    """

    @pytest.fixture
    def engine(self, make: Callable[..., Engine]) -> Iterator[Engine]:
        engine = make()
        yield engine
        engine.close()

    def test_many_at_a_time_equal_a_session_each(self, engine, compressor, tokenizer):
        check_many_at_a_time(engine, compressor, tokenizer, **SIZES)

    def test_nothing_is_folded_between_a_question_and_its_answer(
        self, compressor, tokenizer, engine, monkeypatch
    ):
        """A late turn is folded as often before its first token as an early one: not at all."""
        held: list[int] = []  # tokens folded after all that is taken in together
        kind, compress = type(compressor), compressor.compress

        def watch(name):
            own = getattr(kind, name)

            def watched(self, *args, **sizes):
                memory = own(self, *args, **sizes)
                held.append(memory.tokens)
                return memory

            monkeypatch.setattr(kind, name, watched)

        watch("compress")
        watch("take_in")
        memory = compressor.empty()
        for text in ("hi", "x y z", "no", "yes"):
            held.clear()
            expected, before = memory, memory.tokens
            segments = segments_of(render(tokenizer, "user", text).ids, SIZES["segment"])
            for k, ids in enumerate(segments):
                room = SIZES["segment"] if k + 1 == len(segments) else 0
                sizes = {"slots": SIZES["slots"], "sink": SIZES["sink"], "window": SIZES["window"] + room}
                expected = compress([ids], expected, **sizes)
            ((result,), _) = run(engine, [turn(tokenizer, memory, text)])
            assert held[0] == expected.tokens
            memory = result.memory
            assert memory.rows[0].window.length <= SIZES["window"] and memory.tokens > before

    def test_rows_join_and_leave_at_any_time(self, compressor, tokenizer, engine):
        """Answers of different lengths, more jobs than rows: each as if it were alone."""
        jobs = [
            turn(tokenizer, compressor.empty(), text, Sampling(max_tokens=3 + 20 * i, temperature=0))
            for i, text in enumerate(TEXTS)
        ]
        together, _ = run(engine, jobs)
        alone = [run(engine, [job])[0][0] for job in jobs]
        assert [r.text for r in together] == [r.text for r in alone]
        for i, result in enumerate(together):
            assert result.tokens == 3 + 20 * i or result.finish_reason == "stop"
        assert {r.finish_reason for r in together} == {"length", "stop"}

    def test_a_long_prompt_without_a_memory(self, compressor, tokenizer, engine):
        """Read while others write, it equals transformers' own generate."""
        ids = tokenizer.encode("tell me of whales and of ships at sea, " * 3)
        job = Job(compressor.empty(), prompt=tuple(ids), sampling=GREEDY)
        others = [turn(tokenizer, compressor.empty(), text) for text in TEXTS]
        (result, *_), _ = run(engine, [job, *others])
        stops = {"eos_token_id": sorted(answer_ends(tokenizer)[0]), "pad_token_id": tokenizer.pad_token_id}
        whole = compressor.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, **stops)
        assert result.text == tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True).strip()
        assert result.text and result.memory.length == 0

    def test_append_without_an_answer(self, compressor, tokenizer, engine):
        segments = segments_of(render(tokenizer, "user", "my cat is Miso").ids, SIZES["segment"])
        (result,), (heard,) = run(engine, [Job(compressor.empty(), segments)])
        session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)
        session.append("my cat is Miso")
        assert close(result.memory, session.memory) and result.text == "" and not heard.pieces

    def test_cancelled_jobs_say_nothing_more_and_free_their_place(self, compressor, tokenizer, engine):
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
        assert engine._jobs == 0 and not engine._writing

    def test_a_waiting_job_can_be_cancelled(self, compressor, tokenizer, make):
        engine = make(rows=1, waiting=1)
        first, second = Heard(), Heard()
        engine.submit(turn(tokenizer, compressor.empty(), "go on"), first)
        engine.submit(turn(tokenizer, compressor.empty(), "no"), second).cancel()
        assert first.result().text
        deadline = time.monotonic() + 30
        while engine._jobs and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine._jobs == 0 and second.events.empty()
        engine.close()

    def test_an_answer_that_is_told_to_end_is_kept(self, compressor, tokenizer, engine):
        """With what was written by then, in the memory too; one that has not begun says nothing."""
        long = turn(tokenizer, compressor.empty(), "go on", Sampling(max_tokens=150, temperature=0))
        ((whole,), _) = run(engine, [long])
        heard, tickets = Heard(), queue.Queue[Any]()

        def listener(event: Any) -> None:  # the engine waits for it: the answer cannot be over by then
            heard(event)
            if isinstance(event, str):
                ticket = tickets.get(timeout=30)
                ticket.finish()
                tickets.put(ticket)

        tickets.put(engine.submit(long, listener))
        cut = heard.result()
        assert whole.text.startswith(cut.text) and 0 < cut.tokens < whole.tokens
        assert cut.finish_reason == "stopped" and "".join(heard.pieces) == cut.text
        session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)
        session.generate("go on", max_new_tokens=cut.tokens, do_sample=False)
        assert close(cut.memory, session.memory) and cut.memory.tokens == session.memory.tokens
        assert run(engine, [long])[0][0].text == whole.text  # negative control: nobody else was told

    def test_a_waiting_answer_can_be_told_to_end(self, compressor, tokenizer, make):
        engine = make(rows=1, waiting=1)
        first, second = Heard(), Heard()
        engine.submit(turn(tokenizer, compressor.empty(), "go on"), first)
        engine.submit(turn(tokenizer, compressor.empty(), "my cat is Miso"), second).finish()
        result = second.result()
        assert first.result().text and (result.text, result.tokens) == ("", 0)
        assert result.memory.tokens > 0 and not second.pieces  # what the user said is there
        engine.close()

    def test_a_full_queue_refuses(self, compressor, tokenizer, make):
        engine = make(rows=1, waiting=1)
        heard = [Heard(), Heard()]
        job = turn(tokenizer, compressor.empty(), "go on", Sampling(max_tokens=60, temperature=0))
        for listener in heard:
            engine.submit(job, listener)
        with pytest.raises(OverloadedError) as caught:
            engine.submit(job, Heard())
        assert caught.value.retry_after >= 1
        assert heard[0].result().text == heard[1].result().text  # those inside are served
        engine.close()

    def test_a_failing_step_fails_its_jobs_only(self, compressor, tokenizer, engine, monkeypatch):
        real = type(compressor).compress

        def compress(self, ids, *args, **kwargs):
            if (ids == 50).any():
                raise RuntimeError("no")
            return real(self, ids, *args, **kwargs)

        monkeypatch.setattr(type(compressor), "compress", compress)
        bad = Job(compressor.empty(), ((50, 50),))
        heard = Heard()
        engine.submit(bad, heard)
        with pytest.raises(EngineError, match="RuntimeError"):
            heard.result()
        assert run(engine, [turn(tokenizer, compressor.empty(), "hi")])[0][0].tokens == 12
        assert engine.idle_seconds() == 0

    def test_close_ends_running_turns(self, compressor, tokenizer, make):
        engine = make(rows=1)
        heard = [Heard(), Heard()]
        long = Sampling(max_tokens=150, temperature=0)
        for listener in heard:
            engine.submit(turn(tokenizer, compressor.empty(), "a", long), listener)
        engine.close()
        for listener in heard:
            with pytest.raises(EngineError, match="stopped"):
                listener.result()
        with pytest.raises(EngineError):
            engine.submit(turn(tokenizer, compressor.empty(), "a"), Heard())

    def test_close_ends_answers_that_are_written_side_by_side(self, compressor, tokenizer, make):
        engine, writing = make(rows=2), threading.Event()
        heard = [Heard(), Heard()]

        def second(event: object) -> None:  # the engine waits here until it is told to stop
            if isinstance(event, str):
                writing.set()
                while not engine._closed:
                    time.sleep(0.001)
            heard[1](event)

        long = Sampling(max_tokens=150, temperature=0)
        for listener in (heard[0], second):
            engine.submit(turn(tokenizer, compressor.empty(), "a", long), listener)
        assert writing.wait(60)
        # a server may have ended the first answer before it began the second
        over = any(isinstance(event, Result) for event in heard[0].events.queue)
        engine.close()
        for listener in heard[over:]:
            with pytest.raises(EngineError, match="stopped"):
                listener.result()

    def test_what_cannot_run_is_refused(self, compressor, tokenizer, engine, make):
        with pytest.raises(ConfigError, match=f"context is {CONTEXT}"):
            engine.submit(Job(compressor.empty(), prompt=(5,) * 300), Heard())
        with pytest.raises(ConfigError, match="vocabulary"):
            engine.submit(Job(compressor.empty(), prompt=(10**6,)), Heard())
        other = compressor_of(rule="mean")
        with pytest.raises(MismatchError):
            engine.submit(turn(tokenizer, other.empty(), "a"), Heard())
        with pytest.raises(ConfigError, match="rows=0"):
            make(rows=0)

    def test_a_memory_that_leaves_no_room_is_refused(self, compressor, tokenizer, engine):
        """More slots than the context has places: the reason comes before any text."""
        memory = None
        for _ in range(CONTEXT // 2 - 1):
            memory = compressor.compress([[5]], memory, slots=2, sink=0, window=0)
        heard = Heard()
        engine.submit(Job(memory, prompt=(5, 6), sampling=GREEDY), heard)
        with pytest.raises(ConfigError, match="memory and prompt fill"):
            heard.result()
        assert not heard.pieces

    def test_a_full_memory_is_refused_alone(self, compressor, tokenizer, engine):
        """A conversation that has reached the context says so, and those beside it go on."""
        memory = None
        for _ in range(CONTEXT // 2 - 4):
            memory = compressor.compress([[5]], memory, slots=2, sink=0, window=0)
        heard, others = Heard(), [Heard() for _ in range(3)]
        engine.submit(Job(memory, ((5,) * 8,)), heard)
        for other in others:
            engine.submit(turn(tokenizer, compressor.empty(), "hi"), other)
        with pytest.raises(ConfigError, match="begin a new one, or serve an adapter that merges"):
            heard.result()
        assert len({other.result().text for other in others}) == 1

    def test_a_nearly_full_memory_and_a_long_segment_take_turns(self, compressor, make):
        """Each fits alone, both in one padded pass would not."""
        memory = None
        for _ in range(CONTEXT // 2 - 6):
            memory = compressor.compress([[5]], memory, slots=2, sink=0, window=0)
        engine = make(sink=0, window=0, segment=64)
        (near, long), _ = run(engine, [Job(memory, ((5, 6),)), Job(compressor.empty(), ((5,) * 64,))])
        engine.close()
        assert near.memory.length == memory.length + 2 and long.memory.length == 2

    def test_answers_end_with_the_context(self, compressor, tokenizer, engine):
        job = Job(compressor.empty(), prompt=(5,) * 250, sampling=GREEDY)
        (result,), _ = run(engine, [job])
        assert result.tokens == 6 and result.finish_reason == "length"

    def test_an_answer_that_fills_the_context_is_remembered(self, compressor, tokenizer, make):
        """As many tokens as leave room for the fold behind them; the turn is not lost when it is taken in."""
        memory = None
        for _ in range(105):
            memory = compressor.compress([[5]], memory, slots=2, sink=0, window=0)
        engine = make(sink=0, window=0, segment=64)  # the answer is one segment
        job = turn(tokenizer, memory, "hi", Sampling(max_tokens=5000, temperature=0), 64)
        (result,), _ = run(engine, [job])
        engine.close()
        assert result.finish_reason == "length" and 0 < result.tokens < CONTEXT - memory.length
        assert result.memory.steps == 107

    def test_stop_texts_end_an_answer(self, compressor, tokenizer, engine):
        (whole,), _ = run(engine, [turn(tokenizer, compressor.empty(), "hi")])
        stop = whole.text[3:5]
        sampling = Sampling(max_tokens=12, temperature=0, stop=(stop,))
        (cut,), (heard,) = run(engine, [turn(tokenizer, compressor.empty(), "hi", sampling)])
        assert cut.text == whole.text[: whole.text.index(stop)].rstrip() and cut.finish_reason == "stop"
        assert "".join(heard.pieces) == cut.text

    def test_penalties_count_what_was_said(self, compressor, tokenizer, engine):
        """Of the prompt and the answer, and not of what stands for the memory."""
        sampling = Sampling(max_tokens=12, temperature=0, repetition_penalty=1.5)
        differ = []
        for text in TEXTS:
            jobs = [turn(tokenizer, compressor.empty(), text, options) for options in (GREEDY, sampling)]
            (plain, penalized), _ = run(engine, jobs)
            session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)
            alone = session.generate(text, max_new_tokens=12, do_sample=False, repetition_penalty=1.5)
            assert penalized.text == alone
            differ.append(penalized.text != plain.text)
        assert any(differ)

    def test_seeds(self, compressor, tokenizer, engine):
        def answer(seed):
            sampling = Sampling(max_tokens=12, temperature=1.5, seed=seed)
            return run(engine, [turn(tokenizer, compressor.empty(), "a", sampling)])[0][0].text

        assert answer(1) == answer(1) != answer(2)
