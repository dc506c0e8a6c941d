"""The life of conversations: rebuilt, carried away and brought back, and what a crash leaves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from talks import GREEDY, say, user
from tiny import tiny_compressor

from ccm import Session
from ccm.chat.messages import Message
from ccm.core.memory import KV
from ccm.errors import ConfigError, MemoryFileError, MismatchError
from ccm.serving.store import ConflictError, NotFoundError

pytest_plugins = ("service_fixtures",)


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
        cuts = [turn.cut for turn in await changed.timeline("t", "s")]
        view = await changed.rebuild("t", "s")
        assert cuts[-1] and cuts == [turn.cut for turn in await changed.timeline("t", "s")]
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
        return replace(good, rows=(replace(row, **change(row)),)).dumps()

    def narrow(kv):
        return KV(kv.keys[..., :4], kv.values[..., :4])

    parts = ("sink", "slots", "window")
    bad = [
        forged(lambda row: {name: narrow(getattr(row, name)) for name in parts}),
        forged(lambda row: {"slots": KV(*(t.repeat(1, 1, 300, 1) for t in row.slots))}),
        replace(good, rows=good.rows * 2).dumps(),
        good.dumps({"session": '{"turns": -1}'}),
        good.dumps({"session": "[]"}),
        b"not a file",
        good.dumps()[:-3],
    ]

    async def run():
        for i, data in enumerate(bad):
            with pytest.raises((MemoryFileError, ConfigError)):
                await service.load("t", data)
                pytest.fail(f"{i} was taken")
        other = replace(good, fingerprint="another")
        with pytest.raises(MismatchError):
            await service.load("t", other.dumps())
        assert await service.sessions("t") == []
        assert (await service.load("t", good.dumps())).version == 1

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
