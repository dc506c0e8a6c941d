"""What this machine can do at most: bytes and operations per second."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

_REPEATS = 5


def clock_of(threads: int) -> Callable[[], float]:
    """What times are taken with: one thread's work is its own processor time, whatever else runs beside it."""
    return time.process_time if threads == 1 else time.perf_counter


def bandwidth(threads: int) -> float:
    """Bytes per second that are read from memory: the sum of 256 MB of floats."""
    numbers = torch.ones(1 << 26)
    return numbers.nbytes / _seconds(lambda: numbers.sum(), threads)


def operations(threads: int) -> float:
    """Floating point operations per second of a product of matrices in float32."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _seconds(lambda: a @ b, threads)


def peak_bytes() -> int:
    """Most memory that this process has had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _seconds(call: Callable[[], object], threads: int) -> float:
    clock, times = clock_of(threads), []
    for _ in range(1 + _REPEATS):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times[1:])
