"""Streaming language modelling: a whole book goes by, and every segment is foreseen before it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...data.books import Books, load_books
from ...data.hub import Pg19
from ...data.sources import number
from ...errors import ConfigError
from ..items import Item, Likelihood
from .base import EvalTask, register_task
from .choosing import encode

#: Far more than tokens of prose have on average: the rest of a book is not tokenized for a short stream.
_CHARACTERS = 12


@register_task
@dataclass(frozen=True)
class Stream(EvalTask):
    """Held-out books in segments of equal length; of the three novels the longest comes first.

    Before every segment, the first included, its tokens but the first are scored; the tag is "stream".

    Attributes:
        segment: tokens of a segment.
        tokens: of a book that are read at most; None reads it to the end.
        source: "books" (three novels) or, with a model hub, "pg19".
    """

    segment: int = 64
    tokens: int | None = None
    source: Literal["books", "pg19"] = "books"

    name, title = "stream", "Held-out novels from beginning to end (Moby-Dick, Persuasion, Northanger Abbey)"
    metrics = ("nll",)
    licence, origin = Books.licence, f"{Books.origin}; or hub {Pg19.hub}"

    def __post_init__(self) -> None:
        number("segment", self.segment, 2)
        if self.tokens is not None:
            number("tokens", self.tokens, 2 * self.segment)
        if self.source not in ("books", "pg19"):
            raise ConfigError(f"source is {self.source!r}: expected books or pg19")

    @property
    def steps(self) -> tuple[int, ...]:
        return ()

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for title, text in list(self._texts(tokenizer, limit).items())[:limit]:
            reach = None if self.tokens is None else _CHARACTERS * self.tokens
            yield self._item(title, encode(tokenizer, text[:reach])[: self.tokens])

    def _texts(self, tokenizer: Any, limit: int) -> Mapping[str, str]:
        if self.source == "pg19":
            return Pg19(tokenizer, books=max(1, limit)).texts("test")
        texts = load_books()["test"]
        return {title: texts[title] for title in sorted(texts, key=lambda title: -len(texts[title]))}

    def _item(self, title: str, ids: tuple[int, ...]) -> Item:
        segments = [ids[k : k + self.segment] for k in range(0, len(ids) - self.segment + 1, self.segment)]
        queries = {
            t: (Likelihood(segment, (1, len(segment)), tag="stream"),) for t, segment in enumerate(segments)
        }
        return Item(title, tuple(segments[:-1]), queries)
