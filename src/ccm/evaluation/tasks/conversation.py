"""Conversations: after t turns, how well is the next turn foreseen?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...data.chitchat import ChitChat, load_chitchat
from ...data.conversation import Conversation
from ...data.hub import DailyDialog, HubConversations, Soda
from ...data.rows import ConversationRow, render_turns, row
from ...data.topical_chat import TopicalChat, load_topical_chat
from ...errors import DataError
from ..items import Item, Likelihood
from .base import EvalTask, register_task
from .choosing import by_length, check_steps

#: So many conversations of the hub are looked through for long ones.
HUB_CONVERSATIONS = 10_000


@dataclass(frozen=True)
class ConversationTask(EvalTask):
    """Items of conversations: one turn a segment, and the content of the next turn is scored.

    Conversations that reach the last step come first, and of those one of every speaker before the second of any.

    Attributes:
        steps: turns that have been said before the one that is scored.
    """

    metrics = ("nll",)
    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @abstractmethod
    def conversations(self, tokenizer: Any) -> Sequence[Conversation]:
        """All held-out conversations, always in the same order."""

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        talks = [talk for talk in self.conversations(tokenizer) if len(talk.turns) > self.steps[0]]
        if not talks:
            raise DataError(
                f"{self.name} has no conversation of more than {self.steps[0]} turns: lower the steps"
            )
        ordered = by_length(talks, lambda talk: len(talk.turns) > self.steps[-1], lambda talk: talk.users)
        for talk in ordered[:limit]:
            yield conversation_item(talk, tokenizer, self.steps)


def conversation_item(talk: Conversation, tokenizer: Any, steps: Sequence[int]) -> Item:
    """One turn a segment; at each step that is shorter than the conversation the next turn is asked for."""
    return row_item(row(talk.id, render_turns(talk, tokenizer)), steps)


def row_item(row: ConversationRow, steps: Sequence[int]) -> Item:
    """The same of a conversation in tokens."""
    asked = [t for t in steps if t < len(row.segments)]
    queries = {t: (Likelihood(row.segments[t], row.content[t]),) for t in asked}
    return Item(row.conversation, row.segments[: asked[-1]], queries)


@register_task
@dataclass(frozen=True)
class ChitChatTask(ConversationTask):
    """Small talk of people who are in no training split."""

    name, title = "conversation", "The next turn of small talk (Chit-Chat Challenge)"
    licence, origin = ChitChat.licence, ChitChat.origin

    def conversations(self, tokenizer: Any) -> Sequence[Conversation]:
        return load_chitchat("test")


@register_task
@dataclass(frozen=True)
class TopicalChatTask(ConversationTask):
    """Dialogs about a given topic."""

    name, title = "topical-chat", "The next turn of a dialog about a given topic (Topical-Chat)"
    licence, origin = TopicalChat.licence, TopicalChat.origin

    def conversations(self, tokenizer: Any) -> Sequence[Conversation]:
        return load_topical_chat()["test"]


@dataclass(frozen=True)
class HubTask(ConversationTask):
    """Conversations of the model hub, which name no speakers.

    Attributes:
        steps: see :class:`ConversationTask`; these dialogs are short.
    """

    source: ClassVar[type[HubConversations]]
    steps: tuple[int, ...] = (0, 1, 2, 4, 8)

    def conversations(self, tokenizer: Any) -> Sequence[Conversation]:
        return self.source(tokenizer, limit=HUB_CONVERSATIONS).conversations("test")


@register_task
@dataclass(frozen=True)
class DailyDialogTask(HubTask):
    """Everyday dialogs, from a model hub."""

    name, title = "daily-dialog", "The next turn of an everyday dialog (DailyDialog, as in the paper)"
    source = DailyDialog
    licence, origin = DailyDialog.licence, f"hub {DailyDialog.hub}"


@register_task
@dataclass(frozen=True)
class SodaTask(HubTask):
    """Social dialogs written by a model, from a model hub."""

    name, title = "soda", "The next turn of a social dialog written by a model (SODA)"
    source = Soda
    licence, origin = Soda.licence, f"hub {Soda.hub}"
