"""Learned slots whose values are solved for: those of CCM, polished by least squares.

An adapter writes the slots of a segment. Their keys stay. Their values are corrected as Attention Matching fits its
own: attention is to give what it gave while the segment was raw. For a reference query q let b(q) (n) be the weights
of the new slots, r(q) what attention gives beside them, and o(q) what it gave before the fold. From the learned
values V come

    V' = argmin  sum_q |o(q) - r(q) - b(q) V'|^2  +  lift max_j (b^T b)_jj |V' - V|^2

which never miss more than V. The reference queries are those of the newest text, placed behind the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.memory import KV, Memory, Row
from ...core.reader import Ids, Reader
from ...errors import ConfigError, UnsupportedModelError
from ..base import Method, register
from ..compressed import Compressed
from ..synthesis.matching import seen_by


@register("polished")
@dataclass(frozen=True, kw_only=True)
class Polished(Compressed):
    """Learned slots, their values corrected.

    The slots and bytes are those of CCM-concat (Kim et al., ICLR 2024, arXiv 2312.03414), the correction is that of
    Attention Matching (arXiv 2602.16284). A fold reads its text twice. Stories gain, and told facts lose where the
    lift is small (docs/decisions.md).

    Attributes:
        lift: how strongly the learned values hold, more than 0. Below 1 attention is all that counts.
    """

    made: ClassVar[str] = "polished"
    adapter: str = "ccm-chat"
    lift: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lift < float("inf"):
            raise ConfigError(f"method {self.name}: lift is {self.lift}, expected a number above 0")

    def bind(self, model: PreTrainedModel | Reader, tokenizer: Any = None) -> Polished:
        bound = super().bind(model, tokenizer)
        if bound.reader.two_sided:
            raise UnsupportedModelError(
                f"method {self.name} goes by what tokens ask of what was read, and the decoder of an encoder-decoder "
                "has asked nothing yet: expected one that does not, such as ccm-concat"
            )
        if (rule := bound.reader.rule.name) not in ("concat", "bounded"):
            raise ConfigError(
                f"method {self.name}: got rule {rule!r}, expected 'concat' or 'bounded': a new segment must have "
                "slots of its own"
            )
        return bound

    def fold(
        self,
        memory: Memory,
        ids: Ids,
        mask: Tensor | None = None,
        *,
        answered: bool = False,
        read: Sequence[KV | None] = (),
    ) -> Memory:
        after = super().fold(memory, ids, mask, answered=answered, read=read)
        if all(new.steps == row.steps for row, new in zip(memory.rows, after.rows, strict=True)):
            return after
        found = self.reader.watch(ids, memory, mask)
        rows = zip(memory.rows, found, after.rows, strict=True)
        return replace(
            after, rows=tuple(self.polish(row, text, asked, new) for row, (text, asked), new in rows)
        )

    @property
    def _together(self) -> bool:
        return False  # a correction is read by the next segment

    def polish(self, before: Row, text: KV, queries: Tensor, after: Row) -> Row:
        """The row after a fold, the values of its new slots corrected.

        Args:
            before: the row before the fold.
            text: (L, H, T, D), position-free, that was folded or joined the window.
            queries: (L, Hq, w, D), position-free, of that text.
            after: as the adapter made it.
        """
        n = min((after.steps - before.steps) * (self.slots or 0), after.slots.length)
        if not n:
            return after
        old, slots = (
            after.slots.slice(0, -n),
            after.slots.slice(-n),
        )  # a full memory has merged some of the old ones
        sink, window = (kv.to(torch.float32) for kv in (after.sink, after.window))
        raw = KV.cat((before.window, text)).to(torch.float32)
        leaving = raw.slice(sink.length - before.sink.length, raw.length - window.length)
        start, asked = sink.length + old.length, [(queries, 1.0)]
        beside = torch.cat([sink.values, old.values, window.values], dim=2)

        rest, a = seen_by(
            self.reader, KV.cat((sink, old, leaving, window)), start, leaving.length, start, asked
        )
        out = rest @ beside + a @ leaving.values
        rest, b = seen_by(self.reader, KV.cat((sink, old, slots, window)), start, n, start + n, asked)
        missing = b.mT @ (out - rest @ beside - b @ slots.values)
        gram = b.mT @ b
        most = gram.diagonal(dim1=2, dim2=3).amax(-1, keepdim=True).clamp_min(1e-12)
        lifted = gram + self.lift * torch.diag_embed(most.expand(gram.shape[:3]))
        values = slots.values + torch.linalg.solve(lifted, missing)
        return replace(after, slots=KV.cat((old, KV(slots.keys, values))))

    @property
    def title(self) -> str:
        return self.name

    @property
    def text(self) -> str:
        return str(Method.text.__get__(self))
