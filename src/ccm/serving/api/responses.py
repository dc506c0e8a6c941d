"""POST /v1/responses: the conversation is named by ``conversation``, or by the response before.

A response's id names a version of a conversation, ``resp_SESSION.VERSION``; going on from an older one is a branch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..history import Message
from ..service import Outcome, Turn
from .chat import memory
from .common import ServiceDep, Tenant, check_model
from .errors import ApiError
from .schemas import CompactBody, CompactionItem, ConversationRef, Item, ResponseBody, handle, opened
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
    body: ResponseBody, request: Request, service: ServiceDep, tenant: Tenant
) -> Response | dict[str, Any]:
    """Answer the input."""
    check_model(service, body.model)
    place, messages = _place(body), _messages(body.input)
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
    turn = await service.answer(
        tenant,
        place.session,
        messages,
        body.sampling(max_tokens=body.max_output_tokens),
        create=place.session == "",
        version=place.version,
        branch=place.branch,
        instructions=body.instructions,
    )
    frame = _frame(body, service.name, turn)
    if body.stream:
        return EventStream(_events(turn, frame), turn)
    return _completed(frame, await unless_gone(request, turn))


@router.post("/responses/compact", response_model=None)
async def compact(body: CompactBody, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Fold a history into an opaque item that a later input may begin with. It is kept here, under its tenant."""
    check_model(service, body.model)
    messages = _messages(body.input or [])
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


def _compaction(items: str | Sequence[Item]) -> CompactionItem | None:
    """The last compaction among the items; it holds what was before."""
    found = [item for item in items if isinstance(item, CompactionItem)]
    return found[-1] if found else None


def _messages(items: str | Sequence[Item]) -> list[Message]:
    """The messages behind the last compaction."""
    if isinstance(items, str):
        return [Message("user", items)]
    messages: list[Message] = []
    for item in items:
        if isinstance(item, CompactionItem):
            messages.clear()
        else:
            messages.append(item.message())
    return messages


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
        "text": {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [],
        "truncation": "disabled",
        "metadata": body.metadata or {},
        "usage": None,
    }


def _completed(frame: dict[str, Any], outcome: Outcome, item_id: str | None = None) -> dict[str, Any]:
    cut = outcome.finish_reason == "length"
    status = "incomplete" if cut else "completed"
    return {
        **frame,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_message_item(outcome.text, "assistant", item_id, status)],
        "usage": _usage(outcome.prompt_tokens, outcome.known_tokens, outcome.completion_tokens),
        **memory(outcome),
    }


def _message_item(
    text: str, role: str, item_id: str | None = None, status: str = "completed"
) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": item_id or f"msg_{secrets.token_hex(12)}",
        "role": role,
        "status": status,
        "content": [part],
    }


def _usage(read: int, known: int, written: int) -> dict[str, Any]:
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": known},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


async def _events(turn: Turn, frame: dict[str, Any]) -> AsyncGenerator[str, None]:
    number = -1
    item = _message_item("", "assistant", status="in_progress")
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}

    def send(kind: str, **data: Any) -> str:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number, **data}, kind)

    yield send("response.created", response=frame)
    yield send("response.in_progress", response=frame)
    yield send("response.output_item.added", output_index=0, item={**item, "content": []})
    yield send("response.content_part.added", **where, part=item["content"][0])
    async for piece in turn:
        yield send("response.output_text.delta", **where, delta=piece, logprobs=[])
    done = _completed(frame, turn.outcome, item["id"])
    (item,) = done["output"]
    yield send("response.output_text.done", **where, text=turn.outcome.text, logprobs=[])
    yield send("response.content_part.done", **where, part=item["content"][0])
    yield send("response.output_item.done", output_index=0, item=item)
    yield send(f"response.{done['status']}", response=done)
