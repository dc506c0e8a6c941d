"""Headers of GGUF files. One with a large vocabulary takes seconds to read, and transformers reads it again and again."""

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


class Header(_READER):  # type: ignore[misc]
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
