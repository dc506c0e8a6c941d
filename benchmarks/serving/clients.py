"""What stock clients and agents send, against a live server: case by case, what happened.

Part 5: histories that are almost the known one. Part 6: tools, thoughts, JSON, and streams that break. LangChain and
OpenAI's Agents SDK run in an interpreter that has them: ``--frameworks PYTHON``.

The embedded model asks for no tools, so that calls are the client's own; what a model's calls look like on the way
out is in ``tests/serving/test_clients.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from harness import MODEL, Server, parser, serving, store
from tiny_folder import tiny_options

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
FLAT = {"type": "function", "strict": True, **TOOL["function"]}  # type: ignore[dict-item]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "pet": {"enum": ["cat", "dog", None]}},
    "required": ["name", "pet"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Live:
    """A running server and its clients."""

    client: openai.OpenAI
    http: httpx.Client

    def chat(self, messages: str | list[dict[str, Any]], session: str | None = None, **options: Any) -> Any:
        headers = {"X-Session-Id": session} if session else {}
        headers |= options.pop("headers", {})
        messages = [user(messages)] if isinstance(messages, str) else messages
        options = {"model": MODEL, "temperature": 0, "max_tokens": 12, **options}
        return self.client.chat.completions.create(messages=messages, extra_headers=headers, **options)

    def respond(self, items: str | list[Any], **options: Any) -> Any:
        options = {"model": MODEL, "temperature": 0, "max_output_tokens": 12, **options}
        return self.client.responses.create(input=items, **options)

    def turns(self, session: str) -> list[str]:
        """What the server has noted of a conversation; empty if there is none."""
        answer = self.http.get(f"/v1/memories/{session}")
        return [] if answer.status_code == 404 else [turn["role"] for turn in answer.json()["turns"]]

    def talk(self, session: str, said: list[str], system: str | None = None) -> list[dict[str, Any]]:
        """A conversation as a client keeps it that sends all of it every time."""
        history = [] if system is None else [{"role": "system", "content": system}]
        for text in said:
            history.append(user(text))
            history.append(spoken(self.chat(history, session)))
        return history


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def spoken(answer: Any) -> dict[str, Any]:
    message: dict[str, Any] = answer.choices[0].message.to_dict()
    return message


def noted(answer: Any) -> str:
    """What the answer says of the history, and the turns that the memory holds."""
    memory = answer.memory
    parts = [f"{name} {value}" for name, value in memory.get("history", {}).items()]
    return ", ".join([*parts, f"{memory['turns']} turns"])


def refusal(call: Callable[[], Any]) -> str:
    """The sentence that a request is refused with.

    Raises:
        RuntimeError: it is not refused.
    """
    try:
        call()
    except openai.APIStatusError as error:
        return f"{error.status_code}: {error.body['message']}"  # type: ignore[index]
    raise RuntimeError("taken, and not refused")


def expect(holds: bool, what: str) -> str:
    """``what`` happened, if it is what had to happen.

    Raises:
        RuntimeError: it is not.
    """
    if not holds:
        raise RuntimeError(what)
    return what


# ------------------------------------------------------------------ part 5

FACTS = ["My name is Nadia.", "I live in Oslo.", "My cat is called Miso."]


def clock(live: Live) -> str:
    history = live.talk("clock", FACTS, "Be kind. It is 2026-11-27 10:00.")
    history[0] = {"role": "system", "content": "Be kind. It is 2026-11-27 10:05."}
    answer = live.chat([*history, user("Who am I?")], "clock")
    return expect(answer.memory["turns"] >= 9, noted(answer))


def trimmed(live: Live) -> str:
    history = live.talk("trimmed", FACTS, "Be kind.")
    answer = live.chat([history[0], *history[-2:], user("Who am I?")], "trimmed")
    return expect(answer.memory["turns"] >= 9, noted(answer))


def without_thoughts(live: Live) -> str:
    said = {"role": "assistant", "content": "Hello, Nadia.", "reasoning_content": "She says her name."}
    first = live.chat([user(FACTS[0]), said, user(FACTS[1])], "thoughts")
    history = [
        user(FACTS[0]),
        {"role": "assistant", "content": "Hello, Nadia."},
        user(FACTS[1]),
        spoken(first),
    ]
    answer = live.chat([*history, user("Who am I?")], "thoughts")
    return expect(answer.memory["turns"] == 6, noted(answer))


def regenerated(live: Live) -> str:
    history = live.talk("again", FACTS)
    answer = live.chat(history[:-1], "again", temperature=1, seed=1)
    return expect(answer.memory["turns"] == 6, noted(answer))


def edited(live: Live) -> str:
    history = live.talk("edited", FACTS)
    answer = live.chat([*history[:2], user("I live in Rome.")], "edited")
    return expect(answer.memory["turns"] == 4, noted(answer))


def two_at_once(live: Live) -> str:
    history = live.talk("two", FACTS[:1])
    answer = live.chat([*history, user(FACTS[1]), user(FACTS[2])], "two")
    return expect(answer.memory["turns"] == 5, noted(answer))


def title_by_header(live: Live) -> str:
    live.talk("title", FACTS)
    live.chat("Write a title of three words.", "title", headers={"X-CCM-Ephemeral": "true"})
    answer = live.chat("Who am I?", "title")
    return expect(answer.memory["turns"] == 8, f"after it: {noted(answer)}")


def title_of_open_webui(live: Live) -> str:
    history = live.talk("webui", FACTS)
    said = "\n".join(f"{message['role'].upper()}: {message['content']}" for message in history)
    task = f"### Task:\nGenerate a concise title.\n### Chat History:\n<chat_history>\n{said}\n</chat_history>"
    live.chat(task, "webui")
    answer = live.chat([*history, user("Who am I?")], "webui")
    return expect(answer.memory["turns"] == 8, f"after it: {noted(answer)}")


def shorter(live: Live) -> str:
    live.talk("shorter", FACTS)
    other = [user("Something else."), {"role": "assistant", "content": "Yes?"}, user("Go on.")]
    said = refusal(lambda: live.chat(other, "shorter"))
    return expect(len(live.turns("shorter")) == 6, f"the memory stays: {said}")


# ------------------------------------------------------------------ part 6


def tool_messages(live: Live) -> str:
    history = [user("The weather?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    first = live.chat([*history, result], "tools", tools=[TOOL])
    again = live.chat([*history, result, spoken(first), user("Thank you.")], "tools", tools=[TOOL])
    return expect(again.memory["turns"] == 6, noted(again))


def tool_choice(live: Live) -> str:
    choice = live.chat("The weather of Oslo?", tools=[TOOL], tool_choice="auto", max_tokens=40).choices[0]
    calls = len(choice.message.tool_calls or ())
    return f"finish_reason {choice.finish_reason}, {calls} calls"


def parts(live: Live) -> str:
    text = {"type": "text", "text": "My name is Nadia.", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "name": "nadia", "content": [text]},
    ]
    return noted(live.chat(messages, "parts"))


def thoughts(live: Live) -> str:
    said = {"role": "assistant", "content": "Hello.", "reasoning_content": "She greets me."}
    return noted(live.chat([user("Hi."), said, user("And now?")], "reasoning"))


def nothing_changes(live: Live) -> str:
    done = live.chat(
        "Hi.",
        n=1,
        logit_bias={},
        parallel_tool_calls=True,
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="low",
        reasoning_effort="low",
        extra_body={"top_k": -1, "max_tokens": None},
        max_completion_tokens=8,
    )
    return expect(bool(done.choices), "answered")


def image(live: Live) -> str:
    part = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    return refusal(lambda: live.chat([{"role": "user", "content": [part]}]))


def required(live: Live) -> str:
    said = [user("What is the weather of Oslo?")]
    choice = live.chat(said, "agent", tools=[TOOL], tool_choice="required", max_tokens=300).choices[0]
    (call,) = choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = live.chat([*said, choice.message.to_dict(), result], "agent", tools=[TOOL])
    what = f"{choice.finish_reason}: {call.function.name}({call.function.arguments}); with its result: {noted(again)}"
    return expect(again.memory["turns"] == 4, what)


def legacy(live: Live) -> str:
    return refusal(lambda: live.chat("Hi.", extra_body={"functions": [TOOL["function"]]}))


def json_schema(live: Live) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA, "strict": True}}
    said = live.chat("I am Nadia, and I have a cat.", response_format=form, max_tokens=300).choices[0].message
    answer = json.loads(said.content)
    return expect(set(answer) == {"name", "pet"}, said.content)


def json_object(live: Live) -> str:
    form = {"type": "json_object"}
    choice = live.chat("List two pets as JSON.", response_format=form, max_tokens=300).choices[0]
    whole = choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
    return expect(whole, f"finish_reason {choice.finish_reason}: {choice.message.content[:60]}")


def cut_json(live: Live) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}
    choice = live.chat("Hi.", response_format=form, max_tokens=3).choices[0]
    return expect(choice.finish_reason == "length", f"finish_reason {choice.finish_reason}")


def agent_parameters(live: Live) -> str:
    done = live.respond(
        "Hi.",
        context_management=[{"type": "compaction", "compact_threshold": 1000}],
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        truncation="auto",
        reasoning={"effort": "low"},
        tools=[FLAT],
        max_tool_calls=2,
        text={"verbosity": "low"},
    )
    return expect(done.truncation == "auto", f"{done.status}, truncation {done.truncation}")


ITEMS: list[dict[str, Any]] = [
    user("The weather of Oslo?"),
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "I must ask."}]},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
]


def items(live: Live) -> str:
    done = live.respond(ITEMS, tools=[FLAT])
    more = live.respond("Thank you.", previous_response_id=done.id, tools=[FLAT])
    return expect(more.memory["turns"] == 6, noted(more))


def compact(live: Live) -> str:
    done = live.client.responses.compact(model=MODEL, input=ITEMS)  # type: ignore[arg-type]
    output = [item.model_dump(exclude_none=True) for item in done.output]
    answer = live.respond([*output, user("And now?")])
    return expect(answer.status is not None, f"{done.usage.input_tokens} tokens folded, then {noted(answer)}")


def response_schema(live: Live) -> str:
    form = {"type": "json_schema", "name": "who", "schema": SCHEMA, "strict": True}
    done = live.respond("I am Nadia, and I have a cat.", text={"format": form}, max_output_tokens=300)
    return expect(set(json.loads(done.output_text)) == {"name", "pet"}, done.output_text)


def reference(live: Live) -> str:
    return refusal(lambda: live.respond([{"type": "item_reference", "id": "msg_1"}]))


def _broken(live: Live, mode: str) -> str:
    session = f"broken-{mode}"
    headers = {"X-CCM-On-Disconnect": mode}
    stream = live.chat("Tell me of ships.", session, stream=True, max_tokens=60, headers=headers)
    for _ in range(3):
        next(stream)
    stream.close()
    told = 0
    while True:  # busy is an answer too; what is not one is a conversation that stays locked
        try:
            answer = live.chat("And now?", session)
            break
        except openai.ConflictError:
            told += 1
            time.sleep(0.2)
            if told > 300:
                raise
    roles = live.turns(session)
    kept = len(roles) - 2
    return expect(
        kept == (0 if mode == "drop" else 2),
        f"{kept} turns of it kept; the next request was answered "
        + ("after a 409 while it ran" if told else "at once")
        + f"; version {answer.memory['version']}",
    )


def dropped(live: Live) -> str:
    return _broken(live, "drop")


def kept(live: Live) -> str:
    return _broken(live, "keep")


def finished(live: Live) -> str:
    return _broken(live, "finish")


#: Part, name, and what is done.
CASES: list[tuple[int, str, Callable[[Live], str]]] = [
    (5, "a clock in the system prompt", clock),
    (5, "old messages trimmed away", trimmed),
    (5, "thoughts stripped from an answer", without_thoughts),
    (5, "an answer regenerated", regenerated),
    (5, "a message edited in the middle", edited),
    (5, "two new messages of the user at once", two_at_once),
    (5, "a title asked for, with X-CCM-Ephemeral", title_by_header),
    (5, "a title asked for by Open WebUI", title_of_open_webui),
    (5, "another, shorter history", shorter),
    (6, "tool calls, content null, tool results", tool_messages),
    (6, "tools offered, tool_choice auto", tool_choice),
    (6, "developer, name, cache_control", parts),
    (6, "reasoning_content of an older answer", thoughts),
    (6, "parameters that change nothing", nothing_changes),
    (6, "an image", image),
    (6, "tool_choice required, and the result", required),
    (6, "legacy functions", legacy),
    (6, "response_format json_schema", json_schema),
    (6, "response_format json_object", json_object),
    (6, "JSON cut by max_tokens", cut_json),
    (6, "responses: what agents send", agent_parameters),
    (6, "responses: calls, outputs, reasoning", items),
    (6, "responses/compact with calls and reasoning", compact),
    (6, "responses: text.format json_schema", response_schema),
    (6, "responses: item_reference", reference),
    (6, "a stream that breaks, drop", dropped),
    (6, "a stream that breaks, keep", kept),
    (6, "a stream that breaks, finish", finished),
]


def row(part: int, client: str, case: str, run: Callable[[], str]) -> dict[str, Any]:
    print(f"{client}: {case}", file=sys.stderr, flush=True)
    try:
        return {"part": part, "client": client, "case": case, "ok": True, "what": run()}
    except Exception as error:  # what went wrong is a result
        what = f"{type(error).__name__}: {error}"[:300]
        return {"part": part, "client": client, "case": case, "ok": False, "what": what}


def frameworks(python: str, server: Server) -> list[dict[str, Any]]:
    """Cases of LangChain and of OpenAI's Agents SDK; none where they are not installed."""
    script = Path(__file__).with_name("frameworks.py")
    done = subprocess.run([python, str(script), server.url], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--frameworks", metavar="PYTHON", default=sys.executable)
    arguments.add_argument("--part", type=int, choices=(5, 6), help="one of them alone; nothing is stored")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = tiny_options(Path(folder)) if chosen.quick else ["--adapter", "ccm-chat"]
        with serving(Path(folder), chosen.threads, *options) as server, server.http() as http:
            live = Live(server.client(), http)
            wanted = [case for case in CASES if chosen.part in (None, case[0])]
            rows = [row(part, "openai", name, lambda run=run: run(live)) for part, name, run in wanted]  # type: ignore[misc]
            rows += frameworks(chosen.frameworks, server)
            rows = [row for row in rows if chosen.part in (None, row["part"])]
    chosen.quick = chosen.quick or chosen.part is not None
    result = {"cases": rows, "reached": all(row["ok"] for row in rows)}
    return 0 if store("clients", result, chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
