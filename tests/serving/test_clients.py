"""What agents and stock clients send and expect: tools, thoughts, JSON, and streams that break.

Where the model's part does not matter, the service's answer is written by the test (``scripted``).
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import httpx
import jsonschema_rs
import openai
import pytest
import torch
from engine_contract import Heard
from pydantic import BaseModel
from services import MODEL, serving, tiny_service
from tiny import tiny_tokenizer

from ccm import Compressor
from ccm.chat.messages import Message, Thought, ToolCall
from ccm.errors import ConfigError
from ccm.methods import as_method
from ccm.serving.engine import Job, PaddedEngine
from ccm.serving.service import Outcome, Sampling, Settings

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL = {"type": "function", "function": WEATHER}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tiny_service(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


class Scripted:
    """In place of a service's answers: what was asked is kept, what is said is given.

    Attributes:
        messages, sampling, asked: of the last request.
        pieces, outcome: of every answer.
    """

    def __init__(self):
        self.says("fine")

    def says(self, text="", thought="", calls=(), finish="stop"):
        self.pieces = [*(Thought(c) for c in thought), *text]
        self.outcome = Outcome(
            text, finish, 10, 4, 7, reasoning=thought, tool_calls=tuple(calls), reasoning_tokens=len(thought)
        )

    async def answer(self, tenant, session, messages, sampling, **asked):
        self.messages, self.sampling, self.asked = messages, sampling, asked
        return ScriptedTurn(self.pieces, self.outcome)


class ScriptedTurn:
    session, version = None, 0

    def __init__(self, pieces, outcome):
        self.pieces, self.outcome = iter(pieces), outcome

    def __aiter__(self):
        return self

    async def __anext__(self):
        for piece in self.pieces:
            return piece
        raise StopAsyncIteration

    async def finish(self):
        return self.outcome

    async def aclose(self):
        pass


@pytest.fixture
def scripted(server, monkeypatch):
    script = Scripted()
    monkeypatch.setattr(server.service, "answer", script.answer)
    return script


def user(text):
    return [{"role": "user", "content": text}]


def chat(client, messages="hi", session=None, **options):
    messages = user(messages) if isinstance(messages, str) else messages
    headers = {"X-Session-Id": session} if session else {}
    headers |= options.pop("headers", {})
    return client.chat.completions.create(
        **{"model": MODEL, "temperature": 0, **options}, messages=messages, extra_headers=headers
    )


# ------------------------------------------------------------------ chat completions: what comes in


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"role": "developer", "content": "be kind"}, Message("system", "be kind")),
        ({"role": "user", "content": "hi", "name": "tom"}, Message("user", "hi", name="tom")),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
            },
            Message("user", "hi"),
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Oslo"}', "call_1"),)),
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": ""}}],
            },
            Message("assistant", "", tool_calls=(ToolCall("now", "{}", "c"),)),
        ),
        (
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            Message("tool", "sunny", tool_call_id="call_1"),
        ),
        (
            {
                "role": "tool",
                "tool_call_id": "c",
                "name": "weather",
                "content": [{"type": "text", "text": "sun"}],
            },
            Message("tool", "sun", tool_call_id="c", name="weather"),
        ),
        (
            {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
            Message("assistant", "yes", "hm"),
        ),
        ({"role": "assistant", "content": "yes", "reasoning": "hm"}, Message("assistant", "yes", "hm")),
        ({"role": "assistant", "refusal": "no"}, Message("assistant", "no")),
    ],
)
def test_messages_that_a_chat_may_bring(client, scripted, sent, expected):
    chat(client, [*user("hi"), sent])
    assert scripted.messages == [Message("user", "hi"), expected]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("empty", ["", " \n", [], [{"type": "text", "text": ""}], None])
def test_a_system_text_that_was_left_empty_is_none(client, scripted, role, empty):
    chat(client, [{"role": role, "content": empty}, *user("hi")])
    assert scripted.messages == [Message("user", "hi")]
    with pytest.raises(openai.BadRequestError, match="has no text"):
        chat(client, [*user("hi"), {"role": "user", "content": empty}])  # who says nothing is told so
    if empty is not None:
        respond(client, [{"role": role, "content": empty}, *user("hi")])
        assert scripted.messages == [Message("user", "hi")]
    if isinstance(empty, str):
        respond(client, "hi", instructions=empty)
        assert scripted.asked["instructions"] is None


def test_an_answer_of_openai_comes_back_as_it_is(client, scripted):
    """Clients that keep messages as objects send every field of them."""
    scripted.says(
        calls=[ToolCall("weather", '{"city": "Oslo"}', "call_1")], thought="hm", finish="tool_calls"
    )
    first = chat(client, tools=[TOOL]).choices[0].message
    dumped = first.model_dump()
    chat(client, [*user("hi"), dumped, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}])
    call = ToolCall("weather", '{"city": "Oslo"}', "call_1")
    assert scripted.messages[1:] == [
        Message("assistant", "", "hm", (call,)),
        Message("tool", "sunny", tool_call_id="call_1"),
    ]


def test_tools_reach_the_service_as_templates_read_them(client, scripted):
    strict = {
        "type": "function",
        "function": {**WEATHER, "strict": True},
        "cache_control": {"type": "ephemeral"},
    }
    chat(client, tools=[strict], tool_choice="auto", parallel_tool_calls=True)
    assert scripted.asked["tools"] == [TOOL]
    chat(client, tools=[strict], tool_choice="none")  # a model that knows of no tools calls none
    assert scripted.asked["tools"] == []


def test_what_changes_nothing_is_accepted(client, scripted):
    body = {"top_k": -1, "max_tokens": None, "stop": None, "tools": []}
    chat(
        client,
        n=1,
        logit_bias={},
        logprobs=False,
        top_logprobs=0,
        parallel_tool_calls=False,
        response_format={"type": "text"},
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        safety_identifier="s",
        service_tier="auto",
        verbosity="low",
        reasoning_effort="low",
        modalities=["text"],
        extra_body=body,
    )
    assert scripted.sampling == Sampling(temperature=0, top_k=0) and scripted.asked["tools"] == []


def refused(http, path, body):
    answer = http.post(path, json={"model": MODEL, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    return error["message"], error["param"]


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, IMAGE]}]},
            "messages[0].content[1]: image_url parts are not supported: send text parts",
            "messages[0].content[1]",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content: got 5, expected a valid string or a valid list",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ["x"]}]}]},
            "messages[0].content[0].text: got a list, expected a valid string",
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "function", "content": "x", "name": "f"}]},
            "messages[0].role: got 'function', expected 'system', 'developer', 'user', 'assistant' or 'tool'",
            "messages[0].role",
        ),
        (
            {"messages": [{"content": "x"}]},
            "messages[0].role is missing: send it",
            "messages[0].role",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "messages[0]: a message of user has no tool_calls and no reasoning: these are the assistant's",
            "messages[0]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]},
            "messages[0].tool_calls[0]: custom tool calls are not supported: send functions",
            "messages[0].tool_calls[0]",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
            "messages[0].function_call: got an object, expected null",
            "messages[0].function_call",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0]: web_search tools are not supported: send tools of type function",
            "tools[0]",
        ),
        (
            {"tools": [{"type": "function", "function": {"description": "x"}}]},
            "tools[0].function.name is missing: send it",
            "tools[0].function.name",
        ),
        (
            {"tools": [TOOL], "tool_choice": "any"},
            "tool_choice: got 'any', expected 'auto', 'none' or 'required' or an object",
            "tool_choice",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice: allowed_tools choices are not supported: send auto, none, required or one function",
            "tool_choice",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "now"}}},
            "tool_choice: got 'now', which is not among the tools",
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice: got 'required' without tools", "tool_choice"),
        (
            {"tools": [TOOL], "parallel_tool_calls": False},
            "parallel_tool_calls: got false beside tools, which is not supported: the model may ask for several "
            "calls at once; leave it out, or send tool_choice required",
            "parallel_tool_calls",
        ),
        (
            {"functions": [WEATHER]},
            "functions is not supported: send tools",
            "functions",
        ),
        ({"n": 2}, "n: got 2, expected 1", "n"),
        ({"logprobs": True}, "logprobs: got true, expected false", "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported: leave the field out", "logit_bias"),
        ({"top_k": -2}, "top_k: got -2, expected greater than or equal to -1", "top_k"),
        ({"audio": {"voice": "x"}}, "audio is not supported: leave the field out", "audio"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected greater than or equal to 1", "max_tokens"),
        (
            {"response_format": {"type": "grammar"}},
            "response_format: grammar formats are not supported: send text, json_object or json_schema",
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema is missing: send it",
            "response_format.json_schema",
        ),
    ],
)
def test_a_refusal_names_the_part(http, change, message, param):
    assert refused(http, "/v1/chat/completions", {"messages": user("hi"), **change}) == (message, param)


# ------------------------------------------------------------------ chat completions: what goes out


CALLS = [ToolCall("weather", '{"city": "Oslo"}', "call_1"), ToolCall("now", id="call_2")]


def test_tool_calls_and_thoughts_of_a_chat(client, scripted):
    scripted.says("let me look", "hm", CALLS, "tool_calls")
    choice = chat(client, tools=[TOOL]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "let me look"
    assert choice.message.reasoning_content == "hm"
    first, second = choice.message.tool_calls
    assert first.to_dict() == CALL
    assert second.id == "call_2" and second.function.to_dict() == {"name": "now", "arguments": "{}"}
    scripted.says(calls=CALLS, finish="tool_calls")
    assert chat(client, tools=[TOOL]).choices[0].message.content is None
    scripted.says("plain")  # negative control: what is not there is not said
    assert not {"tool_calls", "reasoning_content"} & set(chat(client).choices[0].message.to_dict())


def test_tool_calls_and_thoughts_in_a_stream(client, scripted):
    scripted.says("let me look", "hm", CALLS, "tool_calls")
    with client.chat.completions.stream(model=MODEL, messages=user("hi"), tools=[TOOL]) as stream:
        deltas = [e.chunk.choices[0].delta for e in stream if e.type == "chunk" and e.chunk.choices]
        final = stream.get_final_completion().choices[0]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "hm"
    assert final.message.content == "let me look" and final.finish_reason == "tool_calls"
    assert [call.function.name for call in final.message.tool_calls] == ["weather", "now"]
    assert final.message.tool_calls[0].id == "call_1"
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Oslo"}


def test_what_was_held_back_comes_at_the_end(client, scripted):
    """The begin of what could have become a call, and did not."""
    scripted.says('ok: {"no": "call"}')
    scripted.pieces = scripted.pieces[:4]
    chunks = list(chat(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == 'ok: {"no": "call"}'
    with client.responses.stream(model=MODEL, input="hi") as stream:
        assert (
            "".join(e.delta for e in stream if e.type == "response.output_text.delta") == 'ok: {"no": "call"}'
        )
        assert stream.get_final_response().output_text == 'ok: {"no": "call"}'


def test_tokens_of_thoughts_are_counted(client, scripted):
    scripted.says("yes", "hmm")
    assert chat(client).usage.completion_tokens_details.reasoning_tokens == 3
    assert respond(client, "hi").usage.output_tokens_details.reasoning_tokens == 3


# ------------------------------------------------------------------ responses: what comes in


def respond(client, items="hi", **options):
    return client.responses.create(**{"model": MODEL, "temperature": 0, **options}, input=items)


FLAT = {"type": "function", **WEATHER, "strict": True}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "let me look", "annotations": [], "logprobs": []}],
    },
    {
        "type": "function_call",
        "call_id": "a",
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
        "id": "fc_1",
    },
    {"type": "function_call", "call_id": "b", "name": "now", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": "sunny"},
    {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "noon"}]},
]
SAID = [
    Message("user", "weather?"),
    Message(
        "assistant",
        "let me look",
        "hm",
        (ToolCall("weather", '{"city": "Oslo"}', "a"), ToolCall("now", "{}", "b")),
    ),
    Message("tool", "sunny", tool_call_id="a"),
    Message("tool", "noon", tool_call_id="b"),
]


def test_items_become_messages(client, scripted):
    respond(client, ITEMS, tools=[FLAT])
    assert scripted.messages == SAID and scripted.asked["tools"] == [TOOL]
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]}
    answer = {"role": "assistant", "content": "yes"}
    respond(client, [*user("a"), thought, answer, answer, *user("b")])
    assert scripted.messages == [
        Message("user", "a"),
        Message("assistant", "yes", "hm"),
        Message("assistant", "yes"),  # negative control: two answers are not one
        Message("user", "b"),
    ]
    respond(client, [thought, *user("b")])  # thoughts that led to nothing
    assert scripted.messages == [Message("user", "b")]


def test_what_changes_nothing_in_responses(client, scripted):
    answer = respond(
        client,
        context_management=[{"type": "compaction", "compact_threshold": 1000}],
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        prompt_cache_retention="in_memory",
        truncation="auto",
        reasoning={"effort": "low", "summary": "auto"},
        max_tool_calls=3,
        safety_identifier="s",
        parallel_tool_calls=True,
        text={"format": {"type": "text"}, "verbosity": "low"},
        tools=[FLAT],
        extra_body={"top_logprobs": 0},
    )
    assert scripted.sampling == Sampling(temperature=0)
    assert (answer.truncation, answer.text.verbosity, answer.tools[0].name) == ("auto", "low", "weather")


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input[0]: item_reference items are not supported: send messages, function calls and their outputs",
            "input[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]: input_image parts are not supported: send text parts",
            "input[0].content[0]",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_file"}]}]},
            "input[0].output[0]: input_file parts are not supported: send text parts",
            "input[0].output[0]",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "arguments": "{}"}]},
            "input[0].name is missing: send it",
            "input[0].name",
        ),
        ({"input": 5}, "input: got 5, expected a valid string or a valid list", "input"),
        (
            {"include": ["message.output_text.logprobs"]},
            "include[0]: got 'message.output_text.logprobs', expected",
            "include[0]",
        ),
        (
            {"tools": [{"type": "file_search", "vector_store_ids": []}]},
            "tools[0]: file_search tools are not supported: send tools of type function",
            "tools[0]",
        ),
        ({"background": True}, "background: got true, expected false", "background"),
        ({"prompt": {"id": "x"}}, "prompt is not supported: leave the field out", "prompt"),
    ],
)
def test_a_refusal_of_responses_names_the_part(http, change, message, param):
    said, place = refused(http, "/v1/responses", {"input": "hi", **change})
    assert said.startswith(message) and place == param


def test_calls_are_items_of_a_conversation(client):
    made = client.conversations.create(items=ITEMS[:1])
    added = client.conversations.items.create(made.id, items=ITEMS[1:])
    kinds = ["message", "function_call", "function_call", "function_call_output", "function_call_output"]
    assert [item.type for item in added.data] == kinds
    found = list(client.conversations.items.list(made.id, order="asc", limit=2))
    assert [item.type for item in found] == ["message", *kinds] and len({item.id for item in found}) == 6
    assert found[2].arguments == '{"city": "Oslo"}' and found[2].call_id == found[4].call_id == "a"
    assert [item.id for item in client.conversations.items.list(made.id)] == [i.id for i in found[::-1]]


def test_calls_and_thoughts_are_compacted(client, server, monkeypatch):
    heard = []

    async def compact(tenant, messages, session, version):
        heard.append(messages)
        return await server.service.create(tenant), 9

    monkeypatch.setattr(server.service, "compact", compact)
    done = client.responses.compact(model=MODEL, input=ITEMS, prompt_cache_key="k")
    assert heard == [SAID] and done.usage.input_tokens == 9


# ------------------------------------------------------------------ responses: what goes out


def test_tool_calls_and_thoughts_of_a_response(client, scripted):
    scripted.says("let me look", "hm", CALLS, "tool_calls")
    answer = respond(client, tools=[FLAT])
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[0].content[0].text == "hm" and answer.output_text == "let me look"
    assert answer.output[2].call_id == "call_1" and answer.output[3].call_id == "call_2"
    assert answer.status == "completed"
    # what was given out may be sent back
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    respond(client, [*user("hi"), *[item.to_dict() for item in answer.output], output])
    assert scripted.messages[1].reasoning == "hm" and scripted.messages[1].content == "let me look"
    assert scripted.messages[1].tool_calls[0] == CALLS[0] and scripted.messages[2].role == "tool"
    scripted.says(calls=CALLS, finish="tool_calls")
    assert [item.type for item in respond(client).output] == ["function_call", "function_call"]


def test_tool_calls_and_thoughts_in_the_events_of_a_response(client, scripted):
    scripted.says("look", "hm", CALLS[:1], "tool_calls")
    with client.responses.stream(model=MODEL, input="hi", tools=[FLAT]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "look" and final.output[2].parsed_arguments == {"city": "Oslo"}
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    indices = {e.item.type: e.output_index for e in events if e.type == "response.output_item.done"}
    assert indices == {"reasoning": 0, "message": 1, "function_call": 2}
    assert [item.id for item in final.output] == [
        e.item.id for e in events if e.type == "response.output_item.done"
    ]


# ------------------------------------------------------------------ JSON


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    old: bool
    friends: list[Literal["Rex", "Miso"]]


SCHEMA = {**Pet.model_json_schema(), "additionalProperties": False}
SCHEMA["properties"]["friends"]["maxItems"] = 2
FORM = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}


@pytest.fixture
def llguidance():
    return pytest.importorskip("llguidance", reason="the extra json is not installed")


def test_answers_match_a_schema(client, llguidance):
    matches = jsonschema_rs.validator_for(SCHEMA).is_valid
    for options in ({}, {"temperature": 2, "seed": 1}, {"temperature": 1, "top_p": 0.3, "seed": 2}):
        choice = chat(client, session="json", response_format=FORM, max_tokens=200, **options).choices[0]
        assert matches(json.loads(choice.message.content)) and choice.finish_reason == "stop"
    free = chat(client, max_tokens=200).choices[0].message.content
    with pytest.raises(ValueError):  # negative control: the model by itself writes no JSON
        json.loads(free)
    flat = {"type": "json_schema", "name": "pet", "schema": SCHEMA, "description": "a pet", "strict": False}
    answer = respond(client, text={"format": flat}, max_output_tokens=200)
    assert matches(json.loads(answer.output_text)) and answer.text.format.name == "pet"
    streamed = chat(client, response_format=FORM, max_tokens=200, stream=True)
    assert matches(json.loads("".join(c.choices[0].delta.content or "" for c in streamed)))


def test_the_clients_own_models_are_parsed(client, llguidance):
    class Answer(BaseModel):
        kind: Literal["cat", "dog"]
        old: bool

    done = client.chat.completions.parse(
        model=MODEL, messages=user("hi"), response_format=Answer, max_tokens=200, temperature=0
    )
    assert isinstance(done.choices[0].message.parsed, Answer)
    answer = client.responses.parse(model=MODEL, input="hi", text_format=Answer, max_output_tokens=200)
    assert isinstance(answer.output_parsed, Answer)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=user("hi"), response_format=Answer, max_tokens=3)


NESTED = {
    "type": "object",
    "properties": {"pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}, "minItems": 1, "maxItems": 2}},
    "required": ["pets"],
    "additionalProperties": False,
    "$defs": {"pet": {"enum": ["cat", "dog"]}},
}


def test_a_call_can_be_required(server, client, scripted, llguidance):
    """The model's answer is then one call, as JSON that is read as one."""
    now = {"type": "function", "function": {"name": "now"}}
    pets = {"type": "function", "function": {"name": "pets", "parameters": NESTED, "strict": True}}
    chat(client, tools=[now, pets], tool_choice="required", parallel_tool_calls=False, response_format=FORM)
    either, tools = scripted.sampling, scripted.asked["tools"]
    assert [tool["function"]["name"] for tool in tools] == ["now", "pets"]
    chat(client, tools=[now, pets], tool_choice={"type": "function", "function": {"name": "pets"}})
    one = scripted.sampling
    flat = [{"type": "function", "name": "now"}, {"type": "function", "name": "pets", "parameters": NESTED}]
    answer = respond(client, tools=flat, tool_choice={"type": "function", "name": "pets"})
    assert scripted.sampling.schema == one.schema and answer.tool_choice.name == "pets"
    chat(client, tools=[now, pets], tool_choice="auto")
    assert scripted.sampling.schema is None  # negative control
    names = set()
    for sampling in (either, one):
        for seed in range(6):
            heard = Heard()
            drawn = replace(sampling, temperature=2.0, seed=seed, max_tokens=400)
            job = Job(server.service.method.empty(), prompt=(5, 6), sampling=drawn, remember=False)
            server.service.engine.submit(job, heard)
            call = json.loads(heard.result().text)
            assert set(call) == {"name", "arguments"}
            names.add((sampling is one, call["name"]))
            if call["name"] == "pets":
                assert jsonschema_rs.validator_for(NESTED).is_valid(call["arguments"])
    assert {name for single, name in names if single} == {"pets"}
    assert "pets" in {name for single, name in names if not single}


