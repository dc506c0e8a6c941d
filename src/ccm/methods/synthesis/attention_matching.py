"""Attention Matching (arXiv 2602.16284): slots that attend as all that was said did, without any training.

Keys are some of those that were there, values are solved for (``matching``). It is a memory for any model from the
first minute, and the mark that a trained adapter has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Row
from ...core.reader import Reader
from ..base import Method, register
from .matching import Asked, match

#: What the model asks whatever was said: read once. Its last tokens, and what a query of theirs counts beside one of
#: the text.
QUESTIONS = (
    "Thanks for telling me. What did you say about it before? Who was it, where did they go, and when? I "
    "remember that you mentioned your family, your work and the place where you live. Could you tell me "
    "more about what happened first, what came next, and how it ended? The answer to the question is "
    "short: it is what was said above. In the beginning, there was a story about a man and a woman in a "
    "small town; then he said,"
)
ASKED, GENERAL = 64, 0.3


@register("attention-matching", "am")
@dataclass(frozen=True, kw_only=True)
class AttentionMatching(Method):
    """Slots that are fitted to attention.

    They are fitted anew whenever text leaves the window.
    At equal bytes one sink token is better than four, and slots are better than a window (docs/decisions.md).

    Attributes:
        slots: entries between sink and window, from the first text that is longer.
    """

    queries: ClassVar[int] = -1
    made: ClassVar[str] = "fitted"
    most: ClassVar[str] = "slots"
    sink: int = 1
    slots: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(slots=1)

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        held = KV.cat((row.slots, leaving.to(torch.float32)))
        if held.length <= self.slots:
            return held
        return match(self.reader, row, held, self.slots, asked(self.reader, self.tokenizer, queries))


def asked(reader: Reader, tokenizer: Any, queries: Tensor | None) -> list[Asked]:
    """What slots are fitted to: queries (L, Hq, w, D) of the newest text, and the model's own."""
    own = [] if queries is None else [(queries, 1.0)]
    return [*own, (_questions(reader, tokenizer), GENERAL)]


def _questions(reader: Reader, tokenizer: Any) -> Tensor:
    """Queries (L, Hq, w, D) of the model's own, kept with it; of some tokens or other where there is no tokenizer."""
    known = reader.model.__dict__.setdefault("_ccm_questions", {})
    if (said := tokenizer is not None) not in known:
        words = reader.model.get_input_embeddings().weight.shape[0]
        some = torch.randint(words, (2 * ASKED,), generator=torch.Generator().manual_seed(0)).tolist()
        ids = tokenizer(QUESTIONS, add_special_tokens=False)["input_ids"] if said else some
        ((_, known[said]),) = reader.watch([ids[-reader.context :]], newest=ASKED)
    return known[said]
