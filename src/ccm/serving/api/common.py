"""What all routes need."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends, Header, Path, Request

from ..service import Service
from .errors import ApiError
from .guard import tenant_of
from .schemas import SessionId

#: Another name of the model, for clients whose settings should not change with it.
ALIAS = "ccm"


def service_of(request: Request) -> Service:
    """The service behind the application."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
Tenant = Annotated[str, Depends(tenant_of)]
Session = Annotated[SessionId, Path(description="Id of a conversation.")]
OnDisconnect = Annotated[
    Literal["drop", "keep", "finish"] | None,
    Header(description="A turn whose client goes away is dropped, kept as far as it came, or finished."),
]


def check_model(service: Service, name: str) -> None:
    """Raises ApiError (404) unless this is the model that is served."""
    if name not in (service.name, ALIAS):
        raise ApiError(
            404,
            f"model {name[:80]!r} is not here: ask for {service.name!r} or {ALIAS!r}",
            "model",
            "model_not_found",
        )
