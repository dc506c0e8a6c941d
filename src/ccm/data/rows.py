"""Rows of segments; those of conversations have one turn a segment."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import RenderedTurn, render
from .conversation import Conversation
from .planting import echo, plant_facts


@dataclass(frozen=True)
class ConversationRow:
    """Segments as tokens: turns of a conversation, demonstrations, profile items or stretches of text.

    Attributes:
        conversation: where the row comes from (a conversation, task, user or book), as a readable id.
        segments: ``segments[i]`` are the ids of segment i.
        content: ``content[i]`` are the columns of it that are scored, (start, stop); (k, k) is none. A segment's
            first token is never among them, because no live token stands before it.
        recall: (segment, start, stop) of what can only be known from an earlier one: the values of planted facts.
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
        facts: share of rows with planted facts that are asked for later, one in five turns.
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
                echo(part, rng)
            if rng.random() < self.facts:
                recall = plant_facts(part, self.tokenizer, rng)
            rows.append(row(name, part, recall))
        rows.sort(key=lambda r: r.tokens)
        cut = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(cut)
        return cut

    def __iter__(self) -> Iterator[list[ConversationRow]]:
        while True:
            number, place = divmod(self.served, POOL)
            for batch in self._pool(number)[place:]:
                self.served += 1
                yield batch
