"""What a file says it is, by its first bytes alone: torch is not needed for that."""

from __future__ import annotations

import json
from pathlib import Path

#: Most bytes of the JSON that a safetensors file begins with.
LONGEST_HEADER = 1 << 22


def format_of(path: Path) -> str:
    """The format that the header of a safetensors file names, such as "ccm-memory/3"; empty if it names none.

    Raises:
        OSError: it cannot be read.
    """
    return _named(path, "format")


def digest_of(path: Path) -> str:
    """The digest of a memory file, by which two savings differ; empty if no memory file can be read there."""
    try:
        return _named(path, "digest")
    except OSError:
        return ""


def _named(path: Path, name: str) -> str:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head = file.read(size) if size <= LONGEST_HEADER else b""
    try:
        return str(json.loads(head)["__metadata__"][name])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
