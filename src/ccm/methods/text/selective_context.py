"""Words that nobody would have guessed stay (Selective Context, Li et al., EMNLP 2023, arXiv 2310.06201).

A token's self-information, -log p(token | what stands before it), says what would be lost with it. It is found anew
in every fold, for the text as it is kept by then. Simplified: tokens are let go one by one, not phrase by phrase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...core.memory import Memory
from ..base import register
from .told import Told


@register("selective-context")
@dataclass(frozen=True, kw_only=True)
class SelectiveContext(Told):
    """Tokens that were hardest to guess.

    Selective Context, Li et al., EMNLP 2023, arXiv 2310.06201.
    """

    def chosen(self, old: Sequence[int], newest: Sequence[int], sink: Memory) -> Sequence[int]:
        logits = self.reader.logits([list(old)], sink)[0, :-1].float()
        surprise = -logits.log_softmax(-1).gather(1, torch.tensor(old[1:], device=logits.device)[:, None])
        first = surprise.new_full((1,), torch.inf)  # nothing stands before it
        best = torch.cat([first, surprise[:, 0]]).topk(self.tokens).indices
        return best.sort().values.tolist()
