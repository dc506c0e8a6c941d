"""Rows of segments; those of conversations have one turn a segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..chat.messages import Message
from ..chat.turns import RenderedTurn, render_messages
from .conversation import Conversation


@dataclass(frozen=True)
class ConversationRow:
    """Segments as tokens: turns of a conversation, demonstrations, profile items or stretches of text.

    Attributes:
        conversation: where the row comes from (a conversation, task, user or book), as a readable id.
        segments: ``segments[i]`` are the ids of segment i.
        content: ``content[i]`` are the columns of it that are scored, (start, stop); (k, k) is none. A segment's
            first token does not count, because no live token stands before it.
        recall: (segment, start, stop) of what can only be known from earlier ones: planted facts, labels, ratings.
    """

    conversation: str
    segments: tuple[tuple[int, ...], ...]
    content: tuple[tuple[int, int], ...]
    recall: tuple[tuple[int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(map(len, self.segments))


def render_turns(
    conversation: Conversation, tokenizer: Any, max_turn_tokens: int | None = 128
) -> list[RenderedTurn]:
    """Every turn as tokens; the content of a very long turn is cut to ``max_turn_tokens``."""
    turns = []
    said = [turn.message or Message(turn.role, turn.text) for turn in conversation.turns]
    for rendered in render_messages(tokenizer, said):
        start, stop = rendered.content
        if max_turn_tokens is not None and stop - start > max_turn_tokens:
            ids = (*rendered.ids[: start + max_turn_tokens - 1], *rendered.ids[stop - 1 :])
            rendered = RenderedTurn(ids, (start, start + max_turn_tokens))
        turns.append(rendered)
    return turns


def answers(content: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """The scored columns of every segment as what only earlier segments tell: labels and ratings."""
    return tuple((index, *columns) for index, columns in enumerate(content))


def row(
    conversation: str, turns: Sequence[RenderedTurn], recall: Sequence[tuple[int, int, int]] = ()
) -> ConversationRow:
    """A row of rendered turns, a segment each."""
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
