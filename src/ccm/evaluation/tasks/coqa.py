"""A story is read in groups of sentences; then questions about it follow each other as a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...chat.turns import render, render_dialogue
from ...data.coqa import LICENCE, ORIGIN, Story, load_coqa
from ...data.sources import number
from ..items import Generation, Item
from .base import EvalTask, register_task
from .choosing import ask, shortly, spread

#: Longer stories are left out.
CHARACTERS = 1800


@register_task
@dataclass(frozen=True)
class Coqa(EvalTask):
    """Stories, one of every kind (news, school, fiction, ...) in turn, and the first questions about each.

    A question is asked when the story and all questions before it, with the right answers, are in the memory.

    Attributes:
        groups: segments that the story is cut into, of similar length.
        questions: asked about a story.
    """

    groups: int = 8
    questions: int = 5

    name, title = "coqa", "A conversation about a story (CoQA)"
    metrics: ClassVar[tuple[str, ...]] = ("em", "f1")
    licence, origin = LICENCE, ORIGIN

    def __post_init__(self) -> None:
        number("groups", self.groups, 1)
        number("questions", self.questions, 1)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(range(self.groups, self.groups + self.questions))

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        stories = [story for story in load_coqa() if self._fits(story)]
        for story in spread(stories, lambda story: (story.kind,))[:limit]:
            yield self._item(story, tokenizer)

    def _fits(self, story: Story) -> bool:
        short = len(story.text) <= CHARACTERS and len(story.questions) >= self.questions
        return short and len(sentences(story.text)) >= self.groups

    def _item(self, story: Story, tokenizer: Any) -> Item:
        told = [("user", text) for text in cut(sentences(story.text), self.groups)]
        segments = [turn.ids for turn in render_dialogue(tokenizer, told)]
        queries = {}
        for question in story.questions[: self.questions]:
            asked = shortly(question.text)
            queries[len(segments)] = (Generation(ask(tokenizer, asked), question.answers),)
            answer = render(tokenizer, "assistant", question.answers[0]).ids
            segments.append((*render(tokenizer, "user", asked).ids, *answer))
        return Item(f"story {story.id}", tuple(segments[:-1]), queries)


def sentences(text: str) -> list[str]:
    """Sentences of a text, roughly: a point, a space and a capital letter end one."""
    return re.split(r"(?<=[.!?\"'”])\s+(?=[A-Z\"'“(])", text)


def cut(parts: list[str], groups: int) -> list[str]:
    """Neighbours joined into ``groups`` texts of similar length, none of them empty."""
    total, texts = sum(map(len, parts)), []
    place = said = 0
    for group in range(1, groups + 1):
        stop = place + 1
        said += len(parts[place])
        while stop < len(parts) - (groups - group) and (
            group == groups or said + len(parts[stop]) / 2 <= total * group / groups
        ):
            said += len(parts[stop])
            stop += 1
        texts.append(" ".join(parts[place:stop]))
        place = stop
    return texts
