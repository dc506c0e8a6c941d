"""Conversations over engine and store: whole turns, one at a time, and nobody else's."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest
from tiny import tiny_compressor, tiny_tokenizer

from ccm import Session
from ccm.errors import ConfigError, MemoryFileError, MismatchError, StorageError
from ccm.memory import KV
from ccm.messages import Message
from ccm.methods import as_method
from ccm.serving.engine import EngineError, OverloadedError, PaddedEngine
from ccm.serving.service import BusyError, Sampling, Service, Settings
from ccm.serving.store import ConflictError, Limits, NotFoundError, QuotaError, open_store
from ccm.storage import memory_file

SIZES = {"slots": 2, "sink": 2, "window": 16, "segment": 8}
GREEDY = Sampling(max_tokens=10, temperature=0)
WORDS = ["red", "green", "blue", "seven", "eight", "nine", "cats", "dogs", "birds", "sun", "moon", "rain"]


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


def user(text):
    return [Message("user", text)]


async def say(service, session, text, tenant="t", sampling=GREEDY, **options):
    turn = await service.answer(tenant, session, user(text), sampling, **{"create": True, **options})
    return await turn.finish()


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


def test_a_restart_changes_nothing(make):
    async def run():
        service = make()
        await say(service, "s", "my cat is Miso")
        await service.fork("t", "s", "control")
        expected = await say(service, "control", "what is my cat?")
        assert (await say(make(), "s", "what is my cat?")).text == expected.text

    asyncio.run(run())


def test_versions_branch(service):
    async def run():
        first = await say(service, "", "a")
        second = await say(service, first.session, "b", version=1)
        assert (second.session, second.version) == (first.session, 2)
        branch = await say(service, first.session, "c", version=1)
        assert branch.session != first.session and branch.version == 1
        texts = [t.content for t in await service.timeline("t", branch.session) if t.role == "user"]
        assert texts == ["a", "c"]
        assert [t.content for t in await service.timeline("t", first.session)][2] == "b"
        with pytest.raises(NotFoundError):
            await say(service, first.session, "d", version=9)

    asyncio.run(run())


def test_histories_that_are_sent_again(make):
    async def run():
        service = make()
        first = await say(service, "s", "a")
        await service.fork("t", "s", "control")
        known = [*user("a"), Message("assistant", f" {first.text}\n")]  # clients trim, or do not
        turn = await service.answer("t", "s", [*known, *user("b")], GREEDY, resent=True)
        second = await turn.finish()
        assert second.text == (await say(service, "control", "b")).text
        assert second.known_tokens == first.stats["tokens_seen"]
        other = [*user("x"), Message("assistant", "y"), *user("b")]
        with pytest.raises(ConflictError, match="another history"):
            await service.answer("t", "s", other, GREEDY, resent=True)
        with pytest.raises(ConfigError, match="knows all"):
            await service.answer(
                "t", "s", [*known, *user("b"), Message("assistant", second.text)], GREEDY, resent=True
            )
        assert (await service.view("t", "s")).version == 2

        service = make(resend="rebuild")
        turn = await service.answer("t", "s", other, GREEDY, resent=True)
        rebuilt = await turn.finish()
        fresh = await (await service.answer("t", "fresh", other, GREEDY, create=True)).finish()
        assert rebuilt.text == fresh.text and rebuilt.version == 3
        assert rebuilt.stats == fresh.stats
        assert [t.content for t in await service.timeline("t", "s")][:3] == ["x", "y", "b"]

    asyncio.run(run())


# ------------------------------------------------------------------ histories that are almost the same


class Chat:
    """A client of one conversation that sends the history it shows."""

    def __init__(self, service, session="s"):
        self.service, self.session, self.shown = service, session, []

    async def send(self, messages, **options):
        turn = await self.service.answer(
            "t", self.session, messages, GREEDY, create=True, resent=True, **options
        )
        outcome = await turn.finish()
        self.shown = [*messages, Message("assistant", outcome.text)]
        return outcome

    async def say(self, text, **options):
        return await self.send([*self.shown, *user(text)], **options)

    async def held(self):
        return [turn.content for turn in await self.service.timeline("t", self.session)]

    async def is_as_if(self, messages, outcome, turns=0):
        """Whether memory and answer are those of a conversation that never went another way.

        Its first ``turns`` are said one by one, as here; what was read again was read from its text.
        """
        fresh = Chat(self.service, f"fresh-{outcome.version}")
        for message in messages[: 2 * turns : 2]:
            await fresh.say(message.content)
        told = await fresh.send(messages)
        assert (told.text, told.stats) == (outcome.text, outcome.stats)
        if self.service.settings.texts:
            assert await self.held() == await fresh.held() == [m.content for m in fresh.shown]
        return True


def numbers(outcome):
    taken = outcome.taken
    return taken.matched, taken.appended, taken.rewound, taken.rebuilt


@pytest.mark.parametrize("texts", [True, False])
def test_an_answer_is_written_again(make, texts):
    async def run():
        chat = Chat(make(texts=texts))
        for n, text in enumerate(("a cat", "a dog", "a bird")):
            outcome = await chat.say(text)
            assert numbers(outcome) == (2 * n, 1, 0, 0)
        again = chat.shown[:-1]
        outcome = await chat.send(again)
        assert numbers(outcome) == (4, 1, 2, 0) and outcome.version == 4
        assert await chat.is_as_if(again, outcome, turns=2)
        for _ in range(3):  # again and again: the version before the turn stays
            assert numbers(await chat.send(again)) == (4, 1, 2, 0)
        earlier = chat.shown[:3]
        outcome = await chat.send(earlier)
        assert numbers(outcome) == (2, 1, 4, 0) and await chat.is_as_if(earlier, outcome, turns=1)
        assert numbers(await chat.say("more")) == (4, 1, 0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 9])
def test_a_message_in_the_middle_is_edited(make, keep, texts):
    """Also when no version from before is kept: what was known is then read again."""

    async def run():
        chat = Chat(make(Limits(keep=keep), texts=texts))
        for text in WORDS[:5]:
            await chat.say(text)
        edited = [*chat.shown[:4], *user("other")]
        outcome = await chat.send(edited)
        assert numbers(outcome) == (4, 1, 6, 0 if keep == 9 else 4)
        assert await chat.is_as_if(edited, outcome, turns=2 if keep == 9 else 0)
        more = await chat.say("more")
        assert numbers(more) == (6, 1, 0, 0)
        whole = [*chat.shown, *user("more")]
        whole[2] = Message("user", "edited where it stands")
        outcome = await chat.send(whole)
        assert numbers(outcome)[:3] == (2, 7, 6) and await chat.is_as_if(whole, outcome, int(keep == 9))

    asyncio.run(run())


def test_a_version_of_another_branch_is_no_place_to_go_back_to(make):
    async def run():
        chat = Chat(make(Limits(keep=20)))
        await chat.say("a cat")
        await chat.say("a dog")
        branch = [*chat.shown[:2], *user("a bird")]
        await chat.send(branch)
        outcome = await chat.say("a fish")
        edited = [*chat.shown[:4], *user("a snail")]  # version 2 knows four messages as well, but not these
        outcome = await chat.send(edited)
        assert numbers(outcome) == (4, 1, 2, 0) and await chat.is_as_if(edited, outcome, turns=2)
        assert (await chat.service.fork("t", "s", "copy")).stats == outcome.stats
        held = await chat.held()
        await chat.service.rebuild("t", "s")
        assert await chat.held() == held == [m.content for m in chat.shown]
        copy = Chat(chat.service, "copy")
        outcome = await copy.send([*chat.shown[:2], *user("a worm")])  # a copy has one version only
        assert numbers(outcome) == (2, 1, 4, 2) and await copy.is_as_if(
            [*chat.shown[:2], *user("a worm")], outcome
        )

    asyncio.run(run())


def test_a_trimmed_history_loses_nothing(make):
    async def run():
        trimming, whole = Chat(make()), Chat(make(), "whole")
        for n, text in enumerate(WORDS):
            expected = await whole.say(text)
            outcome = await trimming.say(text)
            assert (outcome.text, outcome.stats) == (expected.text, expected.stats)
            assert numbers(outcome) == (min(2 * n, 2), 1, 0, 0)
            trimming.shown = trimming.shown[-2:]
        assert outcome.stats["turns"] == 24

    asyncio.run(run())


@pytest.mark.parametrize("resend", ["match", "refuse", "rebuild"])
def test_a_longer_memory_is_not_replaced_unless_it_is_asked_for(make, resend):
    async def run():
        service = make(resend=resend)
        chat = Chat(service)
        for text in WORDS[:4]:
            await chat.say(text)
        held = chat.shown
        outcome = await chat.send([*held[-2:], *user("more")])  # trimmed: nobody asks for less
        assert outcome.stats["turns"] == 10
        other = [*user("x"), Message("assistant", "y"), *user("z")]
        edited = [*held[:2], *user("z")]
        for messages, fine in ((other, resend == "rebuild"), (edited, resend != "refuse")):
            fork = Chat(service, (await service.fork("t", "s")).session)
            if fine:
                assert await fork.is_as_if(messages, await fork.send(messages))
                fork.session = (await service.fork("t", "s")).session
            else:
                with pytest.raises(ConflictError, match=r"another history|take back 8 of the 10"):
                    await fork.send(messages)
            with pytest.raises(ConflictError, match="X-CCM-Resend"):  # each request may say otherwise
                await fork.send(messages, resend="refuse")
            assert (await service.view("t", fork.session)).stats["turns"] == 10
            rebuilt = await fork.send(messages, resend="rebuild")
            assert numbers(rebuilt) == ((0, 0, 10, 3) if messages is other else (2, 1, 8, 2))

    asyncio.run(run())


@pytest.mark.parametrize("texts", [True, False])
def test_a_clock_in_the_system_prompt(make, texts):
    async def run():
        service = make(texts=texts)
        chat, control = Chat(service), Chat(service, "control")
        for n, text in enumerate(WORDS[:4]):
            for one, time in ((chat, f"10:0{n}"), (control, "10:00")):
                system = Message("system", f"Be kind.\nIt is {time}.")
                outcome = await one.send([system, *[m for m in one.shown if m.role != "system"], *user(text)])
            assert outcome.taken.system == ("known" if n else "taken in")
            view = await service.view("t", "s")
            assert view.stats == outcome.stats and view.stats["turns"] == 2 * n + 3
        outcome = await chat.send([Message("system", "Be kind.\nBe brief.\nIt is 11:00."), *user("more")])
        assert outcome.taken.system == "taken in" and numbers(outcome) == (0, 2, 0, 0)
        if texts:
            assert (await chat.held())[-3:-1] == ["Be brief.", "more"]

    asyncio.run(run())


def test_what_cannot_be_taken_back_is_refused(make, compressor, tokenizer):
    async def run():
        chat = Chat(make(Limits(keep=1), texts=False))
        for text in WORDS[:4]:
            await chat.say(text)
        shown = chat.shown
        with pytest.raises(ConflictError, match="no version from before is kept"):
            await chat.send([*shown[4:6], *user("other")])  # trimmed, so that what was before is nowhere
        assert (await chat.service.view("t", "s")).version == 4
        assert numbers(await chat.send([*shown, *user("more")])) == (8, 1, 0, 0)

        service = make(Limits(keep=3))
        session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)
        session.append("an imported past", role="user")
        await service.load("t", memory_file.dumps(session.memory, {"session": '{"turns": 1}'}), "back")
        chat = Chat(service, "back")
        before = (await chat.say("a cat")).stats
        edited = [*chat.shown, *user("a dog")]
        await chat.send(edited)
        outcome = await chat.send([*edited[:2], *user("a bird")])
        assert outcome.stats["turns"] == before["turns"] + 2  # the imported past is still there
        with pytest.raises(ConflictError, match="no version from before is kept"):
            await chat.send([*user("x"), *chat.shown[1:], *user("more")])

    asyncio.run(run())


def test_system_text_that_the_template_knows_only_at_the_beginning(make, monkeypatch):
    async def run():
        service = make()
        chat = Chat(service)
        await chat.send([Message("system", "Be kind."), *user("a cat")])
        add = service.records.dialogues.add

        def strict(dialogue, message, *options):
            if message.role == "system" and (dialogue.last or message.content == "No."):
                raise ConfigError("the chat template refuses this")
            return add(dialogue, message, *options)

        monkeypatch.setattr(service.records.dialogues, "add", strict)
        outcome = await chat.send([Message("system", "Be brief."), *chat.shown[1:], *user("a dog")])
        assert outcome.taken.system == "kept" and numbers(outcome) == (2, 1, 0, 0)
        turn = await service.answer("t", "s", user("more"), GREEDY, instructions="Be a cat.")
        assert (await turn.finish()).taken.system == "kept"
        with pytest.raises(ConfigError, match="refuses"):  # at the beginning it is needed
            await Chat(service, "new").send([Message("system", "No."), *user("a dog")])

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


def test_what_was_taken_in_by_another_way_stays(service):
    async def run():
        chat = Chat(service)
        await chat.say("a cat")
        await service.append("t", "s", user("by the way"))
        assert numbers(await chat.say("a dog")) == (2, 1, 0, 0)
        again = chat.shown[:-1]
        assert numbers(await chat.send(again)) == (2, 1, 2, 0)
        assert (await chat.held())[2:4] == ["by the way", "a dog"]

    asyncio.run(run())


def test_going_back_is_one_commit(make):
    """Of two writers one wins, and the loser leaves no trace."""
    one, two = make(), make()

    async def run():
        chat = Chat(one)
        for text in WORDS[:3]:
            await chat.say(text)
        back = await one.answer(
            "t", "s", chat.shown[:-1], Sampling(max_tokens=80, temperature=0), resent=True
        )
        quick = await Chat(two).send([*chat.shown, *user("quick")])
        with pytest.raises(ConflictError):
            await back.finish()
        view = await one.view("t", "s")
        assert (view.version, view.stats) == (4, quick.stats)
        assert len(await one.timeline("t", "s")) == 8

    asyncio.run(run())


def test_the_first_question_again(make):
    """A client that sends its history means the first answer; one that sends what is new says it with `refuse`."""

    async def run():
        chat = Chat(make())
        first = await chat.say("tell me a joke")
        again = await chat.send(user("tell me a joke"))
        assert numbers(again) == (0, 1, 2, 0) and (again.text, again.stats) == (first.text, first.stats)
        outcome = await chat.send(user("tell me a joke"), resend="refuse")
        assert numbers(outcome) == (0, 1, 0, 0) and outcome.stats["turns"] == 4

    asyncio.run(run())


def test_a_question_that_was_never_answered(make):
    async def run():
        service = make()
        await service.append(
            "t", (await service.create("t", "s", messages=user("a cat"))).session, user("and?")
        )
        chat = Chat(service)
        outcome = await chat.send([*user("a cat"), *user("and?")])
        assert numbers(outcome) == (2, 0, 0, 0) and outcome.version == 4
        assert [m.role for m in await service.timeline("t", "s")] == ["user", "user", "assistant"]

    asyncio.run(run())


TASK = "### Task:\nGenerate a title.\n### Chat History:\n<chat_history>\nUSER: a cat\n</chat_history>"


def test_what_is_no_part_of_the_conversation(make):
    async def run():
        service = make()
        title = await (await service.answer("t", "s", user(TASK), GREEDY, create=True, resent=True)).finish()
        assert title.session is None  # nothing is known yet
        with pytest.raises(NotFoundError):
            await service.view("t", "s")
        chat = Chat(service)
        await chat.say("a cat")
        first = await chat.say("a dog")
        shown = chat.shown
        running = await service.answer(
            "t", "s", user("x"), Sampling(max_tokens=60, temperature=0), resent=True
        )
        title = await chat.send(user(TASK))  # at the same time
        assert (title.session, title.version, title.stats) == ("s", first.version, first.stats)
        assert title.taken.ephemeral and title.known_tokens == first.stats["tokens_seen"]
        await running.aclose()
        marked = await chat.send([*shown, *user("give it a name")], aside=True)
        twin = Chat(service, (await service.fork("t", "s")).session)
        assert marked.text == (await twin.send([*shown, *user("give it a name")])).text
        assert marked.taken.matched == 4 and marked.stats == first.stats
        other = await chat.send([*user("x"), Message("assistant", "y"), *user("a name")], aside=True)
        assert other.text and other.taken.matched == 0
        view = await service.view("t", "s")
        assert (view.version, view.stats) == (2, first.stats)
        kept = await chat.send([*shown, *user(TASK)], aside=False)  # a user who does talk of such a thing
        assert kept.version == 3 and (await chat.held())[-2] == TASK

    asyncio.run(run())


def test_thoughts_that_were_stripped(make, monkeypatch):
    async def run():
        service = make()
        thinking = Message("assistant", "<think>\nhm\n</think>\n\nBlue.")
        await service.create("t", "s", messages=[*user("which?"), thinking])
        chat = Chat(service)
        stripped = [*user("which?"), Message("assistant", "Blue."), *user("why?")]
        assert numbers(await chat.send(stripped)) == (2, 1, 0, 0)
        chat.shown[1] = Message("assistant", "Blue.", reasoning="other thoughts")
        assert numbers(await chat.say("and?")) == (4, 1, 0, 0)

    asyncio.run(run())


def test_rebuild_with_another_adapter(make, tokenizer):
    other = tiny_compressor(model={"vocab_size": len(tokenizer), "max_position_embeddings": 512}, rule="mean")

    async def run():
        service = make()
        answer = await say(service, "s", "my cat is Miso")
        changed = make(compressor=other)
        for call in (say(changed, "s", "b"), changed.export("t", "s"), changed.append("t", "s", user("b"))):
            with pytest.raises(MismatchError, match="rebuild"):
                await call
        assert (await changed.view("t", "s")).version == 1  # it can still be looked at
        view = await changed.rebuild("t", "s")
        assert view.version == 2 and view.fingerprint == other.fingerprint()
        fresh = await changed.create(
            "t", "fresh", messages=[*user("my cat is Miso"), Message("assistant", answer.text)]
        )
        assert view.stats == fresh.stats
        assert (await say(changed, "s", "b")).text == (await say(changed, "fresh", "b")).text

    asyncio.run(run())


def test_without_texts(make):
    async def run():
        service = make(texts=False)
        first = await say(service, "s", "a secret")
        assert [turn.content for turn in await service.timeline("t", "s")] == [None, None]
        assert "secret" not in str(service.store.transcript("t", "s"))
        history = [*user("a secret"), Message("assistant", first.text), *user("b")]
        assert (await (await service.answer("t", "s", history, GREEDY, resent=True)).finish()).version == 2
        with pytest.raises(ConfigError, match="not kept"):
            await service.rebuild("t", "s")

    asyncio.run(run())


def test_export_and_import(service, compressor, tokenizer, tmp_path):
    async def run():
        await say(service, "s", "my cat is Miso")
        data = await service.export("t", "s")
        (tmp_path / "s.ccm").write_bytes(data)
        session = Session.load(tmp_path / "s.ccm", compressor, tokenizer)
        view = await service.load("other", data, "mine")
        assert view.stats == session.stats() == (await service.view("t", "s")).stats
        expected = session.generate("and?", max_new_tokens=10, do_sample=False)
        whole = [*user("my cat is Miso"), Message("assistant", "yes"), *user("and?")]
        with pytest.raises(ConflictError, match="another history"):  # who knows what of it the memory holds
            await service.answer("other", "mine", whole, GREEDY, resent=True)
        assert (await say(service, "mine", "and?", tenant="other")).text == expected
        with pytest.raises(ConflictError):
            await service.load("other", data, "mine")
        session.save(tmp_path / "back.ccm")  # from the library to the server
        back = await service.load("t", (tmp_path / "back.ccm").read_bytes())
        assert back.stats["tokens_seen"] == session.stats()["tokens_seen"]

    asyncio.run(run())


def test_forged_files_are_refused(service, compressor):
    """A file that claims this model's fingerprint and is not of its shape never reaches the engine."""
    good = compressor.compress([[5] * 20], window=16, sink=2)

    def forged(change):
        row = good.rows[0]
        return memory_file.dumps(replace(good, rows=(replace(row, **change(row)),)), {})

    def narrow(kv):
        return KV(kv.keys[..., :4], kv.values[..., :4])

    parts = ("sink", "slots", "window")
    bad = [
        forged(lambda row: {name: narrow(getattr(row, name)) for name in parts}),
        forged(lambda row: {"slots": KV(*(t.repeat(1, 1, 300, 1) for t in row.slots))}),
        memory_file.dumps(replace(good, rows=good.rows * 2), {}),
        memory_file.dumps(good, {"session": '{"turns": -1}'}),
        memory_file.dumps(good, {"session": "[]"}),
        b"not a file",
        memory_file.dumps(good, {})[:-3],
    ]

    async def run():
        for i, data in enumerate(bad):
            with pytest.raises((MemoryFileError, ConfigError)):
                await service.load("t", data)
                pytest.fail(f"{i} was taken")
        other = replace(good, fingerprint="another")
        with pytest.raises(MismatchError):
            await service.load("t", memory_file.dumps(other, {}))
        assert await service.sessions("t") == []
        assert (await service.load("t", memory_file.dumps(good, {}))).version == 1

    asyncio.run(run())


