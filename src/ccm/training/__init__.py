"""Training of compressors. Names are imported when they are used, so that ``ccm --help`` is quick."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {"TrainConfig": "config", "Trainer": "trainer", "load_recipe": "recipe"}

__all__ = ["TrainConfig", "Trainer", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ccm.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
