"""StreamingLLM (Xiao et al., ICLR 2024): a few first tokens as attention sink, and the newest ones.

Keys and values stay as they were computed; keys are placed by their rank in the cache, not in the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...core.memory import Memory
from ...core.reader import Ids
from ..base import register
from ..references import NoContext


@register("streaming-llm", "window")
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(NoContext):
    """Sink and recent tokens (Xiao et al., ICLR 2024, arXiv 2309.17453).

    Attributes:
        sink: first tokens that stay.
        window: newest tokens that stay.
    """

    sink: int = 4
    window: int = 252
    read_sink: int | None = field(default=None, init=False)  # of the sink, what is read

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        if self.read_sink is None:
            return memory
        rows = [replace(row, sink=row.sink.slice(0, row.pinned + self.read_sink)) for row in memory.rows]
        return replace(memory, rows=tuple(rows))

    def sized(self, entries: int) -> dict[str, int]:
        sink = min(self.sink, entries)
        return {"sink": sink, "window": entries - sink}

    def of_entries(self, entries: int) -> StreamingLLM:
        """The same method with at most so many tokens, sink included; with fewer than 8 it reads one sink token.

        The sink stays whole, so that it grows again with the budget.
        """
        sink = min(entries, self.sink if entries >= 8 else 1)
        method = self.resized(window=entries - sink)
        object.__setattr__(method, "read_sink", sink)
        return method