def test_compact(service):
    async def run():
        view, tokens = await service.compact("t", [*user("a b c"), Message("assistant", "d")])
        assert tokens == view.stats["tokens_seen"] > 0
        await service.fork("t", view.session, "control")
        more, _ = await service.compact("t", user("e"), view.session, 1)
        assert more.session != view.session and (await service.view("t", view.session)).version == 1
        await service.append("t", "control", user("e"))
        assert more.stats == (await service.view("t", "control")).stats

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


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_stored_at_lower_precision(make, precision):
    async def run():
        service = make(precision=precision)
        await say(service, "s", "a")
        await say(service, "s", "b")
        stored = service.store.latest("t", "s")
        assert stored.metadata["dtype"] == precision and 0 < stored.metadata["error"]["keys"] < 0.05
        view = await service.view("t", "s")
        assert view.precision == precision and view.error == stored.metadata["error"]

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
        with pytest.raises(ConfigError, match="none"):
            await service.answer("t", "s", [], GREEDY)

        def broken(*args):
            raise StorageError("the disk is full")

        monkeypatch.setattr(service.store, "commit", broken)
        with pytest.raises(StorageError):
            await say(service, "s", "b")
        monkeypatch.undo()
        assert (await say(service, "s", "b")).version == 2

    asyncio.run(run())


def test_metadata_is_kept_across_turns(service):
    async def run():
        await service.create("t", "s", metadata={"a": "1"})
        await say(service, "s", "x")
        assert (await service.view("t", "s")).metadata == {"a": "1"}
        view = await service.update("t", "s", {"b": "2"})
        assert view.metadata == {"b": "2"} and view.stats["turns"] == 2

    asyncio.run(run())


def test_what_a_crash_leaves_can_be_used(service):
    """Between the two steps of a first commit there is a session without a version."""

    async def run():
        service.store.create("t", "s")
        assert (await say(service, "s", "a")).version == 1

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
