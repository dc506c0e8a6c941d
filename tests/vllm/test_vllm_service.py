"""The server with vLLM behind it: what ``ccm serve --vllm`` runs, against the same without."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ccm.serving.build import build_service
from ccm.serving.options import Options
from ccm.serving.service import Message, Sampling
from ccm.serving.store import open_store

GREEDY = Sampling(max_tokens=10, temperature=0)
SAID = ["my cat is Miso", "and I live in Lyon", "what is it?"]


@pytest.fixture
def options(compressor, folder, tmp_path):
    compressor.save_pretrained(tmp_path / "tiny")
    return Options(
        store=f"sqlite://{tmp_path}/memories.db",
        model=str(folder),
        adapter=str(tmp_path / "tiny"),
        slots=2,
        sink=2,
        window=16,
    )


async def say(service, tenant, text):
    turn = await service.answer(tenant, "s", [Message("user", text)], GREEDY, create=True)
    return (await turn.finish()).text


async def talk(service, tenant, texts):
    answers = [await say(service, tenant, text) for text in texts]
    service.close()
    return answers


def test_the_same_answers_as_without(options, vllm, url):
    """Turn by turn on one store, with vLLM and without; two tenants at once in vLLM."""
    alone = asyncio.run(talk(build_service(options), "t", SAID))
    with_vllm = replace(options, vllm=vllm.url, vllm_store=url)
    assert asyncio.run(talk(build_service(with_vllm), "u", SAID)) == alone
    for i, text in enumerate(SAID):  # every turn is written by another server
        service = build_service(with_vllm if i % 2 else options)
        assert asyncio.run(talk(service, "v", [text])) == alone[i : i + 1]
    assert not open_store(url).sessions("vllm turns")


def test_one_store_for_both(options, vllm, url):
    """Without a store of its own for vLLM, turns are staged in the server's."""
    service = build_service(replace(options, store=url, vllm=vllm.url))

    async def both():
        return await asyncio.gather(*(say(service, tenant, SAID[0]) for tenant in ("a", "b")))

    first, second = asyncio.run(both())
    assert first == second
    service.close()
    assert [info.session for info in open_store(url).sessions("a")] == ["s"]
