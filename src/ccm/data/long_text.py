"""Sources made of long texts: a row is a stretch of one text, cut into segments of equal length."""

from __future__ import annotations

import random
from abc import abstractmethod
from bisect import bisect
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .conversation import Split, check_split, unit
from .rows import ConversationRow
from .sources import HeldOut, Source, number, numbers, register_source


class LongTextSource(Source):
    """Rows of long texts; all tokens are scored, except for the first of each segment.

    Args:
        segment_tokens: shortest and longest segment; every training row draws a length between them (evenly on a
            logarithmic scale), held-out rows have 64, or the nearest length that is allowed.
        row_tokens: a row has as many whole segments as fit into this, two at least. Of several, every training row
            draws one, and held-out rows have the first.
    """

    def __init__(
        self,
        tokenizer: Any,
        segment_tokens: Sequence[int] = (32, 256),
        row_tokens: int | Sequence[int] = 1024,
    ):
        super().__init__(tokenizer)
        self.segment_tokens = numbers("segment_tokens", segment_tokens, 2)
        if len(self.segment_tokens) != 2 or self.segment_tokens[0] > self.segment_tokens[1]:
            raise ConfigError(
                f"segment_tokens is {segment_tokens!r}: expected two numbers, the smaller one first"
            )
        least = 2 * self.segment_tokens[1]
        one = isinstance(row_tokens, int)
        self.row_tokens = (
            (number("row_tokens", row_tokens, least),) if one else numbers("row_tokens", row_tokens, least)
        )

    @abstractmethod
    def texts(self, split: Split) -> Mapping[str, str]:
        """All texts of a split by their names; no text is in two splits."""

    @cached_property
    def _train(self) -> tuple[list[tuple[str, str]], list[int]]:
        """Training texts that are long enough, and their summed lengths."""
        texts = self._long("train")
        return texts, list(accumulate(len(text) for _, text in texts))

    @property
    def _reach(self) -> int:
        """Characters that hold a row: words have about 4 to a token, and what is too much is cut."""
        return 6 * max(self.row_tokens)

    def _long(self, split: Split) -> list[tuple[str, str]]:
        long = [(name, text) for name, text in self.texts(split).items() if len(text) > self._reach]
        if not long:
            raise DataError(
                f"{self.name} has no text of more than {self._reach} characters in its {split} split: "
                "give longer texts, or a smaller row_tokens"
            )
        return long

    def draw(self, rng: random.Random) -> ConversationRow:
        texts, summed = self._train
        shortest, longest = self.segment_tokens
        length = min(longest, int(shortest * (longest / shortest) ** rng.random()))
        name, text = texts[bisect(summed, rng.randrange(summed[-1]))]
        start = rng.randrange(len(text) - self._reach)
        tokens = rng.choice(self.row_tokens) if len(self.row_tokens) > 1 else self.row_tokens[0]
        return self._row(name, text, start, length, tokens)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        check_split(split)
        shortest, longest = self.segment_tokens
        length = min(max(64, shortest), longest)
        parts = [
            (name, text, start)
            for name, text in self._long(split)
            for start in range(0, len(text) - self._reach, self._reach)
        ]
        parts.sort(key=lambda part: unit(f"{part[0]} {part[2]}"))  # all texts and all places in them
        return [self._row(*part, length, self.row_tokens[0]) for part in parts[:limit]]

    def _row(self, name: str, text: str, start: int, length: int, tokens: int) -> ConversationRow:
        """The row that begins with the first whole word after ``start``."""
        part = text[start : start + 6 * tokens]
        if start:
            part = part[part.find(" ") + 1 :]
        ids = self.tokenizer.encode(part, add_special_tokens=False)[:tokens]
        count = len(ids) // length
        segments = tuple(tuple(ids[k * length : (k + 1) * length]) for k in range(count))
        return ConversationRow(name, segments, ((1, length),) * count)


@register_source
class TextFolder(LongTextSource):
    """The user's own texts. Whole files are held out: one in ten for validation and for tests, one each at least.

    Args:
        path: a folder of .txt files, three or more.
        segment_tokens, row_tokens: see :class:`~ccm.data.long_text.LongTextSource`.
    """

    name, title = "text", "Your own long texts"
    licence, origin = "yours", "a folder of .txt files: path="

    def __init__(self, tokenizer: Any, path: str | Path, **options: Any):
        self.path = Path(path).expanduser()
        super().__init__(tokenizer, **options)

    def texts(self, split: Split) -> dict[str, str]:
        files = sorted(self.path.glob("*.txt"), key=lambda file: unit(file.name))
        if len(files) < 3:
            raise DataError(
                f"{self.path} holds {len(files)} .txt files: expected a folder with three or more, so "
                "that whole files can be held out"
            )
        tenth = max(1, len(files) // 10)
        chosen = {"test": files[:tenth], "validation": files[tenth : 2 * tenth], "train": files[2 * tenth :]}
        try:
            return {file.name: file.read_text(encoding="utf-8") for file in chosen[split]}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} cannot be read ({error}): expected UTF-8 text files") from error
