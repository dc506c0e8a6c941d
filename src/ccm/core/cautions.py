"""What a compressor warns of, once: folds from which no good memory comes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .config import SINK
from .memory import Memory
from .twin import text_config

log = logging.getLogger(__name__)


class Cautions:
    """What was looked at, and said, so far.

    Args:
        model: whose special tokens a text may begin with.
    """

    def __init__(self, model: PreTrainedModel):
        ends = model.generation_config.eos_token_id
        first = getattr(text_config(model.config), "bos_token_id", None)
        known = (first, *(ends if isinstance(ends, list) else [ends]))
        self._special = {token for token in known if token is not None}
        self.looked = self.warned = False

    def know(self, tokenizer: Any) -> None:
        """Learn the tokenizer's special tokens: a text that begins with one needs no sink, attention rests on it."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special |= {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def untrained(self, lora: Sequence[Tensor]) -> None:
        """Warn of a LoRA as it was made: its B matrices are zero."""
        if not self.looked and not any(up.any() for up in lora[1::2]):
            log.warning(
                "the compressor has no weights yet: its slots are noise; train it (ccm train), load an adapter "
                "(Compressor.from_pretrained), or take a memory that needs no training (Session.open)"
            )
        self.looked = True

    def rootless(self, memory: Memory, ids: Tensor, mask: Tensor) -> None:
        """Warn of a conversation that begins with an ordinary token, none of which will stay."""
        if self.warned:
            return
        new = [r for r, row in enumerate(memory.rows) if not row.steps and not row.segments]
        if any(int(ids[r][mask[r]][0]) not in self._special for r in new):
            self.warned = True
            log.warning(
                "a text that begins without a special token is folded with sink=0: once it is in slots, attention "
                "has no first token to rest on, and the memory may be worse than none; give sink=%d, or begin with "
                "the template's first token",
                SINK,
            )
