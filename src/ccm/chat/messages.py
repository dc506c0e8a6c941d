"""What was said: the messages of a dialogue, in the terms that chat templates and OpenAI's clients share."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError


class Thought(str):
    """A piece of text that a model thinks and does not say."""


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant asks for.

    Attributes:
        name: of the function.
        arguments: as JSON text.
        id: by which the result names its call.
    """

    name: str
    arguments: str = "{}"
    id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As templates read it: arguments are an object where they are one."""
        try:
            arguments: Any = json.loads(self.arguments)
        except ValueError:
            arguments = self.arguments
        call = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return {**call, "id": self.id} if self.id else call


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: who speaks: system, developer, user, assistant, tool, or what else the model's template knows.
        content: what is said.
        reasoning: thoughts of an assistant, apart from what it said.
        tool_calls: that an assistant asks for.
        tool_call_id: of the call that a tool answers.
        name: of a speaker or a tool.

    Raises:
        ConfigError: no role, or a message that says nothing and calls nothing.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            raise ConfigError(
                f"content of a message: got {type(self.content).__name__}, expected a text; of several messages "
                "give one after another"
            )
        if not self.role:
            raise ConfigError("a message has no role; give system, user, assistant or tool")
        silent = self.role in ("assistant", "tool")  # a model, or a tool, may have nothing to say
        if not self.content.strip() and not silent:
            raise ConfigError(f"a message of {self.role!r} has no text; give at least one character")

    def as_dict(self) -> dict[str, Any]:
        """As chat templates read it; what is empty is left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.name:
            message["name"] = self.name
        return message

    def without_thoughts(self) -> Message:
        """The same message, its thoughts left out."""
        return replace(self, reasoning="") if self.reasoning else self
