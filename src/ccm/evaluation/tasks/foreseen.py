"""Questions whose right answers are given to the model, and scored by how well it foresees them.

One pass a question, and no text is written. So many methods are compared in little time (``ccm leaderboard``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..items import Choice, Generation, Ids, Item, Likelihood, Query
from .base import register_task
from .choosing import encode
from .coqa import Coqa
from .facts import Needles


def foreseen(item: Item, tokenizer: Any) -> Item:
    """The same questions, with the likelihood of the right answer in place of a choice or of what is written.

    Where a step asks for choices and for written answers, the choices are taken: they are about the same.
    """
    queries = {t: tuple(_foreseen(asked, tokenizer)) for t, asked in item.queries.items()}
    return replace(item, queries=queries)


def _foreseen(asked: Sequence[Query], tokenizer: Any) -> Iterator[Likelihood]:
    chosen = [query for query in asked if isinstance(query, Choice)]
    for query in chosen or asked:
        if isinstance(query, Choice):
            yield _answered(query.prompt, query.options[query.answer], query.tag)
        elif isinstance(query, Generation):
            # behind the head of a turn an answer begins at once, behind the beginning of a sentence with a space
            begun = tokenizer.decode([query.prompt[-1]]).strip() != ""
            yield _answered(query.prompt, encode(tokenizer, " " * begun + query.answers[0]), query.tag)
        else:
            yield query


def _answered(prompt: Ids, answer: Ids, tag: str) -> Likelihood:
    return Likelihood((*prompt, *answer), (len(prompt), len(prompt) + len(answer)), tag)


@register_task
@dataclass(frozen=True)
class Facts(Needles):
    """Twelve facts about four people who share their names, told one by one; then six of them are asked for.

    Attributes:
        steps, facts: see :class:`Needles`.
    """

    steps: tuple[int, ...] = (12,)
    facts: int = 6

    name, title = "facts", "Told facts that are easily confused: how well the right answer is foreseen"
    metrics = ("nll",)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        return (foreseen(item, tokenizer) for item in super().items(tokenizer, limit))


@register_task
@dataclass(frozen=True)
class Questions(Coqa):
    """A story, told in eight parts; then four questions follow each other as a conversation.

    Attributes:
        groups, questions: see :class:`Coqa`.
    """

    questions: int = 4

    name, title = "questions", "Questions about a story (CoQA): how well the right answer is foreseen"
    metrics = ("nll",)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        return (foreseen(item, tokenizer) for item in super().items(tokenizer, limit))