def test_a_required_call_invents_no_arguments(client, scripted):
    chat(client, tools=[TOOL, {"type": "function", "function": {"name": "now"}}], tool_choice="required")
    weather, now = json.loads(scripted.sampling.schema)["anyOf"]
    is_call = jsonschema_rs.validator_for({"anyOf": [weather, now]}).is_valid
    assert is_call({"name": "weather", "arguments": {"city": "Oslo"}}) and is_call(
        {"name": "now", "arguments": {}}
    )
    assert not is_call({"name": "weather", "arguments": {"city": "Oslo", "type": "object"}})
    assert not is_call({"name": "now", "arguments": {"city": "Oslo"}})


def test_what_looks_like_a_call_of_an_unknown_function_is_text(server, client, llguidance):
    form = {"type": "object", "properties": {"name": {"const": "sunny"}, "arguments": {"const": {}}}}
    form |= {"required": ["name", "arguments"], "additionalProperties": False}
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
    for session in (None, "unknown-function"):
        asked = {"tools": [TOOL], "response_format": answer, "session": session, "max_tokens": 300}
        choice = chat(client, **asked).choices[0]
        assert choice.message.tool_calls is None and choice.finish_reason == "stop"
        assert json.loads(choice.message.content) == {"name": "sunny", "arguments": {}}
        streamed = chat(client, "and?", stream=True, **asked)
        text = "".join(c.choices[0].delta.content or "" for c in streamed)
        assert json.loads(text)["name"] == "sunny"


