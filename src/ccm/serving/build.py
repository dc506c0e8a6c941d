"""A service from its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .options import Options

if TYPE_CHECKING:
    from ..methods import Method
    from .engine import Engine
    from .metrics import Metrics
    from .service import Service
    from .store import Store
    from .vllm.client import VllmServer

#: Seconds after which a memory that a killed server left for vLLM is forgotten.
TURN = 3600
#: The environment variable that holds the key of vLLM, if it asks for one.
VLLM_KEY = "VLLM_API_KEY"


def build_service(options: Options, store: Store | None = None) -> Service:
    """Open the store, load model and memory, and start the engine.

    Args:
        options: of the service.
        store: that is open already.

    Raises:
        CCMError: one of them is not usable as given.
    """
    options.check()
    import torch

    from ..methods.default import checked, open_method
    from .metrics import Metrics
    from .service import Service
    from .store import open_store

    options.loading.check()
    spec = checked(options.memory_name)
    store = store or open_store(options.store, options.limits)
    server = None
    if options.vllm is not None:  # one that is not there is told before a model is loaded
        from .vllm.client import VllmServer

        server = VllmServer(options.vllm, key=os.environ.get(VLLM_KEY))
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    if options.llama is None:
        model, tokenizer = options.loading.load()
    else:
        from .llama import hollow

        model, tokenizer = hollow.load(options.loading)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"no engine of the server writes with an encoder-decoder ({model.config.model_type}): take ccm chat, "
            "or serve a decoder"
        )
    method = open_method(spec, model, tokenizer)
    if options.llama is not None:
        from .llama.reader import in_llama

        method = in_llama(
            method,
            options.llama,
            sequences=options.batch,
            positions=options.llama_context,
            kind=options.llama_type,
            threads=threads,
        )
    metrics = Metrics()
    # The engine's thread alone gets helpers: with more of them than cores, OpenMP lets all sleep between operations
    torch.set_num_threads(threads)
    engine = _engine(options, method, tokenizer, metrics, server)
    torch.set_num_threads(1)
    return Service(method, tokenizer, store, options.settings(method.title), engine, metrics)


def _engine(
    options: Options, method: Method, tokenizer: Any, metrics: Metrics, server: VllmServer | None
) -> Engine:
    sizes = {"rows": options.batch, "waiting": options.queue}
    if options.llama is not None:
        from .llama.engine import LlamaEngine

        return LlamaEngine(method, tokenizer, waiting=options.queue, metrics=metrics)
    if server is None:
        from .engine import PaddedEngine

        return PaddedEngine(method, tokenizer, metrics=metrics, **sizes)
    from .store import Limits, open_store
    from .vllm.engine import VllmEngine

    method.check_plain("vLLM")
    shared = open_store(options.vllm_store or options.store, Limits(ttl=TURN))
    return VllmEngine(method, tokenizer, server, shared, metrics=metrics, **sizes)
