"""Pages of the system: small ones that it has back as soon as a tensor goes, large ones for what stays."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import torch
from torch import Tensor

#: Pages for this process alone; where this is not said they are so anyway.
_PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)

#: Of what malloc takes from its heap in one piece nearly the most: 32 MB and more get a mapping of their own.
_PIECE = 31 << 20


def blank(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a tensor's type, where it is.

    On a CPU they are pages that take no memory before something is written there, and that the system has back as
    soon as the tensor goes. What an allocator keeps for later would be as large as the caches of many conversations.
    """
    if like.device.type != "cpu" or not math.prod(shape):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, math.prod(shape) * like.itemsize, **_PRIVATE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def ask_for_large() -> None:
    """Have the next 31 MB that malloc's heap grows by in pages of 2 MB, where Linux and glibc do that.

    The kernel is told of them while they are untouched: what has been written to stays in its small pages.
    """
    if (libc := _glibc()) and (start := libc.malloc(ctypes.c_size_t(_PIECE))):
        inner = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (start + _PIECE - inner) // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(ctypes.c_void_p(inner), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(start))


def give_back() -> None:
    """Give the system what malloc keeps of freed memory, which lies in small pages."""
    if libc := _glibc():
        libc.malloc_trim(ctypes.c_size_t(0))


def _glibc() -> Any:
    """None where there is another, or none of Linux's large pages."""
    libc: Any = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None
    if not hasattr(libc, "malloc_trim"):
        return None
    libc.malloc.restype = ctypes.c_void_p
    return libc
