"""What hybrids have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Method
from ..compressed import Compressed


@dataclass(frozen=True, kw_only=True)
class Hybrid(Compressed):
    """Learned slots with something beside them: a method with a name of its own, and the adapter is an option."""

    @property
    def title(self) -> str:
        return self.name

    @property
    def text(self) -> str:
        return str(Method.text.__get__(self))
