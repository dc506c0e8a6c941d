"""Looking inside over HTTP, and going back by count: what the page of the server lives on."""

from __future__ import annotations

import asyncio
import json
import re
from importlib.resources import files

import httpx
import openai
import pytest
import torch
from asking import ask, user
from services import SIZES, serving, tiny_service
from talks import GREEDY, say
from tiny import tiny_compressor, tiny_tokenizer

from ccm import Session
from ccm.chat.messages import Message
from ccm.core.memory import Memory
from ccm.errors import ConfigError
from ccm.methods import open_method
from ccm.methods.inside import saved
from ccm.serving.service import Service, Settings
from ccm.serving.store import ConflictError, Limits, open_store

pytest_plugins = ("api_fixtures", "service_fixtures")


def keep(client, count, text, session, **options):
    headers = {"X-Session-Id": session, "X-CCM-Keep": str(count)}
    options = {"temperature": 0, "max_tokens": 10, **options}
    return client.chat.completions.create(model="ccm", messages=user(text), extra_headers=headers, **options)


def shown(http, session):
    return [turn["content"] for turn in http.get(f"/v1/memories/{session}").json()["turns"]]


@pytest.fixture
def alone():
    tokenizer = tiny_tokenizer()
    model = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return Session(tiny_compressor(model=model), tokenizer, **SIZES)


def test_going_back_is_as_if_it_had_never_been_said(client, http):
    """Also where the words alone cannot say how far: the first message, and one that was said twice."""
    for text in ("hello", "my cat is Miso", "hello", "what is it?"):
        ask(client, text, "back")
    for count, said in ((6, "who sleeps?"), (2, "my dog is Rex"), (0, "good morning")):
        texts = shown(http, "back")
        answer = keep(client, count, said, "back")
        assert answer.memory["history"]["rewound"] == len(texts) - count
        assert shown(http, "back")[: count + 1] == [*texts[:count], said]
        fresh = f"fresh-{count}"
        for i in range(0, count, 2):  # another conversation that was told just that
            again = ask(client, texts[i], fresh)
            assert again.choices[0].message.content == texts[i + 1]
        other = ask(client, said, fresh)
        assert other.choices[0].message.content == answer.choices[0].message.content
        stats = [http.get(f"/v1/memories/{name}").json()["stats"] for name in ("back", fresh)]
        assert stats[0] == stats[1]


def test_going_back_nowhere_is_going_on_and_too_far_is_refused(client, http):
    ask(client, "hello", "nowhere")
    assert keep(client, 2, "and more", "nowhere").memory["turns"] == 4
    with pytest.raises(openai.ConflictError, match="got 9 messages to keep, the conversation knows 4"):
        keep(client, 9, "again", "nowhere")
    with pytest.raises(openai.BadRequestError):
        keep(client, -1, "again", "nowhere")
    assert http.get("/v1/memories/nowhere").json()["stats"]["turns"] == 4


def test_a_task_of_a_client_is_a_message_where_it_says_how_far_to_go_back(client, http):
    ask(client, "hello", "task")
    text = "### Task: tell me\n### Chat History:\n<chat_history>"
    assert keep(client, 0, text, "task").memory["turns"] == 2 and shown(http, "task")[0] == text


def test_going_back_without_texts_and_versions_is_refused(make):
    async def run():
        service = make(texts=False, limits=Limits(keep=1))
        for text in ("a", "b", "c"):
            await say(service, "s", text)
        with pytest.raises(ConflictError, match="no version from before is kept"):
            await service.answer("t", "s", [Message("user", "x")], GREEDY, keep=2)
        assert (await service.view("t", "s")).stats["turns"] == 6

    asyncio.run(run())


def test_inside_says_which_turns_entries_stand_for(client, http, alone):
    for text in ("my cat is Miso", "it sleeps"):
        ask(client, text, "inside")
        alone.generate(text, max_new_tokens=10, do_sample=False)
    found = http.get("/v1/memories/inside/inside").json()
    assert found["object"] == "memory.inside" and found["read"] == [] and found["answer"] is None
    expected = alone.inside().as_dict()
    assert found["parts"] == [{**part, **_lists(part)} for part in expected["parts"]]
    assert [turn["role"] for turn in found["turns"]] == ["user", "assistant"] * 2
    assert http.get("/v1/memories/nobody/inside").status_code == 404


def _lists(part):
    return {name: list(part[name]) for name in ("entries", "tokens", "turns")}


