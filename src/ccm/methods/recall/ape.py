"""Segments read apart from each other, put together (APE, Yang et al., ICLR 2025, arXiv 2502.05431).

Every segment is read behind the sink alone, so its entries are good in any company and can be made ahead of time, on
any machine. A prompt reads all of them, placed one behind the other. Simplified: no temperature and no factor for the
scores, which an engine would have to know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.memory import Memory
from ...core.window import joined
from ..base import Segment, register
from ..references import FullContext


@register("ape")
@dataclass(frozen=True, kw_only=True)
class APE(FullContext):
    """Everything raw, each segment read alone.

    APE, Yang et al., ICLR 2025, arXiv 2502.05431.

    Attributes:
        sink: first tokens of the text that every segment is read behind.
    """

    sink: int = 4

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        first = [row.window.slice(0, self.sink) for row in memory.rows]
        alone = (replace(row, window=kv) for row, kv in zip(memory.rows, first, strict=True))
        texts = self.reader.read(segment.ids, replace(memory, rows=tuple(alone)), segment.mask)
        rows = (joined(row, text, text.length) for row, text in zip(memory.rows, texts, strict=True))
        return replace(memory, rows=tuple(rows))
