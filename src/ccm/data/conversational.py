"""Sources made of conversations: a row is a stretch of consecutive turns, one turn a segment."""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from ..errors import DataError
from .conversation import Conversation, Split, check_split
from .formats import Said, Style, draw_style, read_formats, write
from .planting import echo, plant_facts
from .rows import ConversationRow, held_out_rows, render_turns, row
from .sources import HeldOut, Source, number, numbers, share
from .telling import plant_told

log = logging.getLogger(__name__)


class ConversationSource(Source):
    """Rows of conversations; subclasses say which conversations there are.

    Args:
        tokenizer: with the chat template to render turns.
        turns: turns per training row, drawn from these; held-out rows have the first of them.
        facts: share of training rows with planted facts that are asked for later, one in five turns.
        echoes: share of training rows in which some turns, one in ten, repeat an earlier one word for word.
        limit: most conversations to train on; None takes all.
        formats: how rows are written: one of :data:`~ccm.data.formats.FORMATS`, several to draw from, or a mapping
            to their shares. Planted facts then come from larger pools (:mod:`~ccm.data.telling`), and held-out rows
            are in these formats as well. None is the chat template with what it brings.
    """

    def __init__(
        self,
        tokenizer: Any,
        turns: int | Sequence[int] = (10, 24),
        facts: float = 0.0,
        echoes: float = 0.0,
        limit: int | None = None,
        formats: str | Sequence[str] | Mapping[str, float] | None = None,
    ):
        super().__init__(tokenizer)
        self.turns = numbers("turns", turns, 4)
        self.limit = None if limit is None else number("limit", limit, 1)
        self.facts, self.echoes = share("facts", facts), share("echoes", echoes)
        self.formats = None if formats is None else read_formats("formats", formats)

    @abstractmethod
    def conversations(self, split: Split) -> Sequence[Conversation]:
        """All conversations of a split; nobody and no conversation is in two splits."""

    @cached_property
    def _train(self) -> dict[int, tuple[list[Conversation], list[int]]]:
        """For every number of turns the conversations that are long enough, and their summed lengths."""
        talks = self.conversations("train")[: self.limit]
        by_length = {}
        for length in self.turns:
            if long := [talk for talk in talks if len(talk.turns) >= length]:
                by_length[length] = long, list(accumulate(len(talk.turns) for talk in long))
            else:
                log.warning(
                    "%s has no training conversation of %d turns: no rows are that long", self.name, length
                )
        if not by_length:
            raise DataError(
                f"{self.name} has no conversation of {min(self.turns)} turns to train on: "
                "give more data, or fewer turns"
            )
        return by_length

    def draw(self, rng: random.Random) -> ConversationRow:
        length = rng.choice(list(self._train))
        talks, summed = self._train[length]
        talk = rng.choices(talks, cum_weights=summed)[0]
        start = rng.randrange(len(talk.turns) - length + 1)
        stretch = replace(talk, turns=talk.turns[start : start + length])
        if self.formats is not None:
            return self._written(stretch, self.formats, rng, "train")
        part = render_turns(stretch, self.tokenizer)
        recall: list[tuple[int, int, int]] = []
        if rng.random() < self.echoes:
            echo(part, rng)
        if rng.random() < self.facts:
            recall = plant_facts(part, self.tokenizer, rng)
        return row(talk.id, part, recall)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        check_split(split)
        length = self.turns[0]
        long = [talk for talk in self.conversations(split) if len(talk.turns) >= length]
        if not long:
            raise DataError(
                f"{self.name} has no conversation of {length} turns in its {split} split: "
                "give more data, or fewer turns"
            )
        if self.formats is None:
            return held_out_rows(long[:limit], self.tokenizer, length)
        return [
            self._written(
                replace(talk, turns=talk.turns[:length]),
                self.formats,
                random.Random(f"{self.name} {talk.id}"),
                split,
            )
            for talk in long[:limit]
        ]

    def _written(
        self, stretch: Conversation, formats: Mapping[str, float], rng: random.Random, split: Split
    ) -> ConversationRow:
        """The stretch in one of the formats, with what is planted into it."""
        style = draw_style(formats, self.tokenizer, rng)
        said = [Said(turn.role, turn.text) for turn in stretch.turns]
        part, recall = write(self.planted(said, style, rng, split), style)
        return row(stretch.id, part, recall)

    def planted(self, said: list[Said], style: Style, rng: random.Random, split: Split) -> list[Said]:
        """What is said with echoes and facts in it; held-out rows stay as they are."""
        if split != "train":
            return said
        if rng.random() < self.echoes:
            echo(said, rng)
        if rng.random() < self.facts:
            said = plant_told(said, rng, max(1, len(said) // 5), people=style.people)
        return said
