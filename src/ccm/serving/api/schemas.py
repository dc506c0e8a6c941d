"""Bodies of requests. What OpenAI's clients may send and this server does not do is refused, never ignored; where a
field says what is the case anyway, it may be sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from ..engine import Sampling
from ..engine.base import LONGEST_ANSWER, LONGEST_STOP
from .errors import ApiError
from .parts import (
    Body,
    ChatFormat,
    ChatMessage,
    ChatToolChoice,
    ChatTools,
    FlatFormat,
    FlatToolChoice,
    FlatTools,
    Item,
    SaidItem,
    Text,
    Unused,
    call_schema,
)

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
Nothing = Annotated[dict[str, Any], Field(max_length=0)]
#: Of items that only other servers' tools make: there are none here.
Elsewhere = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]


class SamplingBody(Body):
    """What both ways to answer take; ``top_k``, ``min_p`` and ``repetition_penalty`` are not OpenAI's."""

    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="-1 and 0: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    metadata: Metadata | None = None
    user: str | None = Field(None, description="Accepted and not used; it never names a conversation.")
    safety_identifier: str | None = Field(None, description="Accepted and not used.")
    prompt_cache_key: Unused = Field(None, description="Accepted and not used, as what follows.")
    prompt_cache_retention: Unused = None
    prompt_cache_options: Unused = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    top_logprobs: Literal[0] | None = None

    def sampling(self, **more: Any) -> Sampling:
        """The settings that were given; the model's own are the rest. Too long an answer is cut there."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names} | more
        if self.top_k is not None:
            given["top_k"] = max(0, self.top_k)
        if given.get("max_tokens"):
            given["max_tokens"] = min(given["max_tokens"], LONGEST_ANSWER)
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def offered(self) -> list[dict[str, Any]]:
        """Tools that the model may call, as chat templates read them.

        Raises:
            ApiError: one call at a time was asked for, where the model decides.
        """
        tools = [] if self.tool_choice == "none" else [tool.tool() for tool in self.tools or ()]
        if tools and self.parallel_tool_calls is False and self.tool_choice in (None, "auto"):
            raise ApiError(
                400,
                "parallel_tool_calls: got false beside tools, which is not supported: the model may ask for several "
                "calls at once; leave it out, or send tool_choice required",
                "parallel_tool_calls",
                "unsupported_value",
            )
        return tools

    def forced(self) -> str | None:
        """JSON schema of the one call that the answer has to be, if it has to be one.

        Raises:
            ApiError: of a function that is not among the tools.
        """
        if self.tool_choice in (None, "auto", "none"):
            return None
        name = None if self.tool_choice == "required" else self.tool_choice.called
        tools = [tool for tool in self.offered() if name in (None, tool["function"]["name"])]
        if not tools:
            what = (
                "'required' without tools" if name is None else f"{name[:80]!r}, which is not among the tools"
            )
            raise ApiError(400, f"tool_choice: got {what}", "tool_choice", "invalid_value")
        return call_schema(tools)


# ------------------------------------------------------------------ chat completions


class StreamOptions(Body):
    """What a stream brings beside its pieces."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatBody(SamplingBody):
    """Of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=20_000)
    tools: ChatTools | None = None
    tool_choice: ChatToolChoice | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Nothing | None = None
    response_format: ChatFormat | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Unused = Field(None, description="Accepted and not used.")
    verbosity: Unused = Field(None, description="Accepted and not used.")
    store: Literal[False] | None = None

    def sampled(self) -> Sampling:
        """How the answer is drawn."""
        return self.sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            schema=self.forced() or (self.response_format and self.response_format.schema_text()),
        )


# ------------------------------------------------------------------ responses and conversations

Items = Annotated[list[Item], Field(max_length=20_000)]


class ConversationRef(Body):
    """A conversation by its id."""

    id: SessionId


class TextOptions(Body):
    """The form of an answer."""

    format: FlatFormat | None = None
    verbosity: Unused = Field(None, description="Accepted and not used.")


#: System text; one of blanks is none.
Instructions = Annotated[Text | None, AfterValidator(lambda text: text if text and text.strip() else None)]


class ContextManagement(Body):
    """Every conversation is compacted here as it grows."""

    type: Literal["compaction"]
    compact_threshold: int | None = None


class ResponseBody(SamplingBody):
    """Of POST /v1/responses."""

    input: Text | Items
    instructions: Instructions = None
    tools: FlatTools | None = None
    tool_choice: FlatToolChoice | None = None
    conversation: SessionId | ConversationRef | None = None
    previous_response_id: str | None = Field(None, max_length=400)
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, description="Of tools that run on the server: there are none.")
    store: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    context_management: list[ContextManagement] | None = None
    reasoning: dict[str, Any] | None = Field(None, description="Accepted and not used.")
    background: Literal[False] | None = None
    include: list[Elsewhere] | None = None

    def sampled(self) -> Sampling:
        """How the answer is drawn."""
        form = self.text and self.text.format
        schema = self.forced() or (form and form.schema_text())
        return self.sampling(max_tokens=self.max_output_tokens, schema=schema)


class CompactBody(Body):
    """Of POST /v1/responses/compact."""

    model: str
    input: Text | Items | None = None
    instructions: Instructions = None
    previous_response_id: str | None = Field(None, max_length=400)
    prompt_cache_key: Unused = Field(None, description="Accepted and not used, as what follows.")
    prompt_cache_retention: Unused = None
    prompt_cache_options: Unused = None
    service_tier: Unused = None


class ConversationBody(Body):
    """Of POST /v1/conversations."""

    items: Annotated[list[SaidItem], Field(max_length=20_000)] | None = None
    metadata: Metadata | None = None


class MetadataBody(Body):
    """Metadata in place of what a conversation has."""

    metadata: Metadata


class ItemsBody(Body):
    """What a conversation takes in without an answer."""

    items: list[SaidItem] = Field(min_length=1, max_length=20_000)


class PinBody(Body):
    """A text that is to be pinned."""

    text: str


class ForkBody(Body):
    """The id of the copy, and the version that it is taken from."""

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
