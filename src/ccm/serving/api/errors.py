"""Every error in the shape that OpenAI's clients understand: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import CCMError, ConfigError, MemoryFileError, MismatchError, StorageError
from ..engine import EngineError, OverloadedError, StoppingError
from ..service import BusyError
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
    (StorageError, 503, "server_error", "store_unavailable"),
    (EngineError, 500, "server_error", "engine_failed"),
)

_FIELD = re.compile(r"(?!str$)[a-z][a-z0-9_]*|[0-9]+")
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
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error; what nobody expected says nothing of its inside."""
    if isinstance(error, ApiError):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return error.status, body_of(str(error), kind, error.code, error.param), headers
    for known, status, kind, code in _TABLE:
        if isinstance(error, known):
            wait = getattr(error, "retry_after", 5 if status == 503 else None)
            headers = {} if wait is None else {"Retry-After": str(wait)}
            return status, body_of(str(error), kind, code), headers
    log.error("unexpected error", exc_info=error)
    return 500, body_of("the server failed on this request; its log says why", "server_error", None), {}


def response(error: Exception) -> JSONResponse:
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
        first = error.errors()[0]
        kind, (source, *place) = first["type"], map(str, first["loc"])
        # for a choice of types, pydantic names the type that it tried beside the field
        known = [part for part in place if source != "body" or _FIELD.fullmatch(part)]
        if kind == "extra_forbidden":
            known = [*known, place[-1][:80]] if place[-1] not in known[-1:] else known
        param = ".".join(known) if kind != "json_invalid" and known else None
        message, code = f"{param or 'body'}: {first['msg']}", "invalid_value"
        if source == "body" and not place and kind != "missing":
            message = "the body is no JSON object: send one, with the header Content-Type: application/json"
        elif kind == "string_pattern_mismatch":  # all our patterns are of ids
            message = f"{param}: {ID_RULE}"
        elif kind == "extra_forbidden":
            message, code = f"{param} is not supported here: leave it out", "unsupported_parameter"
        elif kind == "json_invalid":
            message, code = f"the body is not JSON: {first.get('ctx', {}).get('error')}", "invalid_json"
        return response(ApiError(400, message, param, code))

    app.add_exception_handler(CCMError, handle)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
