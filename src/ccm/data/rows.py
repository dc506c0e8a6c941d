"""Conversations as rows of segments: one turn, one segment."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import RenderedTurn, render
from .chitchat import Conversation
from .facts import draw_facts


@dataclass(frozen=True)
class ConversationRow:
    """Turns as tokens. ``segments[i]`` are the ids of turn i, ``content[i]`` the columns that are scored."""

    conversation: str
    segments: tuple[tuple[int, ...], ...]
    content: tuple[tuple[int, int], ...]

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


def row(conversation: str, turns: Sequence[RenderedTurn]) -> ConversationRow:
    return ConversationRow(conversation, tuple(t.ids for t in turns), tuple(t.content for t in turns))


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
        facts: share of rows with planted facts, one of which is asked for at the end.
        seed: of the order.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Any,
        turns: Sequence[int],
        batch: int,
        facts: float = 0.0,
        seed: int = 0,
    ):
        self.rendered = [
            (c.id, render_turns(c, tokenizer)) for c in conversations if len(c.turns) >= min(turns)
        ]
        self.tokenizer, self.turns, self.batch, self.facts, self.seed = tokenizer, turns, batch, facts, seed
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
            part = turns[start : start + length]
            rows.append(row(name, self._plant(part, rng) if rng.random() < self.facts else part))
        rows.sort(key=lambda r: r.tokens)
        cut = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(cut)
        return cut

    def _plant(self, turns: list[RenderedTurn], rng: random.Random) -> list[RenderedTurn]:
        """Replace up to three turns by facts, and the last two by a question and its answer."""
        facts = draw_facts(rng, "train", rng.randint(1, min(3, len(turns) - 2)))
        planted = list(turns)
        places = rng.sample(range(len(turns) - 2), len(facts))
        for place, fact in zip(places, facts, strict=True):
            planted[place] = render(self.tokenizer, "user", fact.statement)
        asked = rng.choice(facts)
        planted[-2] = render(self.tokenizer, "user", asked.question)
        planted[-1] = render(self.tokenizer, "assistant", asked.answer_with(asked.value) + ".")
        return planted

    def __iter__(self) -> Iterator[list[ConversationRow]]:
        while True:
            number, place = divmod(self.served, POOL)
            for batch in self._pool(number)[place:]:
                self.served += 1
                yield batch
