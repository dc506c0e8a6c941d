"""The Ray Serve application: every replica hosts the whole server, and all share one store.

    client -> Serve's proxy -> replica of the same X-Session-Id -> store

Where a turn runs does not matter for what it says: a replica loads the conversation's newest version, answers, and
commits behind that version (compare-and-swap). So a replica may die or be added at any time. Affinity is a hint: it
lets a second turn of a running conversation be refused before it is computed, rather than when it is committed.

    serve run ccm.serving.ray.app:build store=postgresql://localhost/ccm api_keys=keys.txt replicas=2-8
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MissingPackageError
from ..build import build_service
from ..engine import EngineError
from ..health import SILENCE
from ..keys import Keys
from ..logs import to_stderr
from ..options import Options

try:
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.schema import LoggingConfig
except ImportError as error:
    raise MissingPackageError(
        "replicas need Ray Serve: pip install 'compressed-context-memory[ray]'"
    ) from error

#: Class in Ray that sends requests with the same X-Session-Id to the same replica while it lives.
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
#: Stores that several machines can reach.
SHARED = ("postgresql", "redis")
_REPLICAS = re.compile(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?")


@dataclass(frozen=True)
class RayOptions(Options):
    """Options of the server, and those of its replicas.

    Attributes:
        replicas: "2", or "2-8" for as many as the load needs.
        api_keys: file of keys, read where the application is built.
        drain: seconds for running turns when a replica goes.
    """

    replicas: str = "1"
    api_keys: str | None = None
    drain: int = 30


class Conversations:
    """One replica: model, engine, and the app of ``ccm serve``."""

    def __init__(self, options: Options, keys: Keys | None):
        to_stderr(options.log_format)
        self.service, self.keys = build_service(options), keys

    def __serve_build_asgi_app__(self) -> Any:
        from ..api import create_app

        app = create_app(self.service, keys=self.keys)
        app.add_middleware(_Named, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Raises EngineError if the model's thread hangs: Ray then starts another replica in this one's place.

        A store that is not reachable is no reason, another replica would not reach it either.
        """
        if (silent := self.service.engine.idle_seconds()) > SILENCE:
            raise EngineError(f"the model's thread has been silent for {silent:.0f} s")


class _Named:
    """Says in the header X-Replica which replica answered."""

    def __init__(self, app: Any, name: str):
        self.app, self.name = app, name.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-replica", self.name)]}
            await send(message)

        await self.app(scope, receive, sending)


def application(options: RayOptions, keys: Keys | None) -> serve.Application:
    """The application for ``serve.run``.

    Raises:
        ConfigError: the store cannot be shared, or the replicas are no number.
    """
    scheme = options.store.partition(":")[0]
    if scheme not in SHARED:
        raise ConfigError(
            f"store {scheme!r}: replicas share their conversations, give --store postgresql://… or redis://…"
        )
    plain = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    settings: dict[str, Any] = {
        "max_ongoing_requests": options.batch + options.queue + 16,  # the service itself refuses before
        "graceful_shutdown_timeout_s": options.drain,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2,
        "max_constructor_retry_count": 3,
        "ray_actor_options": {"num_cpus": options.threads or 1, "num_gpus": _gpus(options)},
        "request_router_config": RequestRouterConfig(request_router_class=ROUTER),
        # paths hold ids of conversations, which are secrets; the app has its own log
        "logging_config": LoggingConfig(enable_access_log=False),
        **_scale(options),
    }
    replica = serve.deployment(serve.ingress()(Conversations))
    return replica.options(**settings).bind(plain, keys)


def _gpus(options: RayOptions) -> int:
    """GPUs of a replica: one if it is asked for, or taken because there is one here."""
    if options.device_map or ":" in options.device:
        raise ConfigError(
            "a replica gets one GPU, whichever Ray gives it: leave the device map and the number of the device out"
        )
    if options.device == "cuda":  # of the replica's machine, which may be another one
        replace(options.loading, device="cpu").check()
        return 1
    return int(options.loading.check().device.type == "cuda")


def _scale(options: RayOptions) -> dict[str, Any]:
    found = _REPLICAS.fullmatch(options.replicas)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < least <= most:
        raise ConfigError(
            f"replicas: got {options.replicas!r}, expected a number such as 2, or a range such as 2-8"
        )
    if least == most:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": options.batch,  # a full batch each
        }
    }


def build(args: dict[str, Any]) -> serve.Application:
    """The application for ``serve run`` and ``serve deploy``, from the ``args`` of a deployment file.

    Args:
        args: as :class:`RayOptions`. ``api_keys`` is needed: which address Serve listens on is not known here.

    Raises:
        ConfigError: an argument that is not there, or not usable.
    """
    from pydantic import TypeAdapter, ValidationError

    unknown = set(args) - {field.name for field in fields(RayOptions)}
    if unknown:
        raise ConfigError(
            f"argument {sorted(unknown)[0]!r}: expected one of {', '.join(asdict(RayOptions()))}"
        )
    try:
        options = TypeAdapter(RayOptions).validate_python(args)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"argument {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not options.store:
        raise ConfigError("argument store: give a store that the replicas share, postgresql://… or redis://…")
    if options.api_keys is None:
        raise ConfigError("argument api_keys: give a file of keys (ccm key NAME --api-keys FILE)")
    return application(options, Keys.read(Path(options.api_keys)))
