"""The server over HTTP: what OpenAI's own client does with it."""

from __future__ import annotations

import asyncio

import openai
import pytest
from asking import ask, respond, user
from services import MODEL, SIZES
from tiny import tiny_compressor, tiny_tokenizer

from ccm import Session

pytest_plugins = ("api_fixtures",)


@pytest.fixture
def alone():
    """A session of the library on the same weights: what the server must say."""
    tokenizer = tiny_tokenizer()
    compressor = tiny_compressor(model={"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    return Session(
        compressor,
        tokenizer,
        **SIZES,
    )


def test_a_chat_remembers_by_its_header(client, alone):
    for text in ("my cat is Miso", "what is it?"):
        answer = ask(client, text, "chat-1")
        assert answer.choices[0].message.content == alone.generate(text, max_new_tokens=10, do_sample=False)
    assert answer.model == MODEL and answer.object == "chat.completion"
    assert answer.memory["tokens_seen"] == alone.stats()["tokens_seen"]
    assert answer.memory["version"] == 2
    assert answer.usage.prompt_tokens_details.cached_tokens > 20
    other = ask(client, "what is it?", "chat-2")  # negative control: another conversation knows nothing of it
    assert other.choices[0].message.content != answer.choices[0].message.content
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_without_a_session_nothing_is_kept(client, http):
    before = http.get("/v1/memories").json()["data"]
    first = ask(client, "hello")
    assert ask(client, "hello").choices[0].message.content == first.choices[0].message.content
    assert not hasattr(first, "memory") or first.memory is None
    empty = client.chat.completions.create(
        model=MODEL, messages=user("hello"), max_tokens=3, extra_headers={"X-Session-Id": ""}
    )
    assert "memory" not in (empty.model_extra or {})
    assert ask(client, "hello", user="somebody").model == MODEL  # `user` never names a conversation
    assert http.get("/v1/memories").json()["data"] == before


def test_streaming(client):
    whole = ask(client, "go on", "stream-1")
    chunks = list(ask(client, "go on", "stream-2", stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.memory["version"] == 1 and usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_history_that_is_sent_again(client):
    first = ask(client, "my dog is Rex", "resent").choices[0].message
    history = [*user("my dog is Rex"), first, *user("who?")]
    second = ask(client, "", "resent", history)
    assert second.memory["version"] == 2
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    with pytest.raises(openai.ConflictError, match="another history"):
        ask(client, "", "resent", [*user("something else"), first, *user("who?")])


def test_the_answer_says_what_became_of_a_history(client, http):
    said = user("my dog is Rex")
    answers = []
    for text in ("who?", "where?", ""):
        answers.append(ask(client, "", "almost", said))
        said = [*said, {"role": "assistant", "content": answers[-1].choices[0].message.content}, *user(text)]
    said = said[:-1]
    taken = [answer.memory["history"] for answer in answers]
    assert taken == [{"matched": 2 * n, "appended": 1, "rewound": 0, "rebuilt": 0} for n in range(3)]
    trimmed = ask(
        client, "", "almost", [{"role": "system", "content": "It is 10:00."}, *said[-2:], *user("why?")]
    )
    assert trimmed.memory["history"] == {
        "matched": 2,
        "appended": 2,
        "rewound": 0,
        "rebuilt": 0,
        "system": "taken in",
    }
    assert trimmed.memory["turns"] == 9
    edited = [{"role": "system", "content": "It is 10:01."}, *said[:2], *user("is he big?")]
    chunks = list(ask(client, "", "almost", edited, stream=True))
    last = next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert last.memory["history"] == {
        "matched": 2,
        "appended": 2,
        "rewound": 7,
        "rebuilt": 0,
        "system": "taken in",
    }
    assert last.memory["turns"] == 5
    items = [turn["content"] for turn in http.get("/v1/memories/almost").json()["turns"]]
    assert items[:4] == [said[0]["content"], said[1]["content"], "It is 10:01.", "is he big?"]


def test_a_request_may_say_what_to_do_with_its_history(client):
    ask(client, "my dog is Rex", "policy")
    ask(client, "my cat is Miso", "policy")
    other = [*user("x"), {"role": "assistant", "content": "y"}, *user("z")]

    def send(messages, **headers):
        return client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=5, extra_headers={"X-Session-Id": "policy", **headers}
        )

    for headers in ({}, {"X-CCM-Resend": "match"}, {"X-CCM-Resend": "refuse"}):
        with pytest.raises(openai.ConflictError, match="these 3 messages tell another history than the 4"):
            send(other, **headers)
    with pytest.raises(openai.BadRequestError) as caught:
        send(other, **{"X-CCM-Resend": "perhaps"})
    assert caught.value.param == "x-ccm-resend"
    aside = send([*user("a title, please")], **{"X-CCM-Ephemeral": "true"})
    assert aside.memory["history"]["ephemeral"] and aside.memory["version"] == 2
    assert aside.memory["turns"] == 4
    rebuilt = send(other, **{"X-CCM-Resend": "rebuild"})
    assert rebuilt.memory["history"] == {"matched": 0, "appended": 0, "rewound": 4, "rebuilt": 3}
    assert (rebuilt.memory["version"], rebuilt.memory["turns"]) == (3, 4)


def test_settings_of_an_answer(client):
    long = ask(client, "go on", max_completion_tokens=30).choices[0]
    text = long.message.content
    assert len(ask(client, "go on", max_tokens=5).choices[0].message.content) < len(text)
    stop = text[3]
    cut = ask(client, "go on", max_tokens=30, stop=[stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)].rstrip() and cut.finish_reason == "stop"
    cut = ask(client, "go on", max_tokens=1_000_000).choices[0]  # more than any context: cut, not refused
    assert cut.finish_reason in ("length", "stop") and cut.message.content.startswith(text)
    seeds = [ask(client, "go on", temperature=1.5, seed=s).choices[0].message.content for s in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert ask(client, "go on", extra_body={"repetition_penalty": 2.0}).choices[0].message.content
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": " kind"}]}
    ]
    assert ask(client, "", messages=[*parts, *user("hi")]).choices


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"n": 2}, "n", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value"),
        ({"response_format": {"type": "grammar"}}, "response_format", "unsupported_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"no_such": 1}, "no_such", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "unsupported_value"),
        ({"messages": [{"role": "user", "content": "  "}]}, None, "invalid_value"),
        ({"stop": [""]}, None, "invalid_value"),
        ({"stop": "x" * 257}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"model": "gpt-4"}, "model", "model_not_found"),
    ],
)
def test_what_is_not_supported_is_refused(http, change, param, code):
    body = {"model": MODEL, "messages": user("hi"), **change}
    answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert error["code"] == code and error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_responses_in_a_chain_and_in_branches(client, alone):
    first = respond(client, "my cat is Miso")
    assert first.output_text == alone.generate("my cat is Miso", max_new_tokens=10, do_sample=False)
    second = respond(client, "what is it?", previous_response_id=first.id)
    assert second.output_text == alone.generate("what is it?", max_new_tokens=10, do_sample=False)
    assert second.usage.input_tokens_details.cached_tokens > 0
    branch = respond(client, "what is it?", previous_response_id=first.id)
    assert branch.output_text == second.output_text
    assert branch.memory["session"] != second.memory["session"] == first.memory["session"]
    with pytest.raises(openai.NotFoundError):
        respond(client, "x", previous_response_id="resp_none.1")
    with pytest.raises(openai.NotFoundError):
        respond(client, "x", previous_response_id="rubbish")
    with pytest.raises(openai.NotFoundError):
        respond(client, "x", previous_response_id=first.id.rpartition(".")[0] + ".0")


