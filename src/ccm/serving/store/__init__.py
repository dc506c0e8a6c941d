"""Where a server keeps one compressed memory per conversation; every file here registers its kind (see ``base``)."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable

from ...errors import ConfigError, UnknownNameError
from .base import STORES, Info, Limits, Snapshot, Store, Usage, register
from .errors import ConflictError, NotFoundError, QuotaError

__all__ = [
    "ConflictError",
    "Info",
    "Limits",
    "NotFoundError",
    "QuotaError",
    "Snapshot",
    "Store",
    "Usage",
    "list_stores",
    "open_store",
    "register",
]

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "codec":  # no store, and it needs torch, which a store does not
        importlib.import_module(f".{_module.name}", __name__)


def list_stores() -> list[str]:
    """Schemes of the URLs that :func:`open_store` knows."""
    return sorted(STORES)


def check_url(url: str) -> str:
    """The scheme of a URL. Raises UnknownNameError if no store has it, ConfigError if it is no URL."""
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise ConfigError(f"store {url!r}: expected a URL, such as sqlite:///path/of/file")
    if scheme not in STORES:
        raise UnknownNameError("store", scheme, list_stores())
    return scheme


def open_store(url: str, limits: Limits | None = None, clock: Callable[[], float] = time.time) -> Store:
    """Open a store, and create or migrate it if needed.

    Args:
        url: ``sqlite:///path/of/file`` (embedded, the default of a server), ``dir:///path/of/folder``,
            ``redis://host:port/number`` or ``postgresql://user:password@host:port/database``. Paths behind three
            slashes are absolute, ``sqlite:file`` and ``dir:folder`` are relative.
        limits: what is kept, and what a tenant may hold.
        clock: seconds since the epoch.

    Raises:
        UnknownNameError: no store of this scheme.
        ConfigError: a URL that the store cannot use, or one that a newer release has written.
        MissingPackageError: a client package is not installed.
        StorageError: not reachable, or not writable.
    """
    return STORES[check_url(url)].open(url, limits, clock)
