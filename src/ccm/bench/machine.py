"""What a device can do at most: bytes and operations per second, and the most memory that was held."""

from __future__ import annotations

import mmap
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

_REPEATS = 5


CPU = torch.device("cpu")


def clock_of(threads: int, device: torch.device = CPU) -> Callable[[], float]:
    """What times are taken with.

    One thread's work on a CPU is its own processor time, whatever else runs beside it. An accelerator is waited for.
    """
    if device.type == "cpu":
        return time.process_time if threads == 1 else time.perf_counter

    def waited() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return waited


def bandwidth(threads: int, device: torch.device = CPU, large: bool = True) -> float:
    """Bytes per second that are read from memory: the sum of 256 MB of floats, on an accelerator of 4 GB.

    Args:
        threads, device: that read.
        large: from pages of 2 MB, where Linux has them. Those of 4 KB, where most tensors lie, may be half as quick.
    """
    if device.type != "cpu":
        numbers = torch.ones(1 << 30, device=device)
    elif large and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, 1 << 28)
        pages.madvise(mmap.MADV_HUGEPAGE)
        numbers = torch.frombuffer(pages, dtype=torch.float32).fill_(1)
    else:
        numbers = torch.ones(1 << 26)
    return numbers.nbytes / _seconds(lambda: numbers.sum(), threads, device)


def operations(threads: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations per second of a product of matrices: on a CPU in float32, else in this type."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, dtype)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, threads, device)


def peak_bytes(device: torch.device = CPU) -> int:
    """Most memory that this process has had; on an accelerator that counts it, of tensors there."""
    counted = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if counted is not None:
        return int(counted(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _seconds(call: Callable[[], object], threads: int, device: torch.device) -> float:
    clock, times = clock_of(threads, device), []
    for _ in range(1 + _REPEATS):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times[1:])