def test_a_call_and_its_result_in_a_conversation(client, http, llguidance):
    """From a tool that must be called to the answer behind its result, with the client's own messages."""
    tools = [{"type": "function", "function": {"name": "pets", "parameters": NESTED}}]
    history = user("which pets?")
    choice = chat(client, history, "called", tools=tools, tool_choice="required", max_tokens=300).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert re.fullmatch("call[A-Za-z0-9]{5}", call.id) and call.function.name == "pets"
    assert jsonschema_rs.validator_for(NESTED).is_valid(json.loads(call.function.arguments))
    history += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "two of them"}]
    answer = chat(client, history, "called", tools=tools, max_tokens=5)
    assert answer.memory["turns"] == 4 and answer.usage.prompt_tokens_details.cached_tokens > 0
    assert [role for role, _ in turns(http, "called")] == ["user", "assistant", "tool", "assistant"]
    kinds = [event.type for event in respond(client, tools=[FLAT], tool_choice="required", stream=True)]
    assert "response.function_call_arguments.done" in kinds or kinds[-1] == "response.incomplete"


def test_any_object_and_what_is_cut(client, llguidance):
    choice = chat(client, response_format={"type": "json_object"}, max_tokens=20).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
    cut = chat(client, response_format=FORM, max_tokens=4).choices[0]
    assert cut.finish_reason == "length" and "friends" not in cut.message.content
    assert (
        respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=3).status == "incomplete"
    )


