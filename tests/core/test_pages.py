"""Large pages for what malloc hands out."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from ccm.core.pages import ask_for_large, give_back

LINUX = platform.libc_ver()[0] == "glibc" and Path("/sys/kernel/mm/transparent_hugepage").exists()


def asked_for() -> int:
    """Bytes of malloc's heap for which large pages are asked."""
    total = size = 0
    heap = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            heap = values[-1] == "[heap]"
        elif name == "Size:":
            size = int(values[0]) * 1024
        elif name == "VmFlags:" and heap and "hg" in values:
            total += size
    return total


@pytest.mark.skipif(not LINUX, reason="malloc and large pages are those of glibc and Linux")
def test_what_the_heap_grows_by_is_asked_for_in_large_pages():
    give_back()
    ask_for_large()  # the first piece may get a mapping of its own, and moves the size from which one does
    ask_for_large()
    assert asked_for() >= 30 << 20
    kept = torch.ones(5 << 20)  # 20 MB
    give_back()
    assert asked_for() >= kept.nbytes and bool((kept == 1).all())


def test_elsewhere_nothing_is_asked_for(monkeypatch):
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr("ctypes.CDLL", None)
    give_back()
    ask_for_large()
