"""What engines share that get logits and draw the tokens themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .base import Sampling
from .folding import FoldingEngine, Running
from .forms import Form
from .sampling import Sampler

#: Prompt tokens that are read at once.
CHUNK = 256


@dataclass(eq=False, kw_only=True)
class Drawn(Running):
    """A job with its sampler."""

    sampler: Sampler


R = TypeVar("R", bound=Drawn)


class DrawingEngine(FoldingEngine[R]):
    """Many conversations under one method, whose answers are drawn here."""

    @abstractmethod
    def _with_sampler(self, **common: Any) -> R:
        """A job's state, from the fields of :class:`Drawn`."""

    def check(self, sampling: Sampling) -> None:
        self._form(sampling)

    def _accept(self, **common: Any) -> R:
        job = common["job"]
        sampler = Sampler(job.sampling, job.prompt, self._form(job.sampling, job.prompt), self.own)
        return self._with_sampler(**common, sampler=sampler)

    def _form(self, sampling: Sampling, prompt: tuple[int, ...] = ()) -> Form | None:
        if sampling.schema is None:
            return None
        begin, end = self.template.thoughts or ("", None)
        thinking = self.tokenizer.decode(list(prompt[-16:])).rstrip().endswith(begin)
        return Form(sampling.schema, self.tokenizer, self._ends, end if thinking else None)

    def _draw(self, rows: Sequence[R], logits: Sequence[Tensor] | Tensor) -> None:
        """Draw the next token of each row, from logits (V,), and take those out that have ended."""
        ended = [
            running
            for running, row in zip(rows, logits, strict=True)
            if self._put(running, running.sampler.draw(row))
        ]
        if ended:
            self._end(ended)
