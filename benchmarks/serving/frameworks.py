"""Cases of clients.py for LangChain and OpenAI's Agents SDK, as JSON lines; it needs nothing but these two.

python benchmarks/serving/frameworks.py URL
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel

MODEL = "ccm"
Case = tuple[int, str, Callable[[], str]]


class Who(BaseModel):
    name: Literal["Nadia", "Tom"]
    pet: Literal["cat", "dog"]


def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


def langchain(url: str) -> list[Case]:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
    from langchain_openai import ChatOpenAI

    def model(session: str | None = None, **options: Any) -> Any:
        headers = {"X-Session-Id": session} if session else {}
        settings = {"temperature": 0, "max_tokens": 12, "max_retries": 0, **options}
        return ChatOpenAI(
            base_url=f"{url}/v1", api_key="none", model=MODEL, default_headers=headers, **settings
        )

    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "call_1", "type": "tool_call"}
    told = [
        HumanMessage("The weather of Oslo?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("sunny", tool_call_id="call_1"),
    ]

    def tools() -> str:
        bound = model("lc-tools").bind_tools([weather])
        first = bound.invoke(told)
        again = bound.invoke([*told, first, HumanMessage("Thank you.")])
        return f"answered twice, {again.response_metadata['finish_reason']}"

    def structured() -> str:
        found = model(max_tokens=300).with_structured_output(Who).invoke("I am Nadia, and I have a cat.")
        return repr(found)

    def json_mode() -> str:
        asked = model(max_tokens=300).with_structured_output(Who.model_json_schema(), method="json_schema")
        return repr(asked.invoke("I am Nadia, and I have a cat."))

    def stream() -> str:
        pieces = [piece.content for piece in model("lc-stream").stream("My name is Nadia.")]
        return f"{len(pieces)} pieces"

    def responses() -> str:
        bound = model(use_responses_api=True, max_tokens=16).bind_tools([weather])
        answer = bound.invoke(told)
        return f"content blocks: {[block['type'] for block in answer.content]}"

    def by_calls() -> str:
        asked = model(max_tokens=300).with_structured_output(Who, method="function_calling")
        return repr(asked.invoke("I am Nadia, and I have a cat."))

    def trimmed() -> str:
        history: list[Any] = [SystemMessage("Be kind.")]
        chat = model("lc-trim")
        for text in ("My name is Nadia.", "I live in Oslo.", "My cat is called Miso."):
            history.append(HumanMessage(text))
            history.append(chat.invoke(history))
        history.append(HumanMessage("Who am I?"))
        short = trim_messages(history, max_tokens=4, token_counter=len, include_system=True, start_on="human")
        answer = chat.invoke(short)
        return f"{len(history)} messages trimmed to {len(short)}, answered: {bool(answer.content)}"

    return [
        (5, "trim_messages", trimmed),
        (6, "bind_tools, AIMessage.tool_calls, ToolMessage", tools),
        (6, "with_structured_output", structured),
        (6, "with_structured_output of a plain schema", json_mode),
        (6, "with_structured_output by function calling", by_calls),
        (6, "stream", stream),
        (6, "use_responses_api with tools", responses),
    ]


def agents(url: str) -> list[Case]:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        RunConfig,
        Runner,
        SQLiteSession,
        function_tool,
    )
    from openai import AsyncOpenAI

    quiet = RunConfig(tracing_disabled=True)
    told: list[Any] = [
        {"role": "user", "content": "The weather of Oslo?"},
        {
            "type": "function_call",
            "call_id": "call_1",
            "name": "weather",
            "arguments": '{"city": "Oslo"}',
            "id": "fc_1",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]

    def agent(kind: Any, session: str | None = None, **options: Any) -> Any:
        headers = {"X-Session-Id": session} if session else {}
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", default_headers=headers, max_retries=0)
        return Agent(
            name="guide",
            instructions="Be kind.",
            model=kind(MODEL, client),
            tools=[function_tool(weather)],
            model_settings=ModelSettings(temperature=0, max_tokens=300),
            **options,
        )

    def run(asked: Any, items: Any, **options: Any) -> Any:
        return asyncio.run(Runner.run(asked, items, run_config=quiet, **options))

    def chat() -> str:
        done = run(agent(OpenAIChatCompletionsModel), "The weather of Oslo?")
        return f"{len(done.new_items)} items, {done.context_wrapper.usage.requests} requests"

    def chat_with_results() -> str:
        return f"{len(run(agent(OpenAIChatCompletionsModel), told).new_items)} items behind a tool's result"

    def responses() -> str:
        return f"{len(run(agent(OpenAIResponsesModel), 'The weather of Oslo?').new_items)} items"

    def responses_with_results() -> str:
        return f"{len(run(agent(OpenAIResponsesModel), told).new_items)} items behind a tool's result"

    def streamed() -> str:
        async def events() -> int:
            done = Runner.run_streamed(agent(OpenAIResponsesModel), told, run_config=quiet)
            return len([event async for event in done.stream_events()])

        return f"{asyncio.run(events())} events"

    def forced() -> str:
        settings = ModelSettings(temperature=0, max_tokens=300, tool_choice="required")
        asked = agent(OpenAIChatCompletionsModel).clone(model_settings=settings)
        done = run(asked, "The weather of Oslo?")  # the second request lets the model decide
        return f"items: {[item.type for item in done.new_items]}"

    def output_type() -> str:
        asked = agent(OpenAIChatCompletionsModel, output_type=Who).clone(
            tools=[], model_settings=ModelSettings(temperature=0, max_tokens=300)
        )
        return repr(run(asked, "I am Nadia, and I have a cat.").final_output)

    def session() -> str:
        async def turns() -> list[int]:
            kept, asked = SQLiteSession("one"), agent(OpenAIChatCompletionsModel, "agent-session")
            said = ("My name is Nadia.", "I live in Oslo.", "Who am I?")
            done = [await Runner.run(asked, text, session=kept, run_config=quiet) for text in said]
            return [one.context_wrapper.usage.input_tokens for one in done]

        return f"input tokens of three turns: {asyncio.run(turns())}"

    return [
        (6, "an agent on chat completions", chat),
        (6, "an agent on chat completions, behind a tool's result", chat_with_results),
        (6, "an agent on responses", responses),
        (6, "an agent on responses, behind a tool's result", responses_with_results),
        (6, "an agent on responses, streamed", streamed),
        (6, "a tool that must be called, its result, and the answer", forced),
        (6, "output_type", output_type),
        (6, "a session that is sent again at every turn", session),
    ]


def main() -> int:
    (url,) = sys.argv[1:]
    for package, cases in (("langchain-openai", langchain), ("openai-agents", agents)):
        try:
            client = f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
        for part, name, run in cases(url):
            row: dict[str, Any] = {"part": part, "client": client, "case": name}
            try:
                row |= {"ok": True, "what": run()}
            except Exception as error:  # what went wrong is a result
                row |= {"ok": False, "what": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
