"""Runs in vLLM's environment: what the connector says to settings that it cannot work with, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.config import KVTransferConfig

from ccm.errors import CCMError
from ccm.serving.vllm.connector import KVConnectorRole, MemoryConnector


def start(**changes: Any) -> None:
    settings = {"kv_connector": "MemoryConnector", "kv_role": "kv_consumer", **changes}
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**settings), cache_config=SimpleNamespace(block_size=32)
    )
    MemoryConnector(config, KVConnectorRole.SCHEDULER, None)


def other_version() -> None:
    known, vllm.__version__ = vllm.__version__, "0.33.0"
    try:
        start(kv_connector_extra_config={"store": "sqlite:x"})
    finally:
        vllm.__version__ = known


def sliding_window(context: int) -> None:
    name = "model.layers.0.self_attn.attn"
    connector = object.__new__(MemoryConnector)
    connector._vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context),
        compilation_config=SimpleNamespace(static_forward_context={name: SimpleNamespace(sliding_window=16)}),
    )
    connector.register_kv_caches({name: None})


CASES: dict[str, Callable[[], None]] = {
    "good": lambda: start(kv_connector_extra_config={"store": "sqlite:x"}),
    "policy": lambda: start(
        kv_load_failure_policy="recompute", kv_connector_extra_config={"store": "sqlite:x"}
    ),
    "no store": start,
    "version": other_version,
    "short window": lambda: sliding_window(256),
    "long window": lambda: sliding_window(16),
}


def said(case: Callable[[], None]) -> str:
    try:
        case()
    except CCMError as error:
        return f"{type(error).__name__}: {error}"
    return ""


print(json.dumps({name: said(case) for name, case in CASES.items()}))
