"""Context memories behind one protocol; every file of this folder registers its own (see ``base``)."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import ConfigError, UnknownNameError
from .base import METHODS, Method, Run, register

__all__ = ["Method", "Run", "as_method", "get_method", "list_methods", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)

from .compressed import as_method  # noqa: E402  # every file of the folder is imported by now


def list_methods() -> list[str]:
    """Names that :func:`get_method` knows, aliases included."""
    return sorted(METHODS)


def get_method(name: str, **options: Any) -> Method:
    """The method registered under ``name``, with options.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an option that the method does not have, or a value that it cannot use.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, list_methods())
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise ConfigError(f"method {name}: {error}") from error