def test_the_newest_answer_is_read_from_the_memory_before_it(client, http, alone):
    texts = ["my cat is Miso", "it sleeps", "what is it called?"]
    for text in texts:
        answer = ask(client, text, "reading").choices[0].message.content
    for text in texts[:-1]:
        alone.generate(text, max_new_tokens=10, do_sample=False)
    expected = alone.ask(texts[-1], max_new_tokens=10, do_sample=False).as_dict()
    version = http.get("/v1/memories/reading").json()["version"]
    found = http.post("/v1/memories/reading/reading").json()
    assert found["answer"] == answer == expected["answer"] and found["layers"] == [[0, 1], [1, 2], [2, 3]]
    assert torch.allclose(torch.tensor(found["read"]), torch.tensor(expected["read"]), atol=2e-3)
    assert [line["entries"] for line in found["lines"]] == [
        list(line["entries"]) for line in expected["lines"]
    ]
    assert http.get("/v1/memories/reading").json()["version"] == version  # nothing is changed
    other = http.post("/v1/memories/reading/reading").json()
    assert other == found
    ask(client, "and more", "reading")
    assert http.post("/v1/memories/reading/reading").json()["read"] != found["read"]


def test_a_reading_needs_an_answer_whose_text_is_there(client, http, make):
    made = client.conversations.create(items=user("hello"))
    refused = http.post(f"/v1/memories/{made.id}/reading")
    assert refused.status_code == 400 and "ask something first" in refused.json()["error"]["message"]
    client.conversations.items.create(made.id, items=[{"role": "assistant", "content": "hi there"}])
    assert http.post(f"/v1/memories/{made.id}/reading").json()["answer"] == "hi there"

    async def run():
        service = make(texts=False)
        await say(service, "s", "a")
        assert next(part.turns for part in (await service.inside("t", "s")).parts) == (0, 1)
        with pytest.raises(ConfigError, match="whose text was kept"):
            await service.reading("t", "s")

    asyncio.run(run())


def test_a_reading_waits_in_the_queue(tmp_path):
    """It is refused as a turn is when too many wait, and leaves nothing behind."""
    with serving(tiny_service(tmp_path, waiting=0)) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        ask(client, "hello", "s")
        engine = running.service.engine
        engine.most = 0
        refused = httpx.post(f"{running.url}/v1/memories/s/reading", timeout=60)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        engine.most = 4
        assert httpx.post(f"{running.url}/v1/memories/s/reading", timeout=60).status_code == 200
        assert engine._jobs == 0


def test_titles_are_listed(client, http):
    ask(client, "hello", "titled-a")
    ask(client, "hello", "titled-b")
    client.conversations.update("titled-a", metadata={"title": "About cats"})
    rows = {row["id"]: row for row in http.get("/v1/memories?limit=1000").json()["data"]}
    assert rows["titled-a"]["metadata"] == {"title": "About cats"} and rows["titled-b"]["metadata"] == {}


def test_the_model_says_how_large_it_is(http, server):
    (model,) = http.get("/v1/models").json()["data"]
    reader = server.service.method.reader
    base = [p for name, p in reader.model.named_parameters() if "lora_" not in name]
    assert model["parameters"] == sum(p.numel() for p in base)
    assert model["context"] == 512 and model["kv_bytes_per_token"] == reader.kv_bytes_per_token()


def test_an_exported_conversation_can_be_drawn(client, http, tmp_path, alone):
    ask(client, "my cat is Miso", "export")
    (tmp_path / "c.ccm").write_bytes(http.get("/v1/memories/export/export").content)
    session = Session.load(tmp_path / "c.ccm", alone.method, alone.tokenizer)
    assert [turn.text for turn in session.said][:1] == ["my cat is Miso"]
    assert session.inside().parts[-1].turns == (1, 2)
    assert saved({}) == () and Memory.load(tmp_path / "c.ccm")


@pytest.mark.slow
def test_the_example_of_the_page_works_with_the_embedded_model(embedded, tmp_path):
    """What it says is remembered, and cannot be known from nothing."""
    script = (files("ccm.serving") / "page" / "page.js").read_text()
    said = json.loads(re.findall(r"said: (\[.*?\]),", script)[0])
    exact = dict(re.findall(r"(\w+): ([\d.]+)", re.findall(r"const EXACT = \{(.*?)\}", script)[0]))
    method = open_method(None, *embedded)
    store = open_store(f"sqlite://{tmp_path}/memories.db")
    with serving(Service(method, embedded[1], store, Settings(method.title))) as running:

        def answer(text, session=""):
            body = {"model": "ccm", "messages": user(text), **{k: float(v) for k, v in exact.items()}}
            headers = {"X-Session-Id": session}
            url = f"{running.url}/v1/chat/completions"
            return httpx.post(url, json=body, headers=headers, timeout=600).json()["choices"][0]["message"][
                "content"
            ]

        *_, last = [answer(text, "example") for text in said]
        assert "Elena" in last and "carpenter" in last
        assert "carpenter" not in answer(said[-1])  # the name, it makes up by itself
