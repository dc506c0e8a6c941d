"""What is planted into real conversations: facts that are asked for later, and turns that come again."""

from __future__ import annotations

import random
from typing import Any

from ..chat.turns import RenderedTurn, render
from .facts import Fact, draw_facts


def render_answer(tokenizer: Any, fact: Fact) -> tuple[RenderedTurn, tuple[int, int]]:
    """The answer to the question about a fact, and the columns of the value in it."""
    turn = render(tokenizer, "assistant", fact.answer_with(fact.value) + ".")
    stem = tokenizer.encode(fact.answer_with("").rstrip(), add_special_tokens=False)
    value = tokenizer.encode(" " + fact.value, add_special_tokens=False)
    start = turn.content[0] + len(stem)
    return turn, (start, start + len(value))


def echo(turns: list[Any], rng: random.Random) -> None:
    """Let one in ten turns repeat an earlier one: to foresee them, a memory must have kept the words."""
    for _ in range(max(1, len(turns) // 10)):
        first, again = sorted(rng.sample(range(len(turns)), 2))
        turns[again] = turns[first]


def plant_facts(turns: list[RenderedTurn], tokenizer: Any, rng: random.Random) -> list[tuple[int, int, int]]:
    """Replace one in five turns by facts, and later pairs of turns by the question and the answer.

    Returns:
        (turn, start, stop): the columns of the values in the answers.
    """
    facts = draw_facts(rng, "train", max(1, len(turns) // 5))
    asked = sorted(rng.sample(range(1, len(turns) // 2), min(len(facts), len(turns) // 2 - 1)))
    free = [i for i in range(len(turns)) if i // 2 not in asked]
    recall = []
    for pair, fact in zip(asked, facts, strict=False):
        before = [i for i in free if i < 2 * pair]
        if not before:
            continue
        told = rng.choice(before)
        free.remove(told)
        turns[told] = render(tokenizer, "user", fact.statement, "assistant" if told else "")
        turns[2 * pair] = render(tokenizer, "user", fact.question)
        turns[2 * pair + 1], value = render_answer(tokenizer, fact)
        recall.append((2 * pair + 1, *value))
    return recall
