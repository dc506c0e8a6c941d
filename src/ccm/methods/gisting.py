"""Gisting of a fixed context (Mu et al., NeurIPS 2023): all that was said becomes n slots at once.

Whenever a segment arrives, the whole history c(1..t) is read again and compressed as one: an upper bound for what n
slots can hold, at a cost that grows with the history, as does what must be stored beside the slots to do it.
Simplified: the original tunes all weights; here a LoRA is trained, with the data, objective and steps of CCM, on
every prefix of a row in one parallel pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ..errors import ConfigError
from .base import register
from .compressed import CompressedRun, Trained


class GistingRun(CompressedRun):
    """The tokens of the history, and its gist.

    Attributes:
        history: ids of all that was said; not part of the keys and values that are read.
    """

    history: tuple[int, ...] = ()

    def append(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise ConfigError("got an empty segment; give at least one token")
        history = (*self.history, *ids)
        self.memory = self.reader.compress([history], **self.sizes)
        self.history = history


@register("gisting")
@dataclass(frozen=True)
class Gisting(Trained):
    """n slots in all, made anew from the whole history at every step."""

    kind: ClassVar[str] = "gisting"

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> GistingRun:
        return GistingRun(self.compressor(model), slots=self.slots)
