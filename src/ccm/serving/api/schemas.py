"""Bodies of requests. What OpenAI's clients may send and this server does not do is refused, never ignored; where a
field says what is the case anyway, it may be sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..engine.base import LONGEST_STOP
from ..history import Message
from ..service import Sampling
from .errors import ApiError

_NO_ID = r"\s/\\?#%\x00-\x1f\x7f"
#: An id of the caller: printable, and usable as one part of an address.
SessionId = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=rf"^\.*[^.{_NO_ID}][^{_NO_ID}]*$")
]
#: The same in a header: ASCII, as other bytes have no agreed meaning there. Templates of clients may leave it empty.
HeaderId = Annotated[
    str, StringConstraints(max_length=200, pattern=rf"^(\.*[^.{_NO_ID}-\xff][^{_NO_ID}-\xff]*)?$")
]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]
Nothing = Annotated[list[Any], Field(max_length=0)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
Text = Annotated[str, StringConstraints(max_length=1 << 22)]


class Body(BaseModel):
    """Base of all: fields that are not named are refused."""

    model_config = ConfigDict(extra="forbid")


class SamplingBody(Body):
    """What both ways to answer take. ``repetition_penalty`` is ours."""

    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    metadata: Metadata | None = None
    user: str | None = Field(None, description="Accepted and not used; it never names a conversation.")
    safety_identifier: str | None = Field(None, description="Accepted and not used.")
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    tools: Nothing | None = None
    tool_choice: Literal["auto", "none"] | None = None

    def sampling(self, **more: Any) -> Sampling:
        """The settings that were given."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "repetition_penalty")} | more
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Nothing | None = None
    logprobs: Nothing | None = None


Content = Text | list[TextPart]


def text_of(content: Content | None) -> str:
    """A content as one text."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def role_of(role: str) -> str:
    return "system" if role == "developer" else role


# ------------------------------------------------------------------ chat completions


class ChatMessage(Body):
    """A message; fields that an answer has may come back with it, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    def message(self) -> Message:
        return Message(role_of(self.role), text_of(self.content))


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    type: Literal["text"]


class ChatBody(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=20_000)
    max_tokens: int | None = Field(None, ge=1, le=1 << 15)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 15)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None

    def sampled(self) -> Sampling:
        return self.sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
        )


# ------------------------------------------------------------------ responses and conversations


class MessageItem(Body):
    """A message among the items of a conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None

    def message(self) -> Message:
        return Message(role_of(self.role), text_of(self.content))


class CompactionItem(Body):
    """A compacted conversation, as ``responses/compact`` gave it out."""

    type: Literal["compaction"]
    encrypted_content: str = Field(max_length=400)
    id: str | None = None
    created_by: None = None


Item = MessageItem | CompactionItem
Items = Annotated[list[Item], Field(max_length=20_000)]


class ConversationRef(Body):
    id: SessionId


class TextOptions(Body):
    format: TextFormat | None = None


class ResponseBody(SamplingBody):
    input: Text | Items
    instructions: Text | None = None
    conversation: SessionId | ConversationRef | None = None
    previous_response_id: str | None = Field(None, max_length=400)
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 15)
    store: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: Nothing | None = None


class CompactBody(Body):
    model: str
    input: Text | Items | None = None
    instructions: Text | None = None
    previous_response_id: str | None = Field(None, max_length=400)


class ConversationBody(Body):
    items: Annotated[list[MessageItem], Field(max_length=20_000)] | None = None
    metadata: Metadata | None = None


class MetadataBody(Body):
    metadata: Metadata


class ItemsBody(Body):
    items: list[MessageItem] = Field(min_length=1, max_length=20_000)


class ForkBody(Body):
    id: SessionId | None = None
    version: Annotated[int, Field(ge=1, lt=1 << 53)] | None = None


def handle(session: str, version: int) -> str:
    """Name of a version of a conversation, for the ids that are given out."""
    return f"{session}.{version}"


def opened(text: str, param: str, prefix: str = "") -> tuple[str, int]:
    """The session and version of a :func:`handle`.

    Raises:
        ApiError: 404, it is none.
    """
    session, _, version = text.removeprefix(prefix).rpartition(".")
    number = version.isascii() and version.isdecimal() and len(version) <= 15 and int(version) > 0
    if not text.startswith(prefix) or not 0 < len(session) <= 200 or not number:
        raise ApiError(404, f"{param}: there is no {text[:80]!r}", param)
    return session, int(version)
