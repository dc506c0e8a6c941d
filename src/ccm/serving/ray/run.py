"""``ccm serve --ray``: start the application, on this machine or in a cluster, and end it gracefully."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from dataclasses import asdict
from typing import Any

import typer

from ...errors import ConfigError
from ...methods.default import checked
from ...models.load import load_config
from ..keys import Keys
from ..options import Options
from ..store import open_store
from . import app

_NAME = "ccm"


def run(options: Options, keys: Keys | None, address: tuple[str, int], replicas: str, drain: int) -> None:
    """Serve until SIGTERM or Ctrl-C; then running turns end first.

    Args:
        options: of the service in every replica.
        keys: who may come in.
        address: host and port of the proxies, one on every machine that has a replica.
        replicas: "2" or "2-8".
        drain: seconds for running turns at the end.

    Raises:
        ConfigError: options that cannot work, or replicas that do not start.
    """
    built = app.application(app.RayOptions(**asdict(options), replicas=replicas, drain=drain), keys)
    # what can be known before Ray starts is said before
    open_store(options.store).close()
    load_config(options.model)
    checked(options.memory_name)

    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = os.environ.get("RAY_ADDRESS")
    here: dict[str, Any] = {} if cluster else {"include_dashboard": False}
    if cluster:
        _reach(cluster)
    try:
        ray.init(address=cluster or "local", logging_level=logging.WARNING, **here)
    except Exception as error:  # of many kinds, Exception itself among them
        where = f"no cluster at RAY_ADDRESS {cluster}" if cluster else "Ray does not start here"
        raise ConfigError(f"{where}: {str(error).strip().partition(chr(10))[0]}") from error
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        host, port = address
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        try:
            serve.run(built, name=_NAME, route_prefix="/")
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"the replicas did not start: {reason}") from error
        typer.echo(
            f"http://{host}:{port} (the page), /v1 (OpenAI's clients), {replicas} replicas on Ray Serve"
        )
        ended.wait()
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        serve.delete(_NAME)
        if not cluster:
            serve.shutdown()
        ray.shutdown()
        for number, known in before.items():
            signal.signal(number, known)


def _reach(cluster: str) -> None:
    """Raises ConfigError if nobody listens at ``host:port``: Ray itself would try for minutes."""
    host, _, port = cluster.rpartition(":")
    if not host or not port.isdigit():  # auto and the like
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no cluster at RAY_ADDRESS {cluster}: {error}") from error
