"""The app: routes, their guard, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response

from ... import __version__
from ..keys import KeyFile, Keys
from ..service import Service
from . import chat, conversations, errors, memories, responses
from .common import ServiceDep, Tenant, check_model
from .errors import ApiError
from .guard import Guard, HttpLimits, tenant_of

_PAGE = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "inside.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "marked.js": "text/javascript; charset=utf-8",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    400: "Not usable as given",
    401: "No API key, or an unknown one",
    403: "Not allowed, or a limit of the tenant is reached",
    404: "Not there, or somebody else's",
    408: "The body took too long",
    409: "Another turn is running or came first, or a memory of another model",
    413: "Too large",
    429: "Too many turns are waiting",
    500: "The server failed",
    503: "Stopping, or the store is not reachable",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in _STATUSES.items()
}


def create_app(
    service: Service, *, keys: Keys | KeyFile | None = None, limits: HttpLimits | None = None
) -> FastAPI:
    """The server as an ASGI app.

    Args:
        service: conversations; the app closes it at the end.
        keys: who may come in; None lets everybody in who can reach it from this machine.
        limits: of bodies.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tending = asyncio.create_task(service.health.tend())
        try:
            yield
        finally:
            tending.cancel()
            with suppress(asyncio.CancelledError):
                await tending
            await service.running.drain()
            service.close()

    app = FastAPI(
        title="Compressed Context Memory",
        version=__version__,
        description="Conversations in a memory that stays small, for OpenAI's clients.",
        lifespan=lifespan,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service, app.state.keys = service, keys
    app.state.told = set()  # tenants that know what a request without a conversation comes to
    app.add_middleware(Guard, keys=keys, limits=limits or HttpLimits(), metrics=service.metrics)
    errors.install(app)
    for router in (chat.router, responses.router, conversations.router, memories.router, _models):
        app.include_router(router, responses=_RESPONSES)
    app.include_router(_state)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


_models = APIRouter(prefix="/v1/models", tags=["models"])


def _model(service: Service) -> dict[str, Any]:
    reader = service.method.reader
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "ccm",
        "parameters": service.parameters,
        "context": reader.context,
        "kv_bytes_per_token": reader.kv_bytes_per_token(),
    }


@_models.get("")
async def models(service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(service)]}


@_models.get("/{model:path}")
async def model(model: str, service: ServiceDep, tenant: Tenant) -> dict[str, Any]:
    """The model of this name."""
    check_model(service, model)
    return _model(service)


_state = APIRouter(tags=["state"])


@_state.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@_state.get("/readyz", responses={503: {"description": "Not ready", "content": {"application/json": {}}}})
async def readyz(service: ServiceDep) -> JSONResponse:
    """The model's thread is alive and the store can be written."""
    reasons = await service.health.ready()
    return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


def _scraper(request: Request) -> None:
    if request.app.state.keys is not None:
        tenant_of(request)


@_state.get(
    "/metrics", dependencies=[Depends(_scraper)], response_class=Response, responses={401: _RESPONSES[401]}
)
async def metrics(service: ServiceDep) -> Response:
    """Counters for Prometheus; with API keys it needs one."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@_state.get("/", include_in_schema=False)
async def page() -> Response:
    """The web page."""
    return _file("index.html")


@_state.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """A file of the web page."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _PAGE:
        raise ApiError(404, "there is no such file")
    return Response((files("ccm.serving") / "page" / name).read_bytes(), media_type=_PAGE[name])


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without the status that FastAPI adds for what is a 400 here."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = schema
    return app.openapi_schema
