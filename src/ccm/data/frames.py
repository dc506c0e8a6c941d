"""Text columns of pandas data frames that were pickled into a package, read without pandas.

A pickle can run any code when it is loaded. Here only the names that a data frame of numbers and texts consists of
are known, and those of pandas are replaced by an inert record.
"""

from __future__ import annotations

import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError


class _Inert:
    """Stands for a class or function of pandas: keeps its arguments, does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Inert:
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _from_buffer(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _reconstruct(kind: type, shape: tuple[int, ...], code: Any) -> np.ndarray:
    return np.ndarray.__new__(np.ndarray, shape, code)


_KNOWN: dict[str, Callable[..., Any]] = {
    "dtype": np.dtype,
    "ndarray": np.ndarray,
    "slice": slice,
    "_frombuffer": _from_buffer,
    "_reconstruct": _reconstruct,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("numpy", "builtins") and name in _KNOWN:
            return _KNOWN[name]
        if module.startswith("pandas."):
            return _Inert
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a data frame")


def read_frame(path: Path) -> dict[str, list[Any]]:
    """The columns of an xz-compressed, pickled data frame, by name.

    Raises:
        DataError: the file is not a data frame of numbers and texts.
    """
    try:
        with lzma.open(path) as file:
            manager = _Reader(file).load().state["_mgr"]
        blocks, axes = manager.args
        names = axes[0].args[1]["data"]
        columns: dict[str, list[Any]] = {}
        for block in blocks:
            values, where, _ = block.args
            for name, column in zip(names[where], values, strict=True):
                columns[name] = column.tolist()
    except (
        OSError,
        EOFError,
        lzma.LZMAError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:
        raise DataError(
            f"{path} is not the expected data frame ({error!r}): delete it and try again"
        ) from error
    return columns
