"""From logits to tokens, and from tokens to text, for one row of a batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .base import Sampling

#: Likeliest tokens among which the nucleus is looked for first; sorting a whole vocabulary takes longer than a step.
_NEAR = 256


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: how.
        prompt: token ids that a repetition penalty counts.
    """

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...]):
        self.sampling, self.prompt = sampling, frozenset(prompt)
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
        token = self._draw(self._penalized(logits.float()))
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


class Writer:
    """The text of one answer as its tokens come in.

    Text is given out as soon as it is certain: whole characters, and nothing that may begin a stop text.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._read = self._from = 0  # tokens whose text is in ``text``, and where decoding begins
        self._sent = 0
        self._begun = False

    def put(self, token: int) -> str:
        """New text that is certain; look at :attr:`stopped` afterwards."""
        self.ids.append(token)
        return self._advance(final=False)

    def end(self) -> str:
        """The text that was held back."""
        return "" if self.stopped else self._advance(final=True)

    def _advance(self, final: bool) -> str:
        # A token's text may depend on those before it (a space, bytes of a character): decode both from one place
        decode = self.tokenizer.decode
        old = decode(self.ids[self._from : self._read], skip_special_tokens=True)
        new = decode(self.ids[self._from :], skip_special_tokens=True)
        if final or (len(new) > len(old) and not new.endswith("\ufffd")):
            self.text += new[len(old) :]
            self._from, self._read = self._read, len(self.ids)
        if not self._begun:  # an answer does not begin or end with blanks
            self.text = self.text.lstrip()
            self._begun = bool(self.text)
        ends = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self.text = self.text[: min(ends)]
        if final or self.stopped:
            self.text = self.text.rstrip()
        certain = len(self.text) if final or self.stopped else len(self.text) - self._doubtful()
        piece = self.text[self._sent : certain]
        self._sent = max(self._sent, certain)
        return piece

    def _doubtful(self) -> int:
        """How many characters at the end may belong to a stop text, or are blanks that an answer may end with."""
        begun = max(
            (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
        )
        return len(self.text) - len(self.text[: len(self.text) - begun].rstrip())
