"""From logits to tokens, for one row of a batch."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ...models.generation import Drawing
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
        own: the model's own settings, for what ``sampling`` leaves open.
    """

    def __init__(
        self, sampling: Sampling, prompt: tuple[int, ...], form: Form | None = None, own: Drawing = Drawing()
    ):
        self.sampling, self.prompt, self.form = sampling, frozenset(prompt), form
        self.drawing = sampling.drawing(own)
        self.counts: Counter[int] = Counter()
        self.generator: torch.Generator | None = None
        if self.drawing.temperature:
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
        options = self.drawing
        if self.generator is None:
            return int(logits.argmax())
        probabilities = (logits / options.temperature).softmax(-1).cpu()
        if options.top_p == 1 and not options.top_k and not options.min_p:
            return int(torch.multinomial(probabilities, 1, generator=self.generator))
        values, indices = self._likeliest(probabilities)
        kept = values >= options.min_p * values[0]
        if options.top_p < 1:
            kept &= values.cumsum(0) - values < options.top_p * values.sum()
        kept[0] = True
        return int(indices[torch.multinomial(values * kept, 1, generator=self.generator)])

    def _likeliest(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and ids of tokens, the likeliest first: all that may be drawn are among them."""
        options = self.drawing
        if options.top_k:
            values, indices = probabilities.topk(min(options.top_k, len(probabilities)))
            return values, indices
        values, indices = probabilities.topk(min(_NEAR, len(probabilities)))
        far = options.top_p < 1 and values.sum() >= options.top_p
        if far or (options.min_p and values[-1] < options.min_p * values[0]):
            return values, indices
        values, indices = probabilities.sort(descending=True)
        return values, indices

    def _penalized(self, logits: Tensor) -> Tensor:
        options, repeated = self.sampling, self.drawing.repetition_penalty
        if repeated != 1 and (seen := sorted(self.prompt | self.counts.keys())):
            logits = logits.clone()
            old = logits[seen]
            logits[seen] = torch.where(old < 0, old * repeated, old / repeated)
        if (options.frequency_penalty or options.presence_penalty) and self.counts:
            logits = logits.clone()
            times = torch.tensor(list(self.counts.values()), dtype=logits.dtype, device=logits.device)
            penalty = options.frequency_penalty * times + options.presence_penalty
            logits[list(self.counts)] -= penalty
        return logits
