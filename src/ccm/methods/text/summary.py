"""A text summary as memory, as chat applications do it: the same model writes down what was said so far.

When enough segments have come, [the summary so far + those segments] are summarized anew, greedily. Read are the
summary, as a turn at the start, and the newest segments as they are. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ...chat.messages import Message
from ...chat.template import template_of
from ...chat.turns import render
from ...core.memory import Memory, Row
from ...core.reader import Reader
from ...core.window import joined
from ...errors import ConfigError
from ..base import Method, Segment, register
from ..parts import RAW, Part, behind, pinned

#: Who says the summary, and how it begins.
ROLE, OPENING = "system", "Summary of the conversation so far: "
#: What a small model makes most of: the text first, then what is wanted.
REQUEST = (
    "Here is a conversation between two people.\n\n{text}\n\n"
    "Write a short summary of what they talk about, in the third person. Keep names, numbers and facts."
)


@register("summary")
@dataclass(frozen=True, kw_only=True)
class Summary(Method):
    """A written summary and the newest segments.

    A row's window is [summary, as a turn | newest segments]; its notes are the token ids of the same,
    (length of the summary, *summary, *newest segments).

    Attributes:
        max_tokens: longest summary, in tokens.
        every: segments that are kept raw until they go into the summary together.
    """

    asks: ClassVar[tuple[str, ...]] = ("writing",)
    made: ClassVar[str] = "written"
    max_tokens: int = 64
    every: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(max_tokens=1, every=1)

    def bind(self, model: PreTrainedModel | Reader, tokenizer: Any = None) -> Summary:
        if not getattr(tokenizer, "chat_template", None):
            what = "no tokenizer" if tokenizer is None else "a tokenizer without a chat template"
            raise ConfigError(
                f"method {self.name}: got {what}, expected that of a chat model: the model is asked for a summary"
            )
        render(tokenizer, ROLE, OPENING)  # says so if the template has no such role
        return super().bind(model, tokenizer)

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        rows = map(self._told, memory.rows, segment.texts)
        return replace(memory, rows=tuple(rows))

    def parts(self, row: Row, lengths: Sequence[int] = ()) -> list[Part]:
        written = row.segments[0] if row.notes and row.notes[0] else 0
        found = behind(pinned(row), "window", "summary", written, (0, row.tokens))
        newest = row.window.length - written
        return behind(found, "window", RAW, newest, (row.tokens, row.tokens + newest))

    def size(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        raise ConfigError(
            f"method {self.name} does not say its size: a summary is as long as the model makes it"
        )

    def apart(self, row: Row) -> int:
        """The newest segments, when they are as long as they may be."""
        return min(self.every * self.longest, self.reader.context)

    def _told(self, row: Row, text: list[int]) -> Row:
        length, notes = (row.notes[0], row.notes[1:]) if row.notes else (0, ())
        summary, recent = notes[:length], notes[length:]
        segments = row.segments[1:] if length else row.segments
        if len(segments) < self.every:
            (new,) = self.reader.read([text], Memory((row,), self.fingerprint()))
            return replace(joined(row, new, new.length), notes=(length, *summary, *recent, *text))
        said = self._decode(summary)
        written = self._write(said, recent, segments) or said
        turn = render(self.tokenizer, ROLE, OPENING + written, "").ids if written else ()
        summary = tuple(self.tokenizer.encode(written, add_special_tokens=False))
        (read,) = self.reader.read([[*turn, *text]], Memory((row.bare,), self.fingerprint()))
        return replace(
            row,
            window=read,
            segments=(len(turn), len(text)) if turn else (len(text),),
            steps=row.steps + len(segments),
            tokens=row.tokens + len(recent),
            merged=row.merged + len(recent),
            merged_segments=row.merged_segments + len(segments),
            notes=(len(summary), *summary, *text),
        )

    def _write(self, summary: str, recent: Sequence[int], lengths: Sequence[int]) -> str:
        """A summary of the one before and of the segments since."""
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        parts = [recent[start : start + n] for start, n in zip(starts, lengths, strict=True)]
        said = [self._decode(part) for part in parts]
        text = "\n".join([OPENING + summary, *said] if summary else said)
        asked = [Message("user", REQUEST.format(text=text))]
        prompt = template_of(self.tokenizer).ids(asked, generation=True)
        pad = self.tokenizer.pad_token_id
        ids = self.reader.generate(
            [prompt],
            max_new_tokens=self.max_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        return self._decode(ids[0, len(prompt) :].tolist())

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
