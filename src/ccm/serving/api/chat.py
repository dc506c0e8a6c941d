"""POST /v1/chat/completions: the header X-Session-Id names the conversation; without it nothing is remembered."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header
from starlette.requests import Request
from starlette.responses import Response

from ...chat.messages import Thought
from ..turn import Outcome, Taken, Turn
from .common import OnDisconnect, ServiceDep, Tenant, check_model
from .parts import says_nothing
from .schemas import ChatBody, HeaderId
from .stream import EventStream, event, unless_gone

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1", tags=["chat"])


@router.post("/chat/completions", response_model=None)
async def complete(
    body: ChatBody,
    request: Request,
    service: ServiceDep,
    tenant: Tenant,
    x_session_id: Annotated[
        HeaderId | None,
        Header(description="Which conversation; it begins with its first turn. Empty: none."),
    ] = None,
    x_ccm_on_disconnect: OnDisconnect = None,
    x_ccm_resend: Annotated[
        Literal["match", "refuse", "rebuild"] | None,
        Header(
            description="What to do with a history that differs from the known one; else the server's --resend."
        ),
    ] = None,
    x_ccm_keep: Annotated[
        int | None,
        Header(
            ge=0,
            lt=1 << 31,
            description="Go back to so many of the first messages that the conversation knows, and on from there.",
        ),
    ] = None,
    x_ccm_ephemeral: Annotated[
        bool | None,
        Header(
            description="No part of the conversation, such as a title for it: answered, and not remembered."
        ),
    ] = None,
) -> Response | dict[str, Any]:
    """Answer the last message. A history that is sent again is recognised; only what is new is read."""
    check_model(service, body.model)
    if not x_session_id and not x_ccm_ephemeral:
        _say_forgotten(request.app.state.told, tenant, body)
    turn = await service.answer(
        tenant,
        x_session_id or None,
        [message.message() for message in body.messages if not says_nothing(message)],
        body.sampled(),
        create=True,
        resent=True,
        tools=body.offered(),
        disconnect=x_ccm_on_disconnect,
        resend=x_ccm_resend,
        aside=x_ccm_ephemeral,
        keep=x_ccm_keep,
    )
    frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_events(turn, frame, usage), turn)
    outcome = await unless_gone(request, turn)
    choice = {
        "index": 0,
        "message": _message(outcome),
        "logprobs": None,
        "finish_reason": outcome.finish_reason,
    }
    return {
        **frame,
        "object": "chat.completion",
        "choices": [choice],
        "usage": _usage(outcome),
        **memory(outcome),
    }


def _say_forgotten(told: set[str], tenant: str, body: ChatBody) -> None:
    """Log once for each tenant that a request names no conversation, so that its client does not forget unseen."""
    if tenant in told:
        return
    told.add(tenant)
    log.warning(
        "a chat completion of tenant %s names no conversation%s, so it is answered from its own messages and nothing "
        "is remembered: send the header X-Session-Id with an id for each conversation (docs/clients.md); said once",
        tenant,
        " (its field user does not)" if body.user else "",
    )


def _message(outcome: Outcome) -> dict[str, Any]:
    """An answer; thoughts and calls are there if the model had any."""
    calls = _calls(outcome)
    text = outcome.text if outcome.text or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if outcome.reasoning:
        message["reasoning_content"] = outcome.reasoning
    return {**message, "tool_calls": calls} if calls else message


def _calls(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in outcome.tool_calls
    ]


async def _events(turn: Turn, frame: dict[str, Any], usage: bool) -> AsyncGenerator[str, None]:
    frame = {**frame, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**frame, "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""})
    said = 0
    async for piece in turn:
        if isinstance(piece, Thought):
            yield chunk({"reasoning_content": piece})
        else:
            said += len(piece)
            yield chunk({"content": piece})
    outcome = turn.outcome
    if rest := outcome.text[said:]:  # held back, as it could have become a call
        yield chunk({"content": rest})
    for index, call in enumerate(_calls(outcome)):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, outcome.finish_reason, **memory(outcome))
    if usage:
        yield event({**frame, "choices": [], "usage": _usage(outcome)})
    yield event("[DONE]")


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.known_tokens},
        "completion_tokens_details": {"reasoning_tokens": outcome.reasoning_tokens},
    }


def memory(outcome: Outcome) -> dict[str, Any]:
    """What the conversation's memory holds after the turn, as a field of its own; none without a conversation."""
    if outcome.session is None:
        return {}
    taken = asdict(outcome.taken or Taken())
    taken = {name: value for name, value in taken.items() if value is not None and value is not False}
    stats = outcome.stats or {}
    return {"memory": {"session": outcome.session, "version": outcome.version, **stats, "history": taken}}