@pytest.mark.parametrize(
    "schema", [{"type": "wrong"}, {"type": "object", "properties": 5}, {"$ref": "#/none"}]
)
def test_schemas_that_are_not_usable(client, llguidance, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for session in (None, "unlocked"):
        with pytest.raises(openai.BadRequestError, match="response_format: the schema is not usable"):
            chat(client, session=session, response_format=form)
    assert chat(client, session="unlocked", max_tokens=3).memory["session"] == "unlocked"


def test_json_without_its_package(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"compressed-context-memory\[json\]"):
        chat(client, response_format={"type": "json_object"})


def test_the_form_waits_for_the_end_of_thoughts(server, llguidance, monkeypatch):
    """A template may open thoughts before the answer; tokens may cut the mark that ends them as they like."""
    engine, tokenizer = server.service.engine, tiny_tokenizer()
    monkeypatch.setattr(engine, "template", SimpleNamespace(thoughts=("<think>", "</think>")))
    sampling = Sampling(schema=json.dumps(SCHEMA))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def allowed(form):
        return (form.allow(torch.zeros(len(tokenizer))) == 0).nonzero().flatten().tolist()

    form = engine._form(sampling, tuple(encode("<|im_start|>assistant\n<think>\n")))
    for token in encode("hm, { is how it begins</think"):
        form.take(token)
        assert len(allowed(form)) == len(tokenizer)
    form.take(*encode(">"))
    assert set(encode("{")) <= set(allowed(form)) < set(encode("{ \n"))
    closed = engine._form(sampling, tuple(encode("<think>\n\n</think>\n")))  # negative control: no thoughts
    assert set(encode("{")) <= set(allowed(closed)) < set(encode("{ \n"))


@pytest.mark.slow
def test_the_embedded_model_writes_json(embedded, llguidance):
    model, tokenizer = embedded
    compressor = Compressor.from_pretrained(model, "ccm-chat")
    engine = PaddedEngine(as_method(compressor, tokenizer), tokenizer)
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}, "maxItems": 2},
        },
        "required": ["name", "age", "pets"],
        "additionalProperties": False,
        "$defs": {"pet": {"anyOf": [{"enum": ["a cat", "a dog"]}, {"type": "null"}]}},
    }
    try:
        for seed, temperature in ((0, 0), (1, 1)):
            prompt = tokenizer.apply_chat_template(
                user("I am Nadia, 31, and I have a cat. Write that as JSON."),
                add_generation_prompt=True,
                return_dict=False,
            )
            sampling = Sampling(max_tokens=200, temperature=temperature, seed=seed, schema=json.dumps(schema))
            heard = Heard()
            engine.submit(
                Job(compressor.empty(), prompt=tuple(prompt), sampling=sampling, remember=False),
                heard,
            )
            result = heard.result()
            assert jsonschema_rs.validator_for(schema).is_valid(json.loads(result.text)), result.text
            assert result.finish_reason == "stop"
    finally:
        engine.close()


