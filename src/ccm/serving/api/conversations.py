"""Conversations and their items, as OpenAI's clients know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from ..conversations import View
from ..transcript import Entry
from .common import ServiceDep, Session, Tenant
from .errors import ApiError
from .parts import messages_of
from .schemas import ConversationBody, ItemsBody, MetadataBody

router = APIRouter(prefix="/v1/conversations", tags=["conversations"])


@router.post("")
async def create(service: ServiceDep, tenant: Tenant, body: ConversationBody | None = None) -> dict[str, Any]:
    """Begin a conversation, with items that are taken in."""
    body = body or ConversationBody()
    messages = messages_of(body.items or [])
    return _shown(await service.create(tenant, metadata=body.metadata, messages=messages))


@router.get("/{session}")
async def retrieve(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """A conversation and its metadata."""
    return _shown(await service.view(tenant, session))


@router.post("/{session}")
async def update(session: Session, body: MetadataBody, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Put other metadata in place."""
    return _shown(await service.update(tenant, session, body.metadata))


@router.delete("/{session}")
async def delete(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Forget it: memory, versions and texts."""
    await service.delete(tenant, session)
    return {"id": session, "object": "conversation.deleted", "deleted": True}


@router.post("/{session}/items")
async def append(session: Session, body: ItemsBody, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Take items in without an answer."""
    before = await service.timeline(tenant, session)
    await service.append(tenant, session, messages_of(body.items))
    after = await service.timeline(tenant, session)
    return _list(_items(after)[len(_items(before)) :], False)


@router.get("/{session}/items")
async def items(
    session: Session,
    service: ServiceDep,
    tenant: Tenant,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What was said, if texts are kept."""
    turns = await service.timeline(tenant, session)
    if any(turn.content is None for turn in turns):
        raise ApiError(400, "the texts of this conversation were not kept")
    found = _items(turns) if order == "asc" else _items(turns)[::-1]
    if after is not None:
        places = [i for i, item in enumerate(found) if item["id"] == after]
        if not places:
            raise ApiError(404, f"after: there is no item {after[:80]!r}", "after")
        found = found[places[0] + 1 :]
    return _list(found[:limit], len(found) > limit)


def _shown(view: View) -> dict[str, Any]:
    return {
        "id": view.session,
        "object": "conversation",
        "created_at": int(view.created),
        "metadata": view.metadata,
    }


def _list(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": more}


def _items(turns: Sequence[Entry]) -> list[dict[str, Any]]:
    """Turns as items: messages, calls, and what tools gave back."""
    return [item for place, turn in enumerate(turns) for item in _of_turn(turn, place)]


def _of_turn(turn: Entry, place: int) -> list[dict[str, Any]]:
    text = turn.content or ""
    if turn.role == "tool" and turn.tool_call_id:
        output = {"type": "function_call_output", "id": f"fco_{place}", "call_id": turn.tool_call_id}
        return [{**output, "output": text, "status": "completed"}]
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if turn.role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"type": "message", "id": f"msg_{place}", "role": turn.role, "status": "completed"}
    calls = [
        {
            "type": "function_call",
            "id": f"fc_{place}_{n}",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        for n, call in enumerate(turn.tool_calls)
    ]
    return [{**message, "content": [part]}, *calls] if text or not calls else calls
