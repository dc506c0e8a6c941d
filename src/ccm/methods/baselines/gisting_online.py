"""Gisting, online (Mu et al., NeurIPS 2023; the baseline of CCM's authors): every segment becomes slots by itself.

The same COMP tokens and conditional LoRA as CCM-concat, but c(t) is compressed without sight of Mem(t-1), and the
blocks are put side by side. Simplified: the original tunes all weights; here a LoRA is trained, with the data,
objective and steps of CCM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...core.memory import KV, Memory
from ..base import register
from ..compressed import Trained
from .recurrent import Baseline


class Alone(Baseline):
    """h(t) from c(t) alone."""

    kind = "gisting-online"

    def blocks(
        self, memory: Memory, ids: Tensor, mask: Tensor, n: int, keep: int | None = None
    ) -> list[tuple[KV, KV]]:
        return super().blocks(self.empty(len(memory)), ids, mask, n, keep)


@register("gisting-online")
@dataclass(frozen=True, kw_only=True)
class GistingOnline(Trained):
    """n slots a segment, each made alone.

    Gisting, Mu et al., NeurIPS 2023, arXiv 2304.08467, as CCM's authors compare with it.
    """

    made_by: ClassVar[type[Baseline]] = Alone
