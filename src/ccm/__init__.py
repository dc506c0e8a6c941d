"""Compressed Context Memory: a language model's endless context in a memory that stays small."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Compressor": "core.compressor",
    "CompressorConfig": "core.config",
    "shipped_adapters": "files.adapter_folder",
    "Reader": "core.reader",
    "Memory": "core.memory",
    "Message": "chat.messages",
    "ToolCall": "chat.messages",
    "Session": "session",
    "CCMError": "errors",
    "load_default_model": "models.load",
    "load_model": "models.load",
    "list_methods": "methods",
    "get_method": "methods",
    "open_method": "methods",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ccm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
