"""POST /v1/responses: the conversation is named by ``conversation``, or by the response before.

A response's id names a version of a conversation, ``resp_SESSION.VERSION``; going on from an older one is a branch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ...chat.messages import Message, Thought, ToolCall
from ..turn import Outcome, Turn
from .chat import memory
from .common import OnDisconnect, ServiceDep, Tenant, check_model
from .errors import ApiError
from .parts import Body, CompactionItem, Said, messages_of
from .schemas import CompactBody, ConversationRef, ResponseBody, handle, opened
from .stream import EventStream, event, unless_gone

router = APIRouter(prefix="/v1", tags=["responses"])

_PREFIX = "resp_"


@dataclass(frozen=True)
class _Place:
    """Where a response goes on: a session, its version, and whether it must be left as it is."""

    session: str | None
    version: int | None = None
    branch: bool = False


@router.post("/responses", response_model=None)
async def create(
    body: ResponseBody,
    request: Request,
    service: ServiceDep,
    tenant: Tenant,
    x_ccm_on_disconnect: OnDisconnect = None,
) -> Response | dict[str, Any]:
    """Answer the input."""
    check_model(service, body.model)
    place, messages = _place(body), messages_of(body.input)
    compaction = _compaction(body.input)
    if compaction is not None:
        if place.session:
            raise ApiError(400, "input: a compaction begins a conversation: name no other beside it", "input")
        place = _Place(*opened(compaction.encrypted_content, "input"), branch=True)
    if body.store is False:
        if place.session:
            raise ApiError(
                400, "store: got false beside a conversation, which is stored: leave it out", "store"
            )
        place = _Place(None)
    if not messages:
        raise ApiError(
            400, "input: got nothing to answer, expected a text or items: send what the user says", "input"
        )
    turn = await service.answer(
        tenant,
        place.session,
        messages,
        body.sampled(),
        create=place.session == "",
        version=place.version,
        branch=place.branch,
        instructions=body.instructions,
        tools=body.offered(),
        disconnect=x_ccm_on_disconnect,
    )
    frame = _frame(body, service.name, turn)
    if body.stream:
        return EventStream(_events(turn, frame), turn)
    outcome = await unless_gone(request, turn)
    return _completed(frame, outcome, _output(outcome))


@router.post("/responses/compact", response_model=None)
async def compact(body: CompactBody, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Fold a history into an opaque item that a later input may begin with. It is kept here, under its tenant."""
    check_model(service, body.model)
    messages = messages_of(body.input or [])
    session, version = None, None
    if body.previous_response_id is not None:
        session, version = opened(body.previous_response_id, "previous_response_id", _PREFIX)
    if (compaction := _compaction(body.input or [])) is not None:
        session, version = opened(compaction.encrypted_content, "input")
    if body.instructions:
        messages.insert(0, Message("system", body.instructions))
    if not messages and session is None:
        raise ApiError(400, "input: got nothing, expected a text or items", "input")
    if not messages:
        view, tokens = await service.fork(tenant, str(session), None, version), 0
    else:
        view, tokens = await service.compact(tenant, messages, session, version)
    now = int(time.time())
    said = [_message_item(m.content, m.role) for m in messages if m.role == "user"]
    folded = {
        "type": "compaction",
        "id": f"cmp_{secrets.token_hex(12)}",
        "encrypted_content": handle(view.session, view.version),
    }
    return {
        "id": f"{_PREFIX}{handle(view.session, view.version)}",
        "object": "response.compaction",
        "created_at": now,
        "output": [*said, folded],
        "usage": _usage(tokens, 0, 0),
    }


def _place(body: ResponseBody) -> _Place:
    if body.previous_response_id is not None:
        if body.conversation is not None:
            raise ApiError(
                400,
                "previous_response_id: cannot stand beside conversation: give one of them",
                "previous_response_id",
            )
        return _Place(*opened(body.previous_response_id, "previous_response_id", _PREFIX))
    ref = body.conversation
    return _Place(ref.id if isinstance(ref, ConversationRef) else ref or "")


def _compaction(items: str | Sequence[Said | CompactionItem]) -> CompactionItem | None:
    """The last compaction among the items; it holds what was before."""
    found = [item for item in items if isinstance(item, CompactionItem)]
    return found[-1] if found else None


def _frame(body: ResponseBody, model: str, turn: Turn) -> dict[str, Any]:
    """A response before anything is written."""
    name = handle(turn.session, turn.version) if turn.session else secrets.token_urlsafe(24)
    return {
        "id": f"{_PREFIX}{name}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": bool(body.parallel_tool_calls),
        "previous_response_id": body.previous_response_id,
        "conversation": {"id": turn.session} if body.conversation else None,
        "store": turn.session is not None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": _given(body.text) or {"format": {"type": "text"}},
        "tool_choice": _choice(body),
        "tools": [_given(tool) for tool in body.tools or ()],
        "truncation": body.truncation or "disabled",
        "metadata": body.metadata or {},
        "usage": None,
    }