# ------------------------------------------------------------------ streams that break


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def endless(server, monkeypatch):
    """Answers as long as they may be."""
    monkeypatch.setattr(server.service.engine, "_ends", set())


def broken(client, session, mode, pieces=3, **options):
    """What a client had heard of a stream that it broke off."""
    headers = {"X-CCM-On-Disconnect": mode} if mode else {}
    stream = chat(client, "my cat is Miso", session, stream=True, headers=headers, max_tokens=200, **options)
    heard = ""
    for _ in range(pieces):
        heard += next(stream).choices[0].delta.content
    stream.close()
    return heard


def turns(http, session):
    return [(turn["role"], turn["content"]) for turn in http.get(f"/v1/memories/{session}").json()["turns"]]


def test_a_broken_stream_is_kept_as_far_as_it_came(server, client, http, endless):
    whole = chat(client, "my cat is Miso", "whole", max_tokens=200).choices[0].message.content
    heard = broken(client, "kept", "keep")
    until(lambda: not server.service.running.turns)
    (first, said) = turns(http, "kept")
    assert first == ("user", "my cat is Miso") and said[0] == "assistant"
    assert whole.startswith(said[1]) and said[1].startswith(heard) and len(said[1]) < len(whole)
    memory = http.get("/v1/memories/kept").json()
    # prompt and answer are in the memory, and no more than what was said
    assert memory["stats"]["tokens_seen"] == sum(turn["tokens"] for turn in memory["turns"])
    history = [*user("my cat is Miso"), {"role": "assistant", "content": said[1]}, *user("and?")]
    assert chat(client, history, "kept", max_tokens=5).memory["version"] == 2


