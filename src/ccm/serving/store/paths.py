"""The path in a URL of a store that is a file or a folder."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from ...errors import ConfigError


def path_of(url: str) -> Path:
    """``scheme:///a/b`` (or with one slash more) is ``/a/b``, ``scheme:a/b`` is relative; percent signs are decoded.

    Raises:
        ConfigError: no path, or a host before it.
    """
    scheme, _, rest = url.partition(":")
    path = unquote("/" + rest.lstrip("/") if rest.startswith("///") else rest)
    if path in ("", "/") or path.startswith("//") or "\0" in path:
        raise ConfigError(f"store {url!r}: expected {scheme}:///absolute/path or {scheme}:relative/path")
    return Path(path)


def url_of(scheme: str, path: Path) -> str:
    """The URL that :func:`path_of` reads as ``path``, which is absolute."""
    return f"{scheme}://{quote(str(path))}"
