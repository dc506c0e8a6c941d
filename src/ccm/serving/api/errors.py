"""Every error in the shape that OpenAI's clients understand: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import (
    CCMError,
    ConfigError,
    MemoryFileError,
    MismatchError,
    MissingPackageError,
    StorageError,
)
from ..engine import EngineError, OverloadedError, StoppingError
from ..running import BusyError
from ..store import ConflictError, NotFoundError, QuotaError

log = logging.getLogger(__name__)

#: Error, status, OpenAI's type and code; the first that fits counts.
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (BusyError, 409, "invalid_request_error", "conversation_locked"),
    (ConflictError, 409, "invalid_request_error", "conflict"),
    (QuotaError, 403, "insufficient_quota", "insufficient_quota"),
    (StoppingError, 503, "server_error", "stopping"),
    (OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (MismatchError, 409, "invalid_request_error", "memory_mismatch"),
    (MemoryFileError, 409, "invalid_request_error", "memory_damaged"),
    (ConfigError, 400, "invalid_request_error", "invalid_value"),
    (MissingPackageError, 400, "invalid_request_error", "unsupported_value"),
    (StorageError, 503, "server_error", "store_unavailable"),
    (EngineError, 500, "server_error", "engine_failed"),
)

#: What pydantic says of a value that is not what it should be.
_EXPECTED = "Input should be "
_WORDS = {
    "a valid dictionary or object to extract fields from": "an object",
    "a valid dictionary": "an object",
    "False": "false",
    "None": "null",
}
#: What to send in place of a field that OpenAI's clients know and this server does not.
_INSTEAD = {"functions": "send tools", "function_call": "send tools, or a message with tool_calls"}
#: What an id of the caller may be.
ID_RULE = "expected 1 to 200 characters, not dots alone, without blanks and / \\ ? # %"

_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 408: "timeout", 413: "too_large"}


class ApiError(CCMError):
    """An error of HTTP itself.

    Attributes:
        status: of the answer.
        param: the field that it is about.
        code: for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or _CODES.get(status)


def body_of(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error; what the server is to blame for says nothing of its inside."""
    if isinstance(error, ApiError):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return error.status, body_of(str(error), kind, error.code, error.param), headers
    for known, status, kind, code in _TABLE:
        if isinstance(error, known):
            wait = getattr(error, "retry_after", 5 if status == 503 else None)
            headers = {} if wait is None else {"Retry-After": str(wait)}
            message = str(error)
            if known is StorageError:  # names places of the machine, and its operator has to see it
                log.error("the store failed: %s", message)
                message = "the store failed; the server's log says why: read the newest version and try again"
            return status, body_of(message, kind, code), headers
    log.error("unexpected error", exc_info=error)
    return 500, body_of("the server failed on this request; its log says why", "server_error", None), {}


def response(error: Exception) -> JSONResponse:
    """What a client gets for an error."""
    status, body, headers = describe(error)
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Give the app these errors in place of FastAPI's own."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return response(error)

    async def http(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            return response(error)
        said = {
            400: "the body is not JSON in UTF-8, or nested too deeply",
            404: "there is no such address here",
            405: f"{request.method} is not possible here",
        }
        code = "invalid_json" if error.status_code == 400 else None
        message = said.get(error.status_code, str(error.detail))
        answer = response(ApiError(error.status_code, message, code=code))
        answer.headers.update(error.headers or {})
        return answer

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            return response(error)
        return response(_refusal(error))

    app.add_exception_handler(CCMError, handle)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def _refusal(error: RequestValidationError) -> ApiError:
    """One sentence for what a request has wrong, with the place of it."""
    # of a choice of types all have failed; the error that lies deepest is of the type that was meant
    found = [(_place(one, error.body), one) for one in error.errors()]
    place, first = max(found, key=lambda pair: (len(pair[0]), pair[1]["type"] == "unsupported"))
    kind, (source, *rest) = first["type"], first["loc"]
    name = _named(place)
    if kind == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error')}", None, "invalid_json"
        )
    if source == "body" and not rest and kind != "missing":
        text = "the body is no JSON object: send one, with the header Content-Type: application/json"
        return ApiError(400, text, None, "invalid_value")
    if kind == "extra_forbidden" or first.get("ctx", {}).get("max_length") == 0:
        text = f"{name} is not supported: {_INSTEAD.get(str(place[-1]), 'leave the field out')}"
        return ApiError(400, text, name, "unsupported_parameter")
    if kind == "string_pattern_mismatch":  # all our patterns are of ids
        rule = f"{ID_RULE}, and in a header ASCII alone" if source == "header" else ID_RULE
        return ApiError(400, f"{name}: {rule}", name, "invalid_value")
    if kind == "too_short" and isinstance(first["input"], list):
        text = f"{name}: got an empty list, expected at least one: send what is to be read"
        return ApiError(400, text, name, "invalid_value")
    if kind == "missing":
        return ApiError(400, f"{name or 'the body'} is missing: send it", name, "invalid_value")
    expected = [
        one["msg"].removeprefix(_EXPECTED)
        for other, one in found
        if other == place and one["msg"].startswith(_EXPECTED)
    ]
    text = first["msg"]
    if text.startswith(_EXPECTED):
        text = f"got {_shown(first['input'])}, expected " + " or ".join(
            dict.fromkeys(_WORDS.get(word, word) for word in expected)
        )
    code = "unsupported_value" if kind == "unsupported" else "invalid_value"
    return ApiError(400, f"{name or 'body'}: {text}", name, code)


def _place(error: dict[str, Any], body: Any) -> list[str | int]:
    """Where an error is; for a choice of types, pydantic names the type that it tried beside the field."""
    source, *place = error["loc"]
    if source != "body":
        return list(place)
    known: list[str | int] = []
    for part in place:
        if part in (body if isinstance(body, dict) else range(len(body) if isinstance(body, list) else 0)):
            known.append(part)
            body = body[part]
    return [*known, place[-1]] if error["type"] == "missing" and place else known


def _named(place: Sequence[str | int]) -> str | None:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in place]
    return "".join(parts).removeprefix(".") or None


def _shown(value: Any) -> str:
    """A value as it was sent; of what is large, only what it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
