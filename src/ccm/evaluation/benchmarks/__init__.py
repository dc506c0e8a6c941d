"""Benchmarks that people cite, read from their official files; every file of this folder registers its own.

Each is scored as its paper does (``scored`` says how), and its data stay where they are: nothing is copied.
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import BENCHMARKS, Benchmark, register_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "register_benchmark"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)