def test_a_broken_stream_is_finished(server, client, http, endless):
    whole = chat(client, "my cat is Miso", "whole-2", max_tokens=200).choices[0].message.content
    broken(client, "finished", "finish")
    with pytest.raises(openai.ConflictError) as caught:  # it runs, and says so
        chat(client, "and?", "finished", max_tokens=3)
    assert caught.value.code == "conversation_locked"
    until(lambda: not server.service.running.turns)
    assert turns(http, "finished") == [("user", "my cat is Miso"), ("assistant", whole)]
    assert chat(client, "and?", "finished", max_tokens=3).memory["version"] == 2


def test_a_broken_stream_is_dropped_by_default(server, client, http, endless):
    for session, mode in (("dropped", None), ("dropped-2", "drop")):
        broken(client, session, mode)
        until(lambda: not server.service.running.turns)
        assert http.get(f"/v1/memories/{session}").status_code == 404
        assert chat(client, "hi", session, max_tokens=3).memory["version"] == 1


def test_responses_that_break(server, client, http, endless):
    conversation = client.conversations.create()
    stream = respond(
        client,
        conversation=conversation.id,
        stream=True,
        max_output_tokens=200,
        extra_headers={"X-CCM-On-Disconnect": "keep"},
    )
    while next(stream).type != "response.output_text.delta":
        pass
    stream.close()
    until(lambda: not server.service.running.turns)
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [item.role for item in items] == ["user", "assistant"] and items[1].content[0].text


