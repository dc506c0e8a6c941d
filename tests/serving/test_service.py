"""Turns over engine and store: whole ones, one at a time, and nobody else's; and their end."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from services import SIZES
from talks import GREEDY, WORDS, say, user
from tiny import tiny_compressor

from ccm import Session
from ccm.chat.messages import Message
from ccm.errors import ConfigError, StorageError
from ccm.serving.engine import EngineError, OverloadedError, StoppingError
from ccm.serving.service import BusyError, Sampling
from ccm.serving.store import ConflictError, Limits, NotFoundError, QuotaError

pytest_plugins = ("service_fixtures",)


def test_turns_equal_a_session(service, compressor, tokenizer):
    session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)

    async def run():
        seen, answers = 0, []
        for i, text in enumerate(["my cat is Miso", "and my dog is Rex", "who is who?"]):
            outcome = await say(service, "s", text)
            assert outcome.text == session.generate(text, max_new_tokens=10, do_sample=False)
            assert outcome.version == i + 1
            assert outcome.stats == {**session.stats(), "turns": 2 * i + 2}
            assert outcome.prompt_tokens > outcome.known_tokens == seen
            seen = outcome.stats["tokens_seen"]
            answers.append(outcome)
        view = await service.view("t", "s")
        assert view.stats == answers[-1].stats
        turns = await service.timeline("t", "s")
        assert [turn.role for turn in turns] == ["user", "assistant"] * 3
        assert sum(turn.tokens for turn in turns) == seen
        assert turns[0].folded and not turns[-1].folded
        assert turns[0].content == "my cat is Miso" and turns[1].content == answers[0].text

    asyncio.run(run())


def test_sixteen_at_a_time_equal_each_alone(make):
    """Greedy answers of 16 conversations under two tenants: batched and interleaved, as alone."""

    async def talk(service, session, tenant):
        return [(await say(service, session, f"{word} {session}", tenant)).text for word in WORDS[:3]]

    async def together(service):
        names = [(f"s{i % 8}", f"tenant-{i // 8}") for i in range(16)]
        return await asyncio.gather(*(talk(service, *name) for name in names))

    async def one_by_one(service):
        return [await talk(service, f"s{i}", "alone") for i in range(8)]

    service = make(rows=8)
    both = asyncio.run(together(service))
    alone = asyncio.run(one_by_one(service))
    assert both == alone * 2
    assert len({tuple(answers) for answers in alone}) > 4


def test_twins_with_other_memories_never_mix(service):
    """Two users say the same at the same time, on different pasts: each gets the answer of the own past."""

    async def run():
        for tenant, word in (("a", "apples and pears"), ("b", "ships and the sea")):
            await service.create(tenant, "s", messages=user(word))
            await service.fork(tenant, "s", "control")
        alone = [(await say(service, "control", "go on", tenant)).text for tenant in "ab"]
        twins = await asyncio.gather(*(say(service, "s", "go on", tenant) for tenant in "ab"))
        assert [twin.text for twin in twins] == alone and alone[0] != alone[1]

    asyncio.run(run())


def test_the_reach_and_its_end_are_told(make, tokenizer, caplog):
    """A paste longer than the context, folded; the first merge is said once, and what is merged is counted."""
    blocks = {"rule": "bounded", "rule_options": {"blocks": 100}}
    bounded = tiny_compressor(model={"vocab_size": len(tokenizer), "max_position_embeddings": 512}, **blocks)

    async def run():
        service = make(compressor=bounded)
        first = await say(service, "s", "hello")
        assert (first.stats["tokens_merged"], first.stats["reach"]) == (0, first.stats["tokens_seen"])
        assert not caplog.records
        paste = await say(service, "s", "word " * 150)
        last = await say(service, "s", "and now?")
        return [first, paste, last], await service.view("t", "s")

    answers, view = asyncio.run(run())
    for outcome in answers[1:]:
        stats = outcome.stats
        assert stats["tokens_seen"] > 750 and stats["tokens_merged"] > 0
        assert stats["reach"] == stats["tokens_seen"] - stats["tokens_merged"]
        assert abs(stats["reach"] - stats["reach_when_full"]) < 2 * SIZES["window"]
    assert view.stats == answers[-1].stats
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1 and "is merged from here on" in said[0]


def test_more_tokens_than_fit_end_by_length(service):
    async def run():
        outcome = await say(service, "s", "go on", sampling=Sampling(max_tokens=1 << 15, temperature=0))
        return outcome, await say(service, "s", "and?")

    service.engine._ends = set()
    outcome, after = asyncio.run(run())
    assert outcome.finish_reason == "length" and 400 < outcome.completion_tokens < 512
    assert after.known_tokens > outcome.completion_tokens  # all of it was taken in


def test_a_tenant_sees_nothing_of_another(service):
    async def run():
        await say(service, "s", "mine", tenant="a")
        for call in (
            service.view("b", "s"),
            service.timeline("b", "s"),
            service.export("b", "s"),
            service.fork("b", "s"),
            service.append("b", "s", user("x")),
            service.update("b", "s", {}),
            service.rebuild("b", "s"),
            service.delete("b", "s"),
            service.answer("b", "s", user("x"), GREEDY),
            service.answer("b", "s", user("x"), GREEDY, create=True, version=1),
            service.compact("b", user("x"), "s"),
        ):
            with pytest.raises(NotFoundError):
                await call
        assert await service.sessions("b") == []
        assert (await service.view("a", "s")).version == 1

    asyncio.run(run())


def test_one_turn_at_a_time(service):
    async def run():
        turn = await service.answer("t", "s", user("a"), Sampling(max_tokens=60, temperature=0), create=True)
        for call in (
            service.answer("t", "s", user("b"), GREEDY, create=True),
            service.append("t", "s", user("b")),
            service.delete("t", "s"),
        ):
            with pytest.raises(BusyError):
                await call
        other = await say(service, "s", "b", tenant="other")
        assert other.version == 1
        assert (await turn.finish()).version == 1
        assert (await say(service, "s", "b")).version == 2

    asyncio.run(run())


def test_a_turn_that_is_closed_commits_nothing(service):
    async def run():
        first = await say(service, "s", "a")
        turn = await service.answer("t", "s", user("b"), Sampling(max_tokens=200, temperature=0))
        async for _ in turn:
            break
        await turn.aclose()
        new = await service.answer(
            "t", "new", user("b"), Sampling(max_tokens=200, temperature=0), create=True
        )
        await new.aclose()
        again = await say(service, "s", "b")  # not busy any more
        assert again.version == first.version + 1
        assert [turn.role for turn in await service.timeline("t", "s")] == ["user", "assistant"] * 2
        with pytest.raises(NotFoundError):
            await service.view("t", "new")

    asyncio.run(run())


def test_a_caller_who_leaves_during_the_commit_does_not_stop_it(service, monkeypatch):
    async def run():
        began = asyncio.Event()
        loop = asyncio.get_running_loop()
        real = service.store.commit

        def commit(*args):
            loop.call_soon_threadsafe(began.set)
            import time

            time.sleep(0.3)
            return real(*args)

        monkeypatch.setattr(service.store, "commit", commit)
        turn = await service.answer("t", "s", user("a"), GREEDY, create=True)
        task = asyncio.create_task(turn.finish())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(BusyError):
            await say(service, "s", "b")
        await service.running.drain()
        assert (await service.view("t", "s")).version == 1

    asyncio.run(run())


def test_two_servers_on_one_store(make):
    """The slower of two writers gets a conflict, and its turn leaves no trace."""
    one, two = make(), make()

    async def run():
        await say(one, "s", "a")
        slow = await one.answer("t", "s", user("slow"), Sampling(max_tokens=80, temperature=0))
        quick = await say(two, "s", "quick")
        assert quick.version == 2
        with pytest.raises(ConflictError) as caught:
            await slow.finish()
        assert caught.value.version == 2
        assert [t.content for t in await one.timeline("t", "s") if t.role == "user"] == ["a", "quick"]
        assert (await say(one, "s", "b")).version == 3  # and goes on from the other's version

    asyncio.run(run())


def test_an_answer_that_has_no_place_is_refused_before_it_is_written(make, monkeypatch):
    """A history that ends with an answer, for a template whose speakers take turns."""
    service = make()
    whole = service.template.text

    def strict(messages, tools=(), generation=False):
        roles = [message.role for message in messages]
        if ("assistant", "assistant") in pairwise(roles):
            raise ConfigError("take turns")
        return whole(messages, tools, generation)

    monkeypatch.setattr(service.template, "text", strict)

    async def run():
        history = [*user("Hi."), Message("assistant", "Hello.")]
        with pytest.raises(ConfigError, match="take turns"):
            await service.answer("t", "s", history, GREEDY, create=True, resent=True)
        await say(service, "s", "Hi again.")

    asyncio.run(run())


def test_stateless_answers_leave_nothing(service, compressor, tokenizer):
    async def run():
        turn = await service.answer("t", None, user("hello"), GREEDY)
        outcome = await turn.finish()
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
        )
        assert outcome.prompt_tokens == len(ids) and outcome.session is None
        assert await service.sessions("t") == []

    asyncio.run(run())


def test_limits_and_failures_commit_nothing(make, monkeypatch):
    async def run():
        service = make(Limits(sessions=1), input_tokens=60)
        await say(service, "s", "a")
        with pytest.raises(QuotaError):
            await say(service, "second", "a")
        assert [info.session for info in await service.sessions("t")] == ["s"]
        with pytest.raises(ConfigError, match="limit is 60"):
            await say(service, "s", "x" * 80)
        for session in ("s", None):
            with monkeypatch.context() as patch, pytest.raises(ConfigError, match="1000 characters"):
                patch.setattr(service, "tokenizer", None)  # it is not even tokenized
                await service.answer("t", session, user("x" * 1000), GREEDY)
        with pytest.raises(ConfigError, match="got no messages"):
            await service.answer("t", "s", [], GREEDY)

        def broken(*args):
            raise StorageError("the disk is full")

        monkeypatch.setattr(service.store, "commit", broken)
        with pytest.raises(StorageError):
            await say(service, "s", "b")
        monkeypatch.undo()
        assert (await say(service, "s", "b")).version == 2

    asyncio.run(run())


def test_turns_that_are_cut_hear_why_and_leave_nothing(service):
    async def run():
        long = Sampling(max_tokens=10_000, temperature=0)
        turn = await service.answer("t", "s", user("a"), long, create=True)
        aside = await service.answer("t", None, user("b"), long)
        alone = await service.answer("t", "u", user("c"), long, create=True, disconnect="finish")
        await alone.aclose()
        service.running.cut()
        for each in (turn, aside):
            with pytest.raises(StoppingError, match="nothing of it is kept"):
                await each.finish()
        await service.running.drain()
        assert (await service.view("t", "u")).version == 1  # its client had gone; it is cut short and kept
        with pytest.raises(NotFoundError):
            await service.view("t", "s")

    asyncio.run(run())


def test_draining(service):
    async def run():
        turn = await service.answer("t", "s", user("a"), Sampling(max_tokens=40, temperature=0), create=True)
        drained = asyncio.create_task(service.running.drain())
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await say(service, "other", "b")
        assert await service.health.ready() == ["the server is about to stop"]
        assert not drained.done()
        assert (await turn.finish()).version == 1
        await drained

    asyncio.run(run())


def test_ready(service, monkeypatch, caplog):
    async def run():
        assert await service.health.ready() == []
        looks = []

        def broken():
            looks.append(1)
            raise StorageError("/secret/place: the disk is full")

        monkeypatch.setattr(service.store, "check_health", broken)
        assert await service.health.ready() == []  # a look writes, so its result holds for a moment
        monkeypatch.setattr("ccm.serving.health.FRESH", 0.0)
        (reason,) = await service.health.ready()
        assert "cannot be written" in reason and "secret" not in reason and looks == [1]
        assert "/secret/place" in caplog.text
        monkeypatch.undo()
        monkeypatch.setattr(service.engine, "idle_seconds", lambda: 100.0)
        assert "silent for 100 s" in (await service.health.ready())[0]

    asyncio.run(run())


def test_a_dead_engine_refuses(service):
    async def run():
        service.engine.close()
        with pytest.raises(EngineError):
            await say(service, "s", "a")
        with pytest.raises(EngineError):  # and the conversation is not busy for ever
            await say(service, "s", "a")

    asyncio.run(run())
