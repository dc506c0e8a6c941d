"""A real server on loopback, with a tiny model, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from tiny import tiny_compressor, tiny_tokenizer

from ccm.methods import as_method
from ccm.serving.api import HttpLimits, create_app
from ccm.serving.engine import PaddedEngine
from ccm.serving.keys import Keys
from ccm.serving.metrics import Metrics
from ccm.serving.service import Service, Settings
from ccm.serving.store import Limits, open_store

SIZES = {"slots": 2, "sink": 2, "window": 16, "segment": 8}
#: Name of the model that is served.
MODEL = "LlamaForCausalLM+tiny"


def tiny_service(
    folder: Path, waiting: int = 64, limits: Limits | None = None, store: str | None = None, **settings: Any
) -> Service:
    tokenizer = tiny_tokenizer()
    compressor = tiny_compressor(model={"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    opened = open_store(store or f"sqlite://{folder}/memories.db", limits)
    metrics = Metrics()
    method = as_method(compressor, tokenizer, **SIZES)
    engine = PaddedEngine(method, tokenizer, rows=4, waiting=waiting, metrics=metrics)
    return Service(method, tokenizer, opened, Settings("tiny", **settings), engine, metrics)


class Running:
    """Attributes: the service behind it, and the address that it is reached at."""

    def __init__(self, service: Service, url: str):
        self.service, self.url = service, url


@contextmanager
def serving(
    service: Service, keys: Keys | None = None, limits: HttpLimits | None = None
) -> Iterator[Running]:
    """Serve on a free port until the end of the block."""
    config = uvicorn.Config(
        create_app(service, keys=keys, limits=limits), host="127.0.0.1", port=0, log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(service, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(30)
