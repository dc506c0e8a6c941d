"""Context memories behind one protocol; every file of these folders registers its own (see ``base``)."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Method, Run, register

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

# every file of the folder is imported by now
from .compressed import as_method  # noqa: E402
from .default import open_method  # noqa: E402
from .spec import get_method, list_methods  # noqa: E402

__all__ = ["Method", "Run", "as_method", "get_method", "list_methods", "open_method", "register"]
