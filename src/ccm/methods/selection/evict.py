"""Eviction: of the entries beside sink and window the best scored ones stay, and the others are let go.

What differs from method to method is the score. It is made anew whenever text leaves the window, for the entries kept
so far and the leaving ones, and every layer and key head keeps entries of its own. Entries stay as they were computed
and stand in the order of the text. Attention is that of the pass that read the newest text (``ccm.methods.scores``),
which methods of one long prompt took from their prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ..base import Method
from ..scores import weights


@dataclass(frozen=True, kw_only=True)
class Evict(Method):
    """A fixed number of entries between sink and window.

    Attributes:
        tokens: entries that stay beside them.
    """

    made: ClassVar[str] = "chosen"
    most: ClassVar[str] = "tokens"
    sink: int = 4
    window: int = 64
    tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(tokens=0)

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        held = KV.cat((row.slots, leaving.to(torch.float32)))
        return held if held.length <= self.tokens else self.shortened(row, held, queries)

    def shortened(self, row: Row, held: KV, queries: Tensor | None) -> KV:
        """``tokens`` entries in place of more: the best ones."""
        return held.take(self.best(self.score(row, held, queries)))

    def best(self, score: Tensor) -> Tensor:
        """(L, H, N) -> (L, H, tokens): the best, in the order of the text."""
        worst_first = coarse(score).argsort(dim=2, stable=True)  # of equal ones the newest is the best
        return worst_first[:, :, score.shape[2] - self.tokens :].sort(dim=2).values

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        """(L, H, N) of N entries between the row's sink and its window: the larger, the better."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Attended(Evict):
    """What attention says."""

    def seen(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        """Attention weights (L, H, G, w, N) that the newest queries give to the entries."""
        assert queries is not None  # the method asks for them
        keys = torch.cat([row.sink.keys.float(), held.keys, row.window.keys.float()], dim=2)
        before = row.sink.length
        found = weights(self.reader, queries, keys, memory=before + row.slots.length)
        return found[..., before : before + held.length]


def coarse(numbers: Tensor) -> Tensor:
    """Numbers of 12 bits: a token that comes twice differs by rounding, and must not be told apart by that."""
    mantissa, exponent = numbers.frexp()
    return (mantissa * 2**12).round().ldexp(exponent)
