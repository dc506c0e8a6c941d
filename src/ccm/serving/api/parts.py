"""What messages are made of on the wire: parts, calls, items, tools; and how they become our messages.

What changes nothing may be sent; what this server does not do is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ...chat.messages import Message, ToolCall

Text = Annotated[str, StringConstraints(max_length=1 << 22)]
#: Of a function, a speaker, a call.
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
#: What is known and changes nothing here, whatever it says.
Unused = Any
Status = Literal["in_progress", "completed", "incomplete"]

TEXT_PARTS = ("text", "input_text", "output_text")


class Body(BaseModel):
    """Base of all: fields that are not named are refused."""

    model_config = ConfigDict(extra="forbid")


def _type(value: Any, default: str) -> Any:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return default if kind is None else kind


def _by_type(default: str, **tags: str) -> Discriminator:
    """Choose a model by ``type``, or by what it is called in ``tags``."""

    def tag(value: Any) -> str:
        kind = _type(value, default)
        return tags.get(kind, kind)

    return Discriminator(tag)


def only(noun: str, known: Sequence[str], instead: str) -> BeforeValidator:
    """Refuse other types by their name, before anything is said of their fields."""

    def check(value: Any) -> Any:
        if (kind := _type(value, known[0])) not in known:
            text = "{kind} {noun} are not supported: {instead}"
            raise PydanticCustomError(
                "unsupported", text, {"kind": str(kind)[:80], "noun": noun, "instead": instead}
            )
        return value

    return BeforeValidator(check)


# ------------------------------------------------------------------ parts of a text


class TextPart(Body):
    """A piece of text."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Unused = None
    logprobs: Unused = None
    cache_control: Unused = None
    prompt_cache_breakpoint: Unused = None


class RefusalPart(Body):
    """What a model said in place of an answer."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """What was said."""
        return self.refusal


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    _by_type("text", input_text="text", output_text="text"),
    only("parts", (*TEXT_PARTS, "refusal"), "send text parts"),
]
Content = Text | list[Part]


def text_of(content: Content | None) -> str:
    """A content as one text."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def says_nothing(message: Any) -> bool:
    """Whether this is system text that its user left empty; clients send it all the same."""
    return getattr(message, "role", "") in ("system", "developer") and not text_of(message.content).strip()


def role_of(role: str) -> str:
    """The role as templates know it: a developer's message is a system message."""
    return "system" if role == "developer" else role


# ------------------------------------------------------------------ tools


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Accepted and not used: arguments are what the model writes."
    )


class ChatTool(Body):
    """A tool of chat completions."""

    type: Literal["function"]
    function: Function
    cache_control: Unused = None

    def tool(self) -> dict[str, Any]:
        """In the form of chat templates."""
        return as_tool(self.function)


class FlatTool(Function):
    """A tool of responses."""

    type: Literal["function"]
    defer_loading: Literal[False] | None = None

    def tool(self) -> dict[str, Any]:
        """In the form of chat templates."""
        return as_tool(self)


def as_tool(function: Function) -> dict[str, Any]:
    """A function as chat templates read it."""
    fields = function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": fields}


_functions = only("tools", ("function",), "send tools of type function")
ChatTools = Annotated[list[Annotated[ChatTool, _functions]], Field(max_length=1024)]
FlatTools = Annotated[list[Annotated[FlatTool, _functions]], Field(max_length=1024)]


class FunctionName(Body):
    """The name of a function."""

    name: Name


class ChatChoice(Body):
    """The one function that has to be called, in chat completions."""

    type: Literal["function"]
    function: FunctionName

    @property
    def called(self) -> str:
        """The function that has to be called."""
        return self.function.name


class FlatChoice(FunctionName):
    """The same in responses."""

    type: Literal["function"]

    @property
    def called(self) -> str:
        """The function that has to be called."""
        return self.name


_choice = only("choices", ("function",), "send auto, none, required or one function")
Choice = Literal["auto", "none", "required"]
ChatToolChoice = Choice | Annotated[ChatChoice, _choice]
FlatToolChoice = Choice | Annotated[FlatChoice, _choice]


#: Keys of a schema of an object that takes nothing but its properties, if it does not say otherwise.
_PLAIN = {"type", "properties", "required", "title", "description", "$defs", "$schema"}


def call_schema(tools: Sequence[dict[str, Any]]) -> str:
    """JSON schema of one call of one of these functions, with the arguments that they name and no others."""
    calls = []
    for i, tool in enumerate(tools):
        parameters = tool["function"].get("parameters") or {"type": "object", "properties": {}}
        if parameters.keys() <= _PLAIN:  # a small model would go on inventing arguments
            parameters = {**parameters, "additionalProperties": False}
        fields = {
            "name": {"const": tool["function"]["name"]},
            "arguments": _moved(parameters, f"#/anyOf/{i}/properties/arguments"),
        }
        calls.append(
            {
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            }
        )
    return json.dumps({"anyOf": calls})


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to parts of itself hold where it is put."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(part, place) for name, part in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = place + ref[1:]
    return moved


# ------------------------------------------------------------------ forms of an answer


class TextFormat(Body):
    """Answers in any form."""

    type: Literal["text"]

    def schema_text(self) -> str | None:
        """The JSON schema that binds the answer: none."""
        return None


class JsonObject(Body):
    """Answers that are one JSON object."""

    type: Literal["json_object"]

    def schema_text(self) -> str | None:
        """The JSON schema that binds the answer."""
        return '{"type": "object"}'


class JsonSchema(Body):
    """``strict`` or not, the answer matches the schema."""

    name: Name
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    description: Text | None = None

    def schema_text(self) -> str | None:
        """The JSON schema that binds the answer."""
        return json.dumps(self.schema_ or {"type": "object"})