def test_a_turn_is_kept_before_its_answer_has_begun(server, client, http, endless):
    """Its client goes while the turn waits for a place, or while the prompt is read."""
    for mode, expected in (("keep", 0), ("finish", 40)):
        others = [chat(client, "go on", f"other-{i}", stream=True, max_tokens=300) for i in range(4)]
        with pytest.raises(httpx.ReadTimeout):
            http.post(
                "/v1/chat/completions",
                json={"model": MODEL, "messages": user("my cat is Miso"), "max_tokens": 40},
                headers={"X-Session-Id": f"early-{mode}", "X-CCM-On-Disconnect": mode},
                timeout=0.05,
            )
        for other in others:
            other.close()
        until(lambda: not server.service.running.turns)
        said = turns(http, f"early-{mode}")
        assert [role for role, _ in said] == ["user", "assistant"]
        assert http.get(f"/v1/memories/early-{mode}").json()["turns"][1]["tokens"] >= expected
        assert chat(client, "hi", f"early-{mode}", max_tokens=3).memory["version"] == 2


def test_a_turn_that_nobody_waits_for_and_that_fails_unlocks(server, client, http, endless, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server.service.store, "commit", lambda *_: (_ for _ in ()).throw(ConfigError("full")))
        broken(client, "failed", "finish")
        until(lambda: not server.service.running.turns)
    assert ("local", "failed") not in server.service.running.locked
    assert chat(client, "hi", "failed", max_tokens=3).memory["version"] == 1


def test_the_server_may_choose_and_a_stop_hurries(tmp_path, monkeypatch):
    service = tiny_service(tmp_path, disconnect="finish")
    monkeypatch.setattr(service.engine, "_ends", set())
    with serving(service) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0)
        broken(client, "hurried", None)
        written = service.metrics.written
    assert not service.running.turns and written._value.get() < 200  # the end of the server has cut it short
    again = tiny_service(tmp_path)
    with serving(again) as running:
        roles = [role for role, _ in turns(httpx.Client(base_url=running.url), "hurried")]
    assert roles == ["user", "assistant"]


def test_choices_that_are_none(http):
    with pytest.raises(ConfigError, match="disconnect"):
        Settings("tiny", disconnect="maybe")
    answer = http.post(
        "/v1/chat/completions",
        json={"model": MODEL, "messages": user("hi")},
        headers={"X-CCM-On-Disconnect": "maybe"},
    )
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["message"]
        == "x-ccm-on-disconnect: got 'maybe', expected 'drop', 'keep' or 'finish'"
    )
