"""Paragraphs are read one by one; questions about one of them are asked now and after more paragraphs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...chat.turns import render_dialogue
from ...data.squad import LICENCE, ORIGIN, Paragraph, Question, load_squad_shifts
from ..items import Generation, Item
from .base import EvalTask, register_task
from .choosing import ask, check_steps, shortly, spread

#: Paragraphs of so many characters, for items of similar length.
CHARACTERS = (300, 800)
#: Only questions are asked whose shortest answer has at most so many words.
WORDS = 5


@register_task
@dataclass(frozen=True)
class Squad(EvalTask):
    """Streams of paragraphs from four domains in turn, no paragraph in two items.

    The same question about paragraph k is asked at every distance, when k + distance paragraphs are there; of its
    questions it is the one that shares most words with this paragraph alone. The tag is "squad distance D".

    Attributes:
        distances: paragraphs read after the one that is asked for.
        asked: which paragraphs of an item are asked for, counted from 1.
    """

    distances: tuple[int, ...] = (0, 1, 3, 7)
    asked: tuple[int, ...] = (1, 5)

    name, title = "squad", "Questions about paragraphs read a while ago (SQuADShifts)"
    metrics = ("em", "f1")
    licence, origin = LICENCE, ORIGIN

    def __post_init__(self) -> None:
        check_steps(self.distances, option="distances")
        check_steps(self.asked, 1, option="asked")

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({k + distance for k in self.asked for distance in self.distances}))

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        domains = [
            spread(filter(_usable, paragraphs), lambda paragraph: (paragraph.article,))
            for paragraphs in load_squad_shifts().values()
        ]
        stream = [paragraph for group in zip(*domains, strict=False) for paragraph in group]
        length = self.steps[-1]
        for k in range(min(limit, len(stream) // length)):
            paragraphs = stream[k * length : (k + 1) * length]
            random.Random(f"squad {k}").shuffle(paragraphs)
            yield self._item(f"paragraphs {k}", paragraphs, tokenizer)

    def _item(self, name: str, paragraphs: list[Paragraph], tokenizer: Any) -> Item:
        queries: dict[int, tuple[Generation, ...]] = {}
        for k in self.asked:
            question = pointed_question(paragraphs, k - 1)
            prompt = ask(tokenizer, shortly(question.text))
            for distance in self.distances:
                query = Generation(prompt, question.answers, tag=f"squad distance {distance}")
                queries[k + distance] = (*queries.get(k + distance, ()), query)
        told = render_dialogue(tokenizer, [("user", paragraph.text) for paragraph in paragraphs])
        segments = tuple(turn.ids for turn in told)
        return Item(name, segments, dict(sorted(queries.items())))


def _usable(paragraph: Paragraph) -> bool:
    return CHARACTERS[0] <= len(paragraph.text) <= CHARACTERS[1] and any(map(_short, paragraph.questions))


def _short(question: Question) -> bool:
    return min((len(answer.split()) for answer in question.answers), default=WORDS + 1) <= WORDS


def pointed_question(paragraphs: list[Paragraph], place: int) -> Question:
    """The question about one paragraph with the most words that it shares with that one and no other."""
    others = {word for k, paragraph in enumerate(paragraphs) if k != place for word in _words(paragraph.text)}
    own = _words(paragraphs[place].text) - others
    return max(filter(_short, paragraphs[place].questions), key=lambda q: len(_words(q.text) & own))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