def _given(part: Body | None) -> dict[str, Any]:
    """A part of a request as it was sent."""
    return {} if part is None else part.model_dump(by_alias=True, exclude_unset=True)


def _choice(body: ResponseBody) -> Any:
    return _given(body.tool_choice) if isinstance(body.tool_choice, Body) else body.tool_choice or "auto"


def _completed(frame: dict[str, Any], outcome: Outcome, output: list[dict[str, Any]]) -> dict[str, Any]:
    cut = outcome.finish_reason == "length"
    return {
        **frame,
        "status": _status(outcome),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": _usage(
            outcome.prompt_tokens,
            outcome.known_tokens,
            outcome.completion_tokens,
            outcome.reasoning_tokens,
        ),
        **memory(outcome),
    }


def _status(outcome: Outcome) -> str:
    return "incomplete" if outcome.finish_reason == "length" else "completed"


def _output(outcome: Outcome) -> list[dict[str, Any]]:
    """An answer as items: thoughts, what is said, and calls, as far as there are any."""
    items = [_reasoning_item(outcome.reasoning)] if outcome.reasoning else []
    if outcome.text or not outcome.tool_calls:
        items.append(_message_item(outcome.text, "assistant", _status(outcome)))
    return [*items, *map(_call_item, outcome.tool_calls)]


def _message_item(text: str, role: str, status: str = "completed") -> dict[str, Any]:
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": f"msg_{secrets.token_hex(12)}",
        "role": role,
        "status": status,
        "content": [part],
    }


def _reasoning_item(text: str, status: str = "completed") -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": f"rs_{secrets.token_hex(12)}",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
        "status": status,
    }


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _usage(read: int, known: int, written: int, thought: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": known},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": read + written,
    }


async def _events(turn: Turn, frame: dict[str, Any]) -> AsyncGenerator[str, None]:
    items = _Items()
    yield items.event("response.created", response=frame)
    yield items.event("response.in_progress", response=frame)
    said = 0
    async for piece in turn:
        said += 0 if isinstance(piece, Thought) else len(piece)
        for text in items.write(piece):
            yield text
    outcome = turn.outcome
    if rest := outcome.text[said:]:  # held back, as it could have become a call
        for text in items.write(rest):
            yield text
    for text in items.finish(outcome):
        yield text
    done = _completed(frame, outcome, items.done)
    yield items.event(f"response.{done['status']}", response=done)


class _Items:
    """The output items of a streamed response, as they are written, and the events that tell of them.

    Attributes:
        done: those that are complete.
    """

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] = {}  # the item that is written now
        self._number = -1

    def event(self, kind: str, **data: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **data}, kind)

    def write(self, piece: str) -> Iterator[str]:
        """One more piece, of the item that is open or of a new one."""
        kind = "reasoning" if isinstance(piece, Thought) else "message"
        if self._open.get("type") != kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        (part,) = self._open["content"]
        part["text"] += piece
        yield self.event(f"response.{part['type']}.delta", **self._where(), delta=piece, **_logprobs(part))

    def finish(self, outcome: Outcome) -> Iterator[str]:
        """The end of what is open, and calls."""
        if not self._open and not outcome.tool_calls:
            yield from self._begin("message")  # that says nothing
        yield from self._close(_status(outcome))
        for call in outcome.tool_calls:
            item = _call_item(call)
            where = {"item_id": item["id"], "output_index": len(self.done)}
            begun = {**item, "arguments": "", "status": "in_progress"}
            yield self.event("response.output_item.added", output_index=len(self.done), item=begun)
            yield self.event("response.function_call_arguments.delta", **where, delta=call.arguments)
            yield self.event(
                "response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments
            )
            yield self.event("response.output_item.done", output_index=len(self.done), item=item)
            self.done.append(item)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._open["id"], "output_index": len(self.done), "content_index": 0}

    def _begin(self, kind: str) -> Iterator[str]:
        item = _reasoning_item("") if kind == "reasoning" else _message_item("", "assistant")
        self._open = item | {"status": "in_progress"}
        yield self.event(
            "response.output_item.added", output_index=len(self.done), item={**self._open, "content": []}
        )
        yield self.event("response.content_part.added", **self._where(), part=item["content"][0])

    def _close(self, status: str) -> Iterator[str]:
        if not self._open:
            return
        item = self._open | {"status": status}
        (part,) = item["content"]
        text = part["text"]
        yield self.event(f"response.{part['type']}.done", **self._where(), text=text, **_logprobs(part))
        yield self.event("response.content_part.done", **self._where(), part=part)
        yield self.event("response.output_item.done", output_index=len(self.done), item=item)
        self.done.append(item)
        self._open = {}


def _logprobs(part: dict[str, Any]) -> dict[str, Any]:
    """Events of a part have them if the part has them."""
    return {"logprobs": []} if "logprobs" in part else {}
