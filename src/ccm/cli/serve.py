"""``ccm serve`` and ``ccm key``. Heavy imports wait until they run, so that help is quick."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, MissingPackageError, StorageError
from ..models.placement import AUTO
from ..serving.options import Options, takes_options

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..serving.service import Service

EPILOG = "Example: ccm serve --port 8000 --api-keys keys.txt --store postgresql://localhost/ccm"
KEY_EPILOG = "Example: ccm key alice --api-keys keys.txt"

#: Seconds in which clients are told that their turns were cut, before uvicorn closes their connections.
_GRACE = 5


@takes_options
def serve(
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback needs --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Who may come in (ccm key); without it this machine alone."),
    ] = None,
    options: Options,
    drain: Annotated[int, typer.Option(min=0, metavar="SECONDS", help="For running turns at the end.")] = 30,
    ray: Annotated[
        bool, typer.Option("--ray", help="Replicas on Ray Serve, here or where RAY_ADDRESS says.")
    ] = False,
    replicas: Annotated[
        str, typer.Option(metavar="N or MIN-MAX", help="With --ray: so many, or as many as the load needs.")
    ] = "1",
) -> None:
    """Serve OpenAI's clients: one persistent compressed memory for every conversation, and a web page."""
    from ..serving.keys import KeyFile, Keys, is_loopback

    # a replica's device may be on another machine
    (replace(options, device=AUTO) if ray and options.device == "cuda" else options).check()
    if api_keys is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} is open to other machines: give --api-keys FILE (make one with: ccm key NAME "
            "--api-keys FILE), or listen on 127.0.0.1"
        )
    if not ray and replicas != "1":
        raise ConfigError("--replicas: only Ray Serve has several; give --ray")
    keys = None if api_keys is None else KeyFile(api_keys)
    listener = _listen(host, port)
    options, store = replace(options, store=options.store or default_store()), None
    if not ray:
        from ..serving.logs import to_stderr
        from ..serving.store import open_store

        to_stderr(options.log_format)  # what the store has to say is among it
        store = open_store(options.store, options.limits)
    try:
        from ..serving.api import create_app
    except ImportError as error:
        raise MissingPackageError(
            "the server needs more packages: pip install 'compressed-context-memory[serve]'"
        ) from error
    if ray:
        from ..serving.ray import run

        address = listener.getsockname()[:2]
        listener.close()  # it was free a moment ago
        # replicas may be on machines that do not have the file
        run.run(options, None if api_keys is None else Keys.read(api_keys), address, replicas, drain)
        return
    from rich.console import Console

    from ..serving.build import build_service

    with Console(stderr=True).status("Loading the model"):
        service = build_service(options, store)
    _run(create_app(service, keys=keys), service, listener, drain)


def key(
    tenant: Annotated[str, typer.Argument(help="Whose key.")],
    api_keys: Annotated[Path, typer.Option(metavar="FILE", help="File of keys; made if it is not there.")],
) -> None:
    """Make an API key for ccm serve. It is shown once; the file holds its digest."""
    from ..serving.keys import Keys

    typer.echo(Keys.add(api_keys, tenant))


def default_store() -> str:
    """A SQLite file in the user's state folder.

    Raises:
        StorageError: there is no such folder, and none can be made.
    """
    from ..serving.store.paths import url_of

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ccm"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(
            f"cannot make {folder}, where conversations are kept ({error.strerror or error}): give --store, or "
            "another folder with XDG_STATE_HOME"
        ) from error
    return url_of("sqlite", folder / "memories.db")


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before anything slow is done."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port"
        ) from error
    return listener


def _run(app: FastAPI, service: Service, listener: socket.socket, drain: int) -> None:
    """Until SIGTERM or Ctrl-C; then running turns end first, or are cut after so many seconds."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            address = listener.getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            typer.echo(f"{service.name} on http://{host}:{address[1]} (the page), /v1 (OpenAI's clients)")

        def handle_exit(self, sig: int, frame: Any) -> None:
            service.running.stop_taking()
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending = asyncio.get_running_loop().call_later(drain, service.running.cut)
            await super().shutdown(sockets=sockets)
            ending.cancel()

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=drain + _GRACE,
        server_header=False,
    )
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(config).run(sockets=[listener])  # raises its signals again at the end, hence ignored
    finally:
        for number, known in before.items():
            signal.signal(number, known)
