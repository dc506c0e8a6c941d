"""Large tensors in pages of their own, which the system has back as soon as they go."""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from torch import Tensor

#: Pages for this process alone; where this is not said they are so anyway.
_PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def blank(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a tensor's type, where it is.

    On a CPU they are pages that take no memory before something is written there, and that the system has back as
    soon as the tensor goes. What an allocator keeps for later would be as large as the caches of many conversations.
    """
    if like.device.type != "cpu" or not math.prod(shape):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, math.prod(shape) * like.itemsize, **_PRIVATE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
