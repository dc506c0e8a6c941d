"""A service from settings that are plain values, so that they can travel to where it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement import AUTO, Loading

if TYPE_CHECKING:
    from ..methods import Method
    from .engine import Engine
    from .metrics import Metrics
    from .service import Service

DAY = 86400
#: Seconds after which a memory that a killed server left for vLLM is forgotten.
TURN = 3600
#: The environment variable that holds the key of vLLM, if it asks for one.
VLLM_KEY = "VLLM_API_KEY"


@dataclass(frozen=True)
class Options:
    """What ``ccm serve`` takes beside its address and who may come in.

    Attributes:
        store: URL.
        model, device, dtype, load_in, device_map: as in :class:`ccm.placement.Loading`.
        adapter: shipped name, folder or hub id.
        threads: of the CPU; None is torch's choice.
        slots, sink, window: the budget of a conversation; None is the adapter's own.
        resend: what to do with a history that differs from the known one: match, refuse, or rebuild.
        texts: keep what was said.
        precision: of stored memories.
        ttl: days after which a conversation is forgotten.
        keep: newest versions of each; nearly as many older ones stay, ever further apart.
        sessions: conversations per tenant.
        quota: megabytes stored per tenant.
        input_tokens: that one request may bring.
        disconnect: what becomes of a turn whose client goes away: drop, keep or finish.
        batch: turns that run at once.
        queue: turns that may wait.
        vllm: URL of a vLLM that writes the answers; None: the model here does.
        vllm_store: URL of the store that its connector reads; None: the same one.
    """

    store: str
    model: str | None = None
    device: str = AUTO
    dtype: str = AUTO
    load_in: str | None = None
    device_map: str | None = None
    adapter: str = "ccm-chat"
    threads: int | None = None
    slots: int | None = None
    sink: int | None = 4
    window: int | None = 64
    resend: str = "match"
    texts: bool = True
    precision: str = "float32"
    ttl: float | None = None
    keep: int = 4
    sessions: int | None = None
    quota: float | None = None
    input_tokens: int = 1 << 16
    disconnect: str = "drop"
    batch: int = 16
    queue: int = 64
    vllm: str | None = None
    vllm_store: str | None = None

    @property
    def loading(self) -> Loading:
        """The model and where it goes."""
        return Loading(self.model, self.device, self.dtype, self.load_in, self.device_map)


def build_service(options: Options) -> Service:
    """Open the store, load model and adapter, and start the engine.

    Raises:
        CCMError: one of them is not usable as given.
    """
    import torch

    from ..compressor import Compressor
    from ..methods import as_method
    from .metrics import Metrics
    from .service import Service
    from .settings import Settings
    from .store import Limits, open_store

    options.loading.check()
    limits = Limits(
        keep=options.keep,
        marks=options.keep - 1,
        ttl=None if options.ttl is None else options.ttl * DAY,
        sessions=options.sessions,
        nbytes=None if options.quota is None else int(options.quota * 1e6),
    )
    store = open_store(options.store, limits)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = options.loading.load()
    compressor = Compressor.from_pretrained(model, options.adapter)
    sizes = {name: getattr(options, name) for name in ("slots", "sink", "window")}
    method = as_method(compressor, tokenizer, **{k: v for k, v in sizes.items() if v is not None})
    settings = Settings(
        Path(options.adapter).name,
        texts=options.texts,
        resend=options.resend,
        precision=options.precision,
        input_tokens=options.input_tokens,
        disconnect=options.disconnect,
    )
    metrics = Metrics()
    # The engine's thread alone gets helpers: with more of them than cores, OpenMP lets all sleep between operations
    torch.set_num_threads(threads)
    engine = _engine(options, method, tokenizer, metrics)
    torch.set_num_threads(1)
    return Service(method, tokenizer, store, settings, engine, metrics)


def _engine(options: Options, method: Method, tokenizer: Any, metrics: Metrics) -> Engine:
    sizes = {"rows": options.batch, "waiting": options.queue}
    if options.vllm is None:
        from .engine import PaddedEngine

        return PaddedEngine(method, tokenizer, metrics=metrics, **sizes)
    from .store import Limits, open_store
    from .vllm.client import VllmServer
    from .vllm.engine import VllmEngine

    server = VllmServer(options.vllm, key=os.environ.get(VLLM_KEY))
    shared = open_store(options.vllm_store or options.store, Limits(ttl=TURN))
    return VllmEngine(method, tokenizer, server, shared, metrics=metrics, **sizes)
