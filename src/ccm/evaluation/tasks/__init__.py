"""What is measured: tasks behind one protocol; every file of this folder registers its own (see ``base``)."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ...errors import ConfigError, UnknownNameError
from .base import TASKS, EvalTask, register_task

__all__ = ["EvalTask", "get_task", "list_tasks", "register_task"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)


def list_tasks() -> list[str]:
    """Names that :func:`get_task` knows."""
    return sorted(TASKS)


def get_task(name: str, **options: Any) -> EvalTask:
    """The task registered under ``name``, with options; lists become tuples. Nothing is downloaded.

    Raises:
        UnknownNameError: no such task.
        ConfigError: an option that the task does not have, or a value that it cannot use.
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, list_tasks())
    try:
        return TASKS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    except TypeError as error:
        raise ConfigError(f"task {name}: {error}") from error