class ChatJsonSchema(Body):
    """The form of chat completions."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def schema_text(self) -> str | None:
        """The JSON schema that binds the answer."""
        return self.json_schema.schema_text()


class FlatJsonSchema(JsonSchema):
    """The form of responses."""

    type: Literal["json_schema"]


_forms = only("formats", ("text", "json_object", "json_schema"), "send text, json_object or json_schema")
ChatFormat = Annotated[
    Annotated[TextFormat, Tag("text")]
    | Annotated[JsonObject, Tag("json_object")]
    | Annotated[ChatJsonSchema, Tag("json_schema")],
    _by_type("text"),
    _forms,
]
FlatFormat = Annotated[
    Annotated[TextFormat, Tag("text")]
    | Annotated[JsonObject, Tag("json_object")]
    | Annotated[FlatJsonSchema, Tag("json_schema")],
    _by_type("text"),
    _forms,
]


# ------------------------------------------------------------------ messages of chat completions


class Called(Body):
    """A function that was called, and its arguments as JSON."""

    name: Name
    arguments: Text = ""


class ChatCall(Body):
    """A call of a tool in a message of an assistant."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None

    def call(self) -> ToolCall:
        """As messages hold it."""
        return ToolCall(self.function.name, self.function.arguments or "{}", self.id or "")


class ChatMessage(Body):
    """A message; fields that an answer has may come back with it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[Annotated[ChatCall, only("tool calls", ("function",), "send functions")]] | None = None
    tool_call_id: Name | None = None
    refusal: Text | None = None
    annotations: Unused = None
    audio: None = None
    function_call: None = None
    cache_control: Unused = None

    @model_validator(mode="after")
    def _of_the_assistant(self) -> ChatMessage:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content or self.reasoning):
            text = "a message of {role} has no tool_calls and no reasoning: these are the assistant's"
            raise PydanticCustomError("unsupported", text, {"role": self.role})
        return self

    def message(self) -> Message:
        """As sessions take it in."""
        return Message(
            role_of(self.role),
            text_of(self.content) or self.refusal or "",
            self.reasoning_content or self.reasoning or "",
            tuple(call.call() for call in self.tool_calls or ()),
            self.tool_call_id,
            self.name,
        )


# ------------------------------------------------------------------ items of responses and conversations


class MessageItem(Body):
    """A message among the items of a response."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: Status | None = None
    phase: Unused = None

    def message(self) -> Message:
        """As sessions take it in."""
        return Message(role_of(self.role), text_of(self.content))


class CallItem(Body):
    """A call that the assistant asked for."""

    type: Literal["function_call"]
    name: Name
    arguments: Text
    call_id: Name
    id: str | None = None
    status: Status | None = None

    def message(self) -> Message:
        """As sessions take it in: the call of an assistant."""
        return Message("assistant", tool_calls=(ToolCall(self.name, self.arguments or "{}", self.call_id),))


class OutputItem(Body):
    """What a tool gave back."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Content
    name: Name | None = None
    id: str | None = None
    status: Status | None = None

    def message(self) -> Message:
        """As sessions take it in: what a tool answered."""
        return Message("tool", text_of(self.output), tool_call_id=self.call_id, name=self.name)


class ThoughtPart(Body):
    """A piece of what a model thought."""

    type: Literal["summary_text", "reasoning_text"]
    text: Text


class ReasoningItem(Body):
    """Thoughts of the assistant before what it says next."""

    type: Literal["reasoning"]
    summary: list[ThoughtPart] | None = None
    content: list[ThoughtPart] | None = None
    encrypted_content: Unused = None
    id: str | None = None
    status: Status | None = None

    def message(self) -> Message:
        """As sessions take it in: thoughts of an assistant that said nothing."""
        return Message("assistant", reasoning="\n".join(p.text for p in self.content or self.summary or ()))


class CompactionItem(Body):
    """A compacted conversation, as ``responses/compact`` gave it out."""

    type: Literal["compaction"]
    encrypted_content: str = Field(max_length=400)
    id: str | None = None
    created_by: None = None


#: What is said, or done, in a conversation.
Said = MessageItem | CallItem | OutputItem | ReasoningItem

_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_SEND = "send messages, function calls and their outputs"
SaidItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    _by_type("message"),
    only("items", _ITEMS, _SEND),
]
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CompactionItem, Tag("compaction")],
    _by_type("message"),
    only("items", (*_ITEMS, "compaction"), _SEND),
]


def messages_of(items: str | Sequence[Said | CompactionItem]) -> list[Message]:
    """The messages behind the last compaction; thoughts, text and calls of one turn of the assistant are one."""
    if isinstance(items, str):
        return [Message("user", items)]
    messages: list[Message] = []
    for item in items:
        if isinstance(item, CompactionItem):
            messages.clear()
            continue
        if says_nothing(item):
            continue
        message = item.message()
        if messages and _goes_on(messages[-1], message):
            message = _joined(messages.pop(), message)
        messages.append(message)
    return [message for message in messages if not _only_thought(message)]


def _goes_on(last: Message, message: Message) -> bool:
    """Whether a message is more of the same turn: what follows thoughts, and calls behind a text."""
    if not last.role == message.role == "assistant":
        return False
    return _only_thought(last) or bool(message.tool_calls)


def _joined(one: Message, other: Message) -> Message:
    return replace(
        one,
        content=one.content or other.content,
        reasoning="\n".join(filter(None, (one.reasoning, other.reasoning))),
        tool_calls=one.tool_calls + other.tool_calls,
    )


def _only_thought(message: Message) -> bool:
    return bool(message.reasoning) and not (message.content or message.tool_calls)
