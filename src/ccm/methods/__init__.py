"""Context memories behind one protocol; every file of this folder registers its own (see ``base``)."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Method, Run, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)

# every file of the folder is imported by now
from .compressed import as_method  # noqa: E402
from .default import open_method  # noqa: E402
from .spec import get_method, list_methods  # noqa: E402

__all__ = ["Method", "Run", "as_method", "get_method", "list_methods", "open_method", "register"]
