"""From logits to tokens, for one row of a batch."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .base import Sampling
from .forms import Form

#: Likeliest tokens among which the nucleus is looked for first; sorting a whole vocabulary takes longer than a step.
_NEAR = 256


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: how.
        prompt: token ids that a repetition penalty counts.
        form: that the answer has; None leaves it free.
    """

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...], form: Form | None = None):
        self.sampling, self.prompt, self.form = sampling, frozenset(prompt), form
        self.counts: Counter[int] = Counter()
        self.generator: torch.Generator | None = None
        if sampling.temperature:
            self.generator = torch.Generator()
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed & (1 << 63) - 1)

    def draw(self, logits: Tensor) -> int:
        """The next token id, from logits (V,)."""
        logits = self._penalized(logits.float())
        token = self._draw(self.form.allow(logits) if self.form else logits)
        if self.form:
            self.form.take(token)
        self.counts[token] += 1
        return token

    def _draw(self, logits: Tensor) -> int:
        options = self.sampling
        if self.generator is None:
            return int(logits.argmax())
        probabilities = (logits / options.temperature).softmax(-1).cpu()
        if options.top_p < 1:
            top = probabilities.topk(min(_NEAR, len(probabilities)))
            if top.values.sum() < options.top_p:
                top = probabilities.sort(descending=True)
            kept = top.values.cumsum(0) - top.values < options.top_p
            kept[0] = True
            return int(top.indices[torch.multinomial(top.values * kept, 1, generator=self.generator)])
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def _penalized(self, logits: Tensor) -> Tensor:
        options = self.sampling
        if options.repetition_penalty != 1 and (seen := sorted(self.prompt | self.counts.keys())):
            logits = logits.clone()
            old = logits[seen]
            logits[seen] = torch.where(
                old < 0, old * options.repetition_penalty, old / options.repetition_penalty
            )
        if (options.frequency_penalty or options.presence_penalty) and self.counts:
            logits = logits.clone()
            times = torch.tensor(list(self.counts.values()), dtype=logits.dtype, device=logits.device)
            penalty = options.frequency_penalty * times + options.presence_penalty
            logits[list(self.counts)] -= penalty
        return logits
