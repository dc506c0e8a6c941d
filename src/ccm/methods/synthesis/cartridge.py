"""A memory trained for one text (Cartridges, Eyuboglu et al., 2025, arXiv 2506.06266).

Slots begin as those of Attention Matching. A few steps of gradient descent then move their keys and values, so that
the model foresees behind them what it foresees behind the text itself:

    min over slots  mean_t KL( p(. | sink, old slots, text, window, x[:t])  ||  p(. | sink, slots, window, x[:t]) )

The self-study x is the text that leaves the window, recited behind a request to repeat it, and a stretch of what left
before, so that it stays as well. Of all steps the slots with the smallest loss stay. The model itself is not changed.

Simplified: the paper's model writes conversations about the text, for minutes on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ...core.memory import KV, Memory, Row
from ...core.segments import left_padded
from ...errors import ConfigError
from ..base import register
from ..selection.kvzip import KVzip
from .attention_matching import AttentionMatching

#: How much of its direction a step hands on to the next one.
MOMENTUM = 0.8

#: Token ids that the model reads, and how many of the last are foreseen.
Passage = tuple[Sequence[int], int]


@register("cartridge")
@dataclass(frozen=True, kw_only=True)
class Cartridge(AttentionMatching):
    """Slots trained for their text.

    Cartridges, Eyuboglu et al., 2025, arXiv 2506.06266. A step costs about three readings of what is recited, so a
    fold takes seconds to minutes on a processor (docs/decisions.md).

    Attributes:
        slots: entries between sink and window, from the first text that is longer.
        steps: of gradient descent in every fold; at 0 it is Attention Matching.
        rate: length of the first step, as a share of the mean size of an entry; the others are shorter and shorter.
        study: tokens of what left earlier that are recited too.
    """

    asks: ClassVar[tuple[str, ...]] = ("gradient", "words")
    made: ClassVar[str] = "learned"
    steps: int = 8
    rate: float = 0.05
    study: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(steps=0, study=0)
        if not 0 < self.rate < float("inf"):
            raise ConfigError(f"method {self.name}: rate is {self.rate}, expected a number above 0")

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        slots = super().keep(row, leaving, queries)
        if not self.steps or slots.length == row.slots.length + leaving.length:
            return slots
        return self.trained(row, leaving, slots)

    def trained(self, row: Row, leaving: KV, slots: KV) -> KV:
        """Slots (L, H, n, D) that are closer to the text, from those that it is to begin with.

        Args:
            row, leaving: as :meth:`keep` gets them.
            slots: in fp32.
        """
        whole = replace(row, window=KV.cat((leaving, row.window)))
        passages = self.passages(whole, leaving.length)
        if not passages:
            return slots
        with torch.inference_mode(False), torch.enable_grad():  # engines fold in inference mode
            row, whole, slots = _copied(row), _copied(whole), _copy(slots)
            with torch.no_grad():
                wanted = self.foreseen(whole, passages)
            size = [part.square().mean((2, 3), keepdim=True).sqrt() for part in slots]  # of a head
            moved = [torch.zeros_like(part, requires_grad=True) for part in slots]
            speed = [torch.zeros_like(part) for part in slots]
            best, least = slots, torch.inf
            for step in range(self.steps + 1):
                new = KV(*(part + s * m for part, s, m in zip(slots, size, moved, strict=True)))
                found = self.foreseen(replace(row, slots=new), passages)
                loss = kl_div(found, wanted, reduction="batchmean", log_target=True)
                if (missed := loss.item()) < least:
                    best, least = KV(*(part.detach() for part in new)), missed
                if step == self.steps:
                    break
                for m, v, grad in zip(moved, speed, torch.autograd.grad(loss, moved), strict=True):
                    grad /= grad.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
                    v.mul_(MOMENTUM).add_(grad, alpha=1 - MOMENTUM)
                    m.data.sub_(v, alpha=self.rate * (1 - step / self.steps))
            return best

    def foreseen(self, row: Row, passages: Sequence[Passage]) -> Tensor:
        """Log-probabilities (N, V) of all foreseen tokens, each passage behind a row; with gradients."""
        ids, mask = left_padded([ids for ids, _ in passages], self.reader.model.device)
        memory = Memory((row,) * len(ids), self.fingerprint())
        _, call = self.reader.live(memory).ahead(mask, self.reader.adapter)
        logits = self.reader.model(input_ids=ids, **call).logits
        own = [one[-count - 1 : -1] for one, (_, count) in zip(logits, passages, strict=True)]
        return log_softmax(torch.cat(own).float(), dim=-1)

    def passages(self, whole: Row, leaving: int) -> list[Passage]:
        """What is recited behind a row of which so many tokens leave."""
        told = whole.notes[: whole.tokens]
        newest, old = told[len(told) - leaving :], told[: len(told) - leaving]
        start = random.Random(whole.tokens).randrange(max(1, len(old) - self.study + 1))
        request = self.tokenizer.encode(KVzip.REQUEST, add_special_tokens=False) if self.tokenizer else ()
        room = max(0, self.reader.context - whole.length - len(request))
        found: list[Passage] = []
        for text in (newest[:room], old[start : start + self.study][:room]):
            if len(text) > 1:
                found.append(((*request, *text), len(text) - (not request)))
        return found


def _copy(kv: KV) -> KV:
    return KV(kv.keys.clone(), kv.values.clone())


def _copied(row: Row) -> Row:
    """The row in tensors that gradients may go through."""
    return replace(row, sink=_copy(row.sink), slots=_copy(row.slots), window=_copy(row.window))
