"""What was read behind a memory and need not be read again when it becomes part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .memory import KV, Memory


@dataclass(frozen=True)
class Known:
    """Tokens that were read behind the memory of one conversation, and are not part of it.

    Attributes:
        memory: that was read.
        ids: of the tokens.
        kv: (L, H, T, D), position-free.
    """

    memory: Memory
    ids: tuple[int, ...]
    kv: KV

    def shared(self, memory: Memory, ids: Sequence[int]) -> KV | None:
        """Keys and values of the tokens with which other ones begin as well; None behind another memory."""
        same = 0
        while same < min(len(ids), self.kv.length) and ids[same] == self.ids[same]:
            same += 1
        return self.kv.slice(0, same) if same and memory is self.memory else None
