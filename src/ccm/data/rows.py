"""Conversations as rows of segments: one turn, one segment."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import RenderedTurn, render
from .chitchat import Conversation
from .facts import Fact, draw_facts


@dataclass(frozen=True)
class ConversationRow:
    """Turns as tokens.

    Attributes:
        segments: ``segments[i]`` are the ids of turn i.
        content: ``content[i]`` are the columns of it that are scored, (start, stop).
        recall: (turn, start, stop) of what can only be known from an earlier turn: the values of planted facts.
    """

    conversation: str
    segments: tuple[tuple[int, ...], ...]
    content: tuple[tuple[int, int], ...]
    recall: tuple[tuple[int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.segments))


def render_turns(
    conversation: Conversation, tokenizer: Any, max_turn_tokens: int | None = 128
) -> list[RenderedTurn]:
    """Every turn as tokens; the content of a very long turn is cut to ``max_turn_tokens``."""
    turns = []
    for turn in conversation.turns:
        rendered = render(tokenizer, turn.role, turn.text)
        start, stop = rendered.content
        if max_turn_tokens is not None and stop - start > max_turn_tokens:
            ids = (*rendered.ids[: start + max_turn_tokens - 1], *rendered.ids[stop - 1 :])
            rendered = RenderedTurn(ids, (start, start + max_turn_tokens))
        turns.append(rendered)
    return turns


def row(
    conversation: str, turns: Sequence[RenderedTurn], recall: Sequence[tuple[int, int, int]] = ()
) -> ConversationRow:
    return ConversationRow(
        conversation, tuple(t.ids for t in turns), tuple(t.content for t in turns), tuple(recall)
    )


def render_answer(tokenizer: Any, fact: Fact) -> tuple[RenderedTurn, tuple[int, int]]:
    """The answer to the question about a fact, and the columns of the value in it."""
    turn = render(tokenizer, "assistant", fact.answer_with(fact.value) + ".")
    stem = tokenizer.encode(fact.answer_with("").rstrip(), add_special_tokens=False)
    value = tokenizer.encode(" " + fact.value, add_special_tokens=False)
    start = turn.content[0] + len(stem)
    return turn, (start, start + len(value))


def held_out_rows(
    conversations: Sequence[Conversation], tokenizer: Any, turns: int = 10, per_conversation: int = 1
) -> list[ConversationRow]:
    """The first rows of ``turns`` turns of each conversation, end to end, for evaluation."""
    rows = []
    for conversation in conversations:
        rendered = render_turns(conversation, tokenizer)
        for k in range(min(per_conversation, len(rendered) // turns)):
            rows.append(row(conversation.id, rendered[k * turns : (k + 1) * turns]))
    return rows


#: Batches in a pool.
POOL = 16


class RowStream:
    """Endless shuffled rows for training, batched by similar length; its state is one integer.

    Args:
        conversations: where rows come from; every row starts at a random turn.
        tokenizer: with the chat template to render turns.
        turns: turns per row; each pool of batches draws one of these.
        batch: rows per batch for the shortest of them; longer rows come in smaller batches.
        facts: share of rows with planted facts that are asked for later, one in six turns.
        echoes: share of rows in which some turns, one in ten, repeat an earlier one word for word.
        seed: of the order.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Any,
        turns: Sequence[int],
        batch: int,
        facts: float = 0.0,
        echoes: float = 0.0,
        seed: int = 0,
    ):
        self.rendered = [
            (c.id, render_turns(c, tokenizer)) for c in conversations if len(c.turns) >= min(turns)
        ]
        self.tokenizer, self.turns, self.batch = tokenizer, turns, batch
        self.facts, self.echoes, self.seed = facts, echoes, seed
        self.served = 0

    def _pool(self, number: int) -> list[list[ConversationRow]]:
        """Pool ``number`` of rows, drawn in proportion to conversation length, sorted and cut into batches."""
        rng = random.Random(f"{self.seed}-{number}")
        length = rng.choice(self.turns)
        batch = max(1, self.batch * min(self.turns) // length)
        long = [(name, turns) for name, turns in self.rendered if len(turns) >= length]
        rows = []
        for name, turns in rng.choices(long, [len(turns) for _, turns in long], k=POOL * batch):
            start = rng.randrange(len(turns) - length + 1)
            part = list(turns[start : start + length])
            recall: list[tuple[int, int, int]] = []
            if rng.random() < self.echoes:
                self._echo(part, rng)
            if rng.random() < self.facts:
                recall = self._plant(part, rng)
            rows.append(row(name, part, recall))
        rows.sort(key=lambda r: r.tokens)
        cut = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(cut)
        return cut

    def _echo(self, turns: list[RenderedTurn], rng: random.Random) -> None:
        """Let some turns repeat an earlier one: to foresee them, a memory must have kept the words."""
        for _ in range(max(1, len(turns) // 10)):
            first, again = sorted(rng.sample(range(len(turns)), 2))
            turns[again] = turns[first]

    def _plant(self, turns: list[RenderedTurn], rng: random.Random) -> list[tuple[int, int, int]]:
        """Replace turns by facts, and later pairs of turns by the questions and answers; the values' columns."""
        facts = draw_facts(rng, "train", rng.randint(1, max(1, len(turns) // 6)))
        asked = sorted(rng.sample(range(1, len(turns) // 2), min(len(facts), len(turns) // 2 - 1)))
        free = [i for i in range(len(turns)) if i // 2 not in asked]
        recall = []
        for pair, fact in zip(asked, facts, strict=False):
            before = [i for i in free if i < 2 * pair]
            if not before:
                continue
            told = rng.choice(before)
            free.remove(told)
            turns[told] = render(self.tokenizer, "user", fact.statement)
            turns[2 * pair] = render(self.tokenizer, "user", fact.question)
            turns[2 * pair + 1], value = render_answer(self.tokenizer, fact)
            recall.append((2 * pair + 1, *value))
        return recall

    def __iter__(self) -> Iterator[list[ConversationRow]]:
        while True:
            number, place = divmod(self.served, POOL)
            for batch in self._pool(number)[place:]:
                self.served += 1
                yield batch