def test_conversations(client):
    made = client.conversations.create(
        metadata={"topic": "cats"}, items=[{"role": "user", "content": "my cat is Miso"}]
    )
    assert made.metadata == {"topic": "cats"}
    answer = respond(client, "what is it?", conversation=made.id)
    assert answer.conversation.id == made.id and answer.memory["turns"] == 3
    again = respond(client, "and?", conversation={"id": made.id})
    assert again.memory["version"] == answer.memory["version"] + 1
    added = client.conversations.items.create(made.id, items=[{"role": "user", "content": "by the way"}])
    assert [item.content[0].text for item in added.data] == ["by the way"]
    items = list(client.conversations.items.list(made.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant", "user"]
    assert client.conversations.update(made.id, metadata={"topic": "dogs"}).metadata == {"topic": "dogs"}
    assert client.conversations.retrieve(made.id).metadata == {"topic": "dogs"}
    assert client.conversations.delete(made.id).deleted
    for call in (client.conversations.retrieve, client.conversations.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    with pytest.raises(openai.NotFoundError):  # an unknown one is not made on the way
        respond(client, "x", conversation=made.id)


def test_response_events(client):
    said = next(
        text for text in "abcdefgh" if respond(client, text, max_output_tokens=200).status == "completed"
    )
    whole = respond(client, said, max_output_tokens=200)
    events = list(respond(client, said, max_output_tokens=200, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text == whole.output_text and kinds[-1] == "response.completed"
    assert final.id == events[0].response.id
    assert respond(client, "more", previous_response_id=final.id).memory["version"] == 2
    with client.responses.stream(model=MODEL, input=said, temperature=0, max_output_tokens=200) as stream:
        assert stream.get_final_response().output_text == text  # the client's own bookkeeping agrees
    cut = list(respond(client, "go on", max_output_tokens=2, stream=True))[-1]
    assert cut.type == "response.incomplete"
    assert cut.response.incomplete_details.reason == "max_output_tokens"


def test_instructions_are_taken_in_once(client):
    first = respond(client, "hi", instructions="be kind")
    second = respond(client, "hi", instructions="be kind", previous_response_id=first.id)
    third = respond(client, "hi", instructions="be brief", previous_response_id=second.id)
    assert [r.memory["turns"] for r in (first, second, third)] == [3, 5, 8]
    words = [r.memory["history"]["system"] for r in (first, second, third)]
    assert words == ["taken in", "known", "taken in"]
    clocks = [respond(client, "hi", instructions="be kind")]
    for minute in (1, 2):
        now = f"be kind\nit is 10:0{minute}"
        clocks.append(respond(client, "hi", instructions=now, previous_response_id=clocks[-1].id))
    assert [r.memory["turns"] for r in clocks] == [3, 6, 8]
    assert clocks[-1].memory["history"] == {
        "matched": 1,
        "appended": 1,
        "rewound": 0,
        "rebuilt": 0,
        "system": "kept",
    }


def test_not_stored(client, http):
    before = len(http.get("/v1/memories").json()["data"])
    answer = respond(client, "hi", store=False)
    assert answer.output_text and len(http.get("/v1/memories").json()["data"]) == before
    with pytest.raises(openai.NotFoundError):
        respond(client, "x", previous_response_id=answer.id)
    with pytest.raises(openai.BadRequestError, match="store"):
        respond(client, "x", store=False, previous_response_id=respond(client, "hi").id)


def test_compaction(client, alone):
    said = [*user("my cat is Miso"), {"role": "assistant", "content": "nice"}]
    compacted = client.responses.compact(model=MODEL, input=said)
    assert compacted.object == "response.compaction" and compacted.output[-1].type == "compaction"
    assert compacted.usage.input_tokens > 0
    output = [item.model_dump(exclude_none=True) for item in compacted.output]
    answers = [respond(client, [*output, *user("what is it?")]) for _ in range(2)]
    for message in said:
        alone.append(message["content"], role=message["role"])
    expected = alone.generate("what is it?", max_new_tokens=10, do_sample=False)
    assert [answer.output_text for answer in answers] == [expected] * 2  # it can be used again
    more = client.responses.compact(model=MODEL, input=[*output, *user("and a dog")])
    assert respond(client, [more.output[-1].model_dump(exclude_none=True), *user("hm")]).output_text
    output[-1]["encrypted_content"] = "forged.1"
    with pytest.raises(openai.NotFoundError):
        respond(client, [*output, *user("x")])


def test_the_async_client_many_at_a_time(server, client):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", timeout=60) as many:
            return await asyncio.gather(*(ask(many, f"number {i}", f"many-{i}") for i in range(12)))

    answers = asyncio.run(run())
    for i, answer in enumerate(answers):
        assert (
            answer.choices[0].message.content
            == ask(client, f"number {i}", f"few-{i}").choices[0].message.content
        )


def test_memories(client, http):
    ask(client, "my cat is Miso, and my dog is Rex", "mine")
    seen = http.get("/v1/memories/mine").json()
    assert seen["stats"]["slots"] > 0 and seen["version"] == 1
    assert [turn["role"] for turn in seen["turns"]] == ["user", "assistant"]
    assert "mine" in [m["id"] for m in http.get("/v1/memories").json()["data"]]
    fork = http.post("/v1/memories/mine/fork", json={"id": "twin"}).json()
    assert fork["stats"] == seen["stats"]
    assert http.post("/v1/memories/mine/fork", json={"id": "twin"}).status_code == 409
    same = [ask(client, "and?", name).choices[0].message.content for name in ("mine", "twin")]
    assert same[0] == same[1]
    data = http.get("/v1/memories/mine/export").content
    assert http.post("/v1/memories/import", params={"id": "back"}, content=data).json()["stats"]["turns"] == 4
    assert http.post("/v1/memories/mine/rebuild").json()["stats"]["turns"] == 4
    assert http.delete("/v1/memories/mine").json()["deleted"]
    assert http.get("/v1/memories/mine").status_code == 404
    error = http.post("/v1/memories/import", content=data[:-5]).json()["error"]
    assert error["code"] == "invalid_memory" and error["type"] == "invalid_request_error"


def test_pages_of_memories(client, http):
    for name in ("page-a", "page-b", "page-c"):
        ask(client, "x", name)
    first = http.get("/v1/memories", params={"after": "page-", "limit": 2}).json()
    assert [m["id"] for m in first["data"]] == ["page-a", "page-b"] and first["has_more"]
    rest = http.get("/v1/memories", params={"after": "page-b", "limit": 1}).json()
    assert rest["data"][0]["id"] == "page-c"


def test_state(http, client):
    ask(client, "x", "counted")
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"ready": True, "reasons": []}
    text = http.get("/metrics").text
    for name in ("ccm_first_token_seconds_count", "ccm_commit_seconds_count", "ccm_batch_rows_sum"):
        assert float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1]) > 0
    assert 'ccm_requests_total{method="POST",route="/v1/chat/completions",status="200"}' in text
    for name in ("MADE-UP-1", "MADE-UP-2"):  # a client may not make the counters grow without end
        assert http.request(name, "/v1/models").status_code == 405
    assert "MADE-UP" not in http.get("/metrics").text
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [MODEL]
    assert http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL


def test_the_server_keeps_its_description(server):
    """Schemathesis: no answer that the OpenAPI description does not have, and no 5xx, for inputs that it makes up."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.checks.CHECKS.get_one("status_code_conformance"),
        schemathesis.checks.CHECKS.get_one("content_type_conformance"),
        schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
    ]
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def holds(case):
            case.call_and_validate(checks=checks, timeout=60)

        holds()
