"""A text summary as memory, as chat applications do it: the same model writes down what was said so far.

When enough segments have come, [the summary so far + those segments] are summarized anew, greedily. Read are the
summary, as a turn at the start, and the newest segments as they are. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..errors import ConfigError
from ..memory import KV
from ..messages import Message
from ..reader import Reader
from ..template import template_of
from ..turns import render
from .base import Method, Run, register

#: Who says the summary, and how it begins.
ROLE, OPENING = "system", "Summary of the conversation so far: "
#: What a small model makes most of: the text first, then what is wanted.
REQUEST = (
    "Here is a conversation between two people.\n\n{text}\n\n"
    "Write a short summary of what they talk about, in the third person. Keep names, numbers and facts."
)


class SummaryRun(Run):
    """Raw keys and values of [summary | newest segments].

    Attributes:
        summary: what was written last; empty at the start.
        recent: ids of the segments that are not in the summary yet.
    """

    def __init__(self, reader: Reader, tokenizer: Any, max_tokens: int, every: int):
        super().__init__(reader)
        self.tokenizer = tokenizer
        self.max_tokens, self.every = max_tokens, every
        self.summary = ""
        self.recent: tuple[tuple[int, ...], ...] = ()

    def append(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise ConfigError("got an empty segment; give at least one token")
        if len(self.recent) < self.every:
            (new,) = self.reader.read([list(ids)], self.memory)
            self.keep(window=KV.cat((self.memory.rows[0].window, new)))
            self.recent = (*self.recent, tuple(ids))
            return
        summary = self._write() or self.summary
        turn = render(self.tokenizer, ROLE, OPENING + summary, "").ids if summary else ()
        (read,) = self.reader.read([[*turn, *ids]])
        row = self.memory.rows[0]
        gone = sum(map(len, self.recent))
        self.keep(window=read, steps=row.steps + len(self.recent), tokens=row.tokens + gone)
        self.summary, self.recent = summary, (tuple(ids),)

    def _write(self) -> str:
        """A summary of the one before and of the segments since."""
        said = [self.tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in self.recent]
        text = "\n".join([OPENING + self.summary, *said] if self.summary else said)
        asked = [Message("user", REQUEST.format(text=text))]
        prompt = template_of(self.tokenizer).ids(asked, generation=True)
        pad = self.tokenizer.pad_token_id
        ids = self.reader.generate(
            [prompt],
            max_new_tokens=self.max_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        return str(self.tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True)).strip()


@register("summary")
@dataclass(frozen=True)
class Summary(Method):
    """A written summary and the newest segments.

    Attributes:
        max_tokens: longest summary, in tokens.
        every: segments that are kept raw until they go into the summary together.
    """

    max_tokens: int = 64
    every: int = 4

    def __post_init__(self) -> None:
        for name in ("max_tokens", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method {self.name}: {name} is {getattr(self, name)}, expected at least 1")

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> SummaryRun:
        if not getattr(tokenizer, "chat_template", None):
            what = "no tokenizer" if tokenizer is None else "a tokenizer without a chat template"
            raise ConfigError(
                f"method {self.name}: got {what}, expected that of a chat model: the model is asked for a summary"
            )
        render(tokenizer, ROLE, OPENING)  # says so if the template has no such role
        return SummaryRun(Reader(model), tokenizer, self.max_tokens, self.every)
