"""Pins on the server: they stay, whatever is taken back, copied, sent elsewhere or read from the store again."""

from __future__ import annotations

import asyncio

import pytest
import torch
from talks import GREEDY, say, user

from ccm import Session
from ccm.chat.messages import Message
from ccm.errors import ConfigError

pytest_plugins = ("service_fixtures", "api_fixtures")

TEXT = "Rex bites"


def pins_of(state) -> torch.Tensor:
    return state.memory.rows[0].pins.values


def test_a_pin_stays_over_a_restart_and_equals_a_session(make, compressor, tokenizer) -> None:
    session = Session(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)

    async def run() -> None:
        service = make(precision="float32")
        await say(service, "twin", "my cat is Miso")
        await say(service, "s", "my cat is Miso")
        session.generate("my cat is Miso", max_new_tokens=10, do_sample=False)
        view = await service.pin("t", "s", TEXT)
        session.pin(TEXT)
        assert view.pins == [TEXT] and view.stats == session.stats() and view.stats["pinned"] > 0
        service = make(precision="float32")  # another server on the same store
        outcome = await say(service, "s", "who is who?")
        assert outcome.text == session.generate("who is who?", max_new_tokens=10, do_sample=False)
        assert outcome.stats == session.stats()
        assert (await service.view("t", "twin")).stats["pinned"] == 0
        inside = await service.inside("t", "s")
        assert inside.pins == (TEXT,) and inside.parts[0].kind == "pinned"
        assert (await service.reading("t", "s")).read[0][0] > 0

    asyncio.run(run())


@pytest.mark.parametrize("texts", [True, False])
def test_what_is_taken_back_leaves_it(make, texts: bool) -> None:
    """An older version was stored without it; and one that is made anew has it as well."""

    async def run() -> None:
        service = make(texts=texts, resend="rebuild")
        first = await say(service, "s", "a")
        second = await say(service, "s", "b")
        await service.pin("t", "s", TEXT)
        pinned = pins_of(await service.records.load("t", "s"))
        known = [*user("a"), Message("assistant", first.text), *user("c")]
        turn = await service.answer("t", "s", known, GREEDY, resent=True)
        assert turn.taken.rewound == 2 and second.text
        await turn.finish()
        assert torch.equal(pins_of(await service.records.load("t", "s")), pinned)
        other = [*user("x"), Message("assistant", "y"), *user("z")]
        turn = await service.answer("t", "s", other, GREEDY, resent=True)
        assert turn.taken.rebuilt == 3
        await turn.finish()
        assert torch.equal(pins_of(await service.records.load("t", "s")), pinned)
        if texts:
            await service.rebuild("t", "s")
            assert torch.allclose(pins_of(await service.records.load("t", "s")), pinned, atol=1e-2)
        assert (await service.view("t", "s")).pins == ([TEXT] if texts else [])

    asyncio.run(run())


def test_copies_and_files_have_it(make, compressor, tokenizer) -> None:
    async def run() -> None:
        service = make()
        await say(service, "s", "a")
        stats = (await service.pin("t", "s", TEXT)).stats
        assert (await service.fork("t", "s", "copy")).stats == stats
        data = await service.export("t", "s")
        back = await service.load("t", data, "back")
        assert back.stats == stats and back.pins == [TEXT]

    asyncio.run(run())


def test_a_pin_that_does_not_fit_changes_nothing(make) -> None:
    async def run() -> None:
        service = make()
        version = (await say(service, "s", "a")).version
        for text in (" ", "far too long " * 300):
            with pytest.raises(ConfigError, match=r"nothing to pin|does not fit"):
                await service.pin("t", "s", text)
        view = await service.view("t", "s")
        assert view.version == version and view.pins == [] and view.stats["pinned"] == 0

    asyncio.run(run())


def test_over_http(http) -> None:
    http.post("/v1/conversations", json={}).raise_for_status()
    session = http.post("/v1/conversations", json={}).json()["id"]
    shown = http.post(f"/v1/memories/{session}/pins", json={"text": TEXT})
    assert shown.status_code == 200 and shown.json()["pins"] == [TEXT] and shown.json()["stats"]["pinned"] > 0
    refused = http.post(f"/v1/memories/{session}/pins", json={"text": "too long " * 500})
    assert refused.status_code == 400 and "does not fit" in refused.json()["error"]["message"]
    assert http.post("/v1/memories/none/pins", json={"text": TEXT}).status_code == 404
