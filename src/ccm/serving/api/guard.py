"""What surrounds every request: its id, its log line and its count, limits on its body, and who may send it.

Plain ASGI: Starlette's middleware for functions hides from a stream that its client has gone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders

from ..keys import KeyFile, Keys, is_loopback
from ..logs import request_id
from ..metrics import Metrics
from .errors import ApiError, response

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

access = logging.getLogger("ccm.access")

#: Tenant of a server without keys.
LOCAL = "local"
#: Others count as one: a client may make them up without end.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
}


@dataclass(frozen=True)
class HttpLimits:
    """Attributes: most bytes of a body, of an imported memory, and seconds that a body may take to arrive."""

    body: int = 4 << 20
    upload: int = 1 << 28
    seconds: float = 30


class Guard:
    """The outermost layer of the app."""

    def __init__(self, app: App, keys: Keys | KeyFile | None, limits: HttpLimits, metrics: Metrics):
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, begun = time.monotonic(), 500, False
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        request_id.set(name)  # each request has a task, and with it a context, of its own

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = name
                for header, value in _HEADERS.items():
                    out.setdefault(header, value)
            await send(message)

        try:
            if self.keys is None:
                _check_local(headers)
            elif scope["path"].startswith("/v1/"):
                _tenant(self.keys, headers)  # before anything of a stranger's body is kept
            receive = await self._whole_body(scope, headers, receive)
        except ApiError as error:
            await response(error)(scope, receive, sending)
        else:
            try:
                await self.app(scope, receive, sending)
            except Exception as error:
                if begun:
                    raise
                await response(error)(scope, receive, sending)
        finally:
            self._note(scope, status, time.monotonic() - began)

    async def _whole_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Read the body, as far as it may go; what comes after it is news of the connection."""
        most = self.limits.upload if scope["path"] == "/v1/memories/import" else self.limits.body
        too_large = ApiError(413, f"the body is larger than {most} bytes: send it in parts")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        messages: list[Message] = []

        async def read() -> None:
            size = 0
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
                size += len(messages[-1].get("body", b""))
                if size > most:
                    raise too_large

        try:
            await asyncio.wait_for(read(), self.limits.seconds)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self.limits.seconds:.0f} s") from error
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        # the route's pattern, not its address: ids of conversations are secrets
        route = getattr(scope.get("route"), "path", "-")
        self.metrics.requests.labels(method, route, str(status)).inc()
        fields = {
            "tenant": scope.get("state", {}).get("tenant"),
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        access.info("%s %s %d", method, route, status, extra={"fields": fields})


def _check_local(headers: Headers) -> None:
    """Without keys, whoever reaches the port is let in: pages of other sites in the user's browser must not be."""
    host = urlsplit(f"//{headers.get('host', '')}")
    if not is_loopback(host.hostname or ""):
        raise ApiError(403, f"host {host.hostname!r}: without API keys only localhost is served")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host.netloc:
        raise ApiError(403, f"origin {origin!r}: without API keys only the server's own page may call it")


def tenant_of(request: Request) -> str:
    """Whose request this is: from the key and nothing else (a dependency of all routes below /v1).

    Raises:
        ApiError: 401, no key or a wrong one.
    """
    keys: Keys | KeyFile | None = request.app.state.keys
    tenant = LOCAL if keys is None else _tenant(keys, request.headers)
    request.state.tenant = tenant
    return tenant


def _tenant(keys: Keys | KeyFile, headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    tenant = keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
    if tenant is None:
        raise ApiError(401, "no API key, or an unknown one: send the header Authorization: Bearer KEY")
    return tenant
