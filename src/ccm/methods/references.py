"""The two ends of the yardstick: no context at all, and all of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.memory import KV, Row
from .base import Method, register


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoContext(Method):
    """No memory: recovered share 0. What is answered is read, and nothing stays of what leaves the window."""

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        return row.slots

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots

    @property
    def limit(self) -> int:
        return self.sink + self.window


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullContext(Method):
    """The keys and values of everything said: recovered share 1. One cache that grows with every token."""

    window: int = sys.maxsize

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        return KV.cat((row.slots, leaving.to(torch.float32)))

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return slots + leaving
