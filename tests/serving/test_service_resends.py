"""Histories that are sent again, almost the same: what is taken back, and what is taken in."""

from __future__ import annotations

import asyncio

import pytest
from talks import GREEDY, WORDS, say, user

from ccm import Session
from ccm.chat.messages import Message
from ccm.errors import ConfigError
from ccm.serving.service import Sampling
from ccm.serving.store import ConflictError, Limits, NotFoundError

pytest_plugins = ("service_fixtures",)


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


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("keep", [1, 9])
def test_what_is_read_again_keeps_its_marks(make, keep, texts):
    """Which answers were cut off, and what the client was never shown."""

    async def run():
        service = make(Limits(keep=keep), texts=texts)
        chat = Chat(service)

        async def cuts():
            return [turn.cut and turn.cut.tokens for turn in await service.timeline("t", "s")]

        for count in (3, 1, 2):
            messages = [*chat.shown, *user(WORDS[count])]
            sampling = Sampling(max_tokens=count, temperature=0)
            turn = await service.answer("t", "s", messages, sampling, create=True, resent=True)
            chat.shown = [*messages, Message("assistant", (await turn.finish()).text)]
        assert await cuts() == [None, 3, None, 1, None, 2]
        outcome = await chat.send([*chat.shown[:4], *user("other")])  # the newest exchange is taken back
        assert (await cuts())[:-1] == [None, 3, None, 1, None] and outcome.taken.rebuilt == 4 * (keep == 1)
        edited = [*user("edited"), *chat.shown[1:4], *user("more")]
        await chat.send(edited)  # what follows the edited message comes from the request
        assert (await cuts())[:-1] == [None, 3, None, 1, None]
        if texts:
            await service.append("t", "s", user("by the way"))
            told = chat.shown
            await chat.say("and now")
            for _ in range(2):  # the client, who was never shown it, goes back to behind it
                assert numbers(await chat.send([*told, *user("or now")]))[:3] == (len(told), 1, 2)
                assert (await chat.held())[-3:-1] == ["by the way", "or now"]

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
        await service.load("t", session.memory.dumps({"session": '{"turns": 1}'}), "back")
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


@pytest.mark.parametrize("keep", [1, 9])
def test_instructions_where_a_turn_goes_back(make, keep):
    """They stand behind what is read again, and are not read again themselves."""

    async def run():
        service = make(Limits(keep=keep))
        for text in ("a cat", "a dog"):
            await say(service, "s", text, instructions="Be kind.")
        held = [turn.content for turn in await service.timeline("t", "s")]
        assert held[:2] == ["Be kind.", "a cat"] and len(held) == 5
        for words, new, system in (
            ("Be kind.", [], "known"),
            ("Be kind.\nBe brief.", ["Be brief."], "taken in"),
        ):
            outcome = await say(service, "s", "a bird", keep=3, instructions=words)
            assert (outcome.taken.appended, outcome.taken.system) == (1 + len(new), system)
            assert outcome.taken.rebuilt == 3 * (keep == 1)
            now = [turn.content for turn in await service.timeline("t", "s")]
            assert now[:-1] == [*held[:3], *new, "a bird"]

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
