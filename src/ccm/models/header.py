"""Headers of GGUF files. That of a large vocabulary takes seconds to read, and transformers reads it three times."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np

_READER = gguf.GGUFReader
_ALONE = threading.RLock()


class Header(gguf.GGUFReader):  # type: ignore[misc]
    """The reader of gguf on a plain array: its small slices of a memory map take four times as long."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, every GGUF file is read once, whoever asks gguf for it. Other threads that come here wait."""
    known: dict[tuple[str, str], Header] = {}

    def reader(path: str | os.PathLike[str], mode: str = "r") -> Header:
        key = os.path.realpath(path), mode
        if key not in known:
            known[key] = Header(path, mode)
        return known[key]

    with _ALONE:
        if gguf.GGUFReader is not _READER:  # one around this one
            yield
            return
        gguf.GGUFReader = reader
        try:
            yield
        finally:
            gguf.GGUFReader = _READER


def head_width(path: str | os.PathLike[str]) -> int | None:
    """Channels of a head's keys, as the file says; None if it does not, or if they differ between layers."""
    fields = gguf.GGUFReader(path).fields
    attention = f"{fields['general.architecture'].contents()}.attention"
    width = fields.get(f"{attention}.key_length")
    return None if width is None or f"{attention}.key_length_swa" in fields else int(width.contents())
