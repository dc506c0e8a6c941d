"""Memories: what conversations hold; copies, files, and making them anew."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ...errors import MemoryFileError
from ..conversations import View
from ..service import Service
from .common import ServiceDep, Session, Tenant
from .errors import ApiError
from .schemas import ForkBody, PinBody, SessionId

router = APIRouter(prefix="/v1/memories", tags=["memories"])

_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get("")
async def sessions(
    service: ServiceDep,
    tenant: Tenant,
    after: SessionId | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """One page of conversations, ordered by id; ``after`` is the last id of the page before."""
    found, labels = await asyncio.gather(
        service.sessions(tenant, after, limit), service.labels(tenant, after, limit)
    )
    data = [
        {
            "id": info.session,
            "object": "memory",
            **_without_session(asdict(info)),
            "metadata": labels.get(info.session, {}),
        }
        for info in found
    ]
    return {"object": "list", "data": data, "has_more": len(found) == limit}


@router.post("/import", openapi_extra={"requestBody": {"required": True, **_BINARY}})
async def load(
    request: Request,
    service: ServiceDep,
    tenant: Tenant,
    new: Annotated[SessionId | None, Query(alias="id")] = None,
) -> dict[str, Any]:
    """A conversation from the bytes of a session file."""
    try:
        view = await service.load(tenant, await request.body(), new)
    except MemoryFileError as error:
        raise ApiError(400, str(error), "body", "invalid_memory") from error
    return await _shown(service, tenant, view)


@router.get("/{session}")
async def inspect(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """What is held, what it stands for, and the turns that it was made of."""
    return await _shown(service, tenant, await service.view(tenant, session))


@router.get("/{session}/inside")
async def inside(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Which turns each entry of the memory stands for."""
    found = await service.inside(tenant, session)
    return {"id": session, "object": "memory.inside", **found.as_dict()}


@router.post("/{session}/reading")
async def reading(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """The same as it was before the newest answer, and how much attention the answer pays to each entry, by layer
    group. The model reads the answer once more for it, in the queue of the turns."""
    found = await service.reading(tenant, session)
    return {"id": session, "object": "memory.inside", **found.as_dict()}


@router.delete("/{session}")
async def delete(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Forget a conversation: memory, versions and texts."""
    await service.delete(tenant, session)
    return {"id": session, "object": "memory.deleted", "deleted": True}


@router.post("/{session}/pins")
async def pin(session: Session, service: ServiceDep, tenant: Tenant, body: PinBody) -> dict[str, Any]:
    """Keep a text in front of everything, word for word, for as long as the conversation lives."""
    return await _shown(service, tenant, await service.pin(tenant, session, body.text))


@router.post("/{session}/fork")
async def fork(
    session: Session, service: ServiceDep, tenant: Tenant, body: ForkBody | None = None
) -> dict[str, Any]:
    """A copy that goes its own way."""
    body = body or ForkBody()
    view = await service.fork(tenant, session, body.id, body.version)
    return await _shown(service, tenant, view)


@router.get("/{session}/export", response_class=Response, responses={200: _BINARY})
async def export(session: Session, service: ServiceDep, tenant: Tenant) -> Response:
    """A session file, for ``ccm chat --load``, ``Session.load`` and other servers."""
    headers = {"Content-Disposition": 'attachment; filename="conversation.ccm"'}
    return Response(await service.export(tenant, session), 200, headers, "application/octet-stream")


@router.post("/{session}/rebuild")
async def rebuild(session: Session, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """Make the memory anew from the texts that were kept, by the model and adapter of this server."""
    return await _shown(service, tenant, await service.rebuild(tenant, session))


async def _shown(service: Service, tenant: str, view: View) -> dict[str, Any]:
    turns = [asdict(turn) for turn in await service.timeline(tenant, view.session)]
    return {"id": view.session, "object": "memory", **_without_session(asdict(view)), "turns": turns}


def _without_session(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "session"}
