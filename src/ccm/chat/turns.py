"""Single turns as token ids, for data: the pieces of :mod:`ccm.chat.dialogue`, without a dialogue to keep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..errors import ConfigError
from .dialogue import Dialogue, Dialogues, shared
from .messages import Message
from .template import MORE, Template, template_of

_MARK = "Stand-in content 0."
#: Whom a role follows, if it is not an answer.
_USUAL = {"assistant": "user"}


@dataclass(frozen=True)
class RenderedTurn:
    """One turn of a dialogue.

    Attributes:
        ids: all token ids of the turn.
        content: (start, stop) of what the speaker said and of the token that ends the turn: what is scored.
    """

    ids: tuple[int, ...]
    content: tuple[int, int]


class Turns(Dialogues):
    """Turns of one template, each behind a stand-in for what came before."""

    def __init__(self, template: Template):
        super().__init__(template)
        self._frames: dict[tuple[str, str], tuple[str, str, str]] = {}
        self._contexts: dict[str, list[int]] = {}

    def turn(self, role: str, text: str, past: str | None = None) -> RenderedTurn:
        """A turn behind one of ``past``: by default an answer follows a user, and all others follow an answer; "" is
        the begin of a dialogue. Where the template refuses that, it is as behind the usual one.

        Raises:
            ConfigError: empty text, or a role that the template does not know.
        """
        if not text.strip():
            raise ConfigError(f"a turn of {role!r} has no text; give at least one character")
        before, head, tail = self._frame(role, _USUAL.get(role, "assistant") if past is None else past)
        said = self.template.broken(text)
        start, content, whole = before, before + head, before + head + said + tail
        ids = self.template.encode(whole)
        first = shared(ids, self._context(start))
        begin = shared(ids, self._context(content))
        end = shared(ids, self.template.encode(content + said)) if tail else len(ids)
        return RenderedTurn(tuple(ids[first:]), (begin - first, min(end + bool(tail), len(ids)) - first))

    def asked(self, text: str) -> tuple[int, ...]:
        """A question of the user behind an answer, and the head of the answer to it."""
        dialogue = Dialogue(past="assistant", open=(Message("user", text),))
        kept, head = self._kept(dialogue, generation=True)
        return (*kept, *head)

    @cached_property
    def head(self) -> list[int]:
        """Token ids that an answer to a user is written behind."""
        return self._kept(Dialogue(past="assistant", open=(Message("user", MORE),)), generation=True)[1]

    @cached_property
    def tail(self) -> list[int]:
        """Token ids that end an answer in a dialogue."""
        return self.template.encode(self._frame("assistant", "user")[2]) or [
            self.template.tokenizer.eos_token_id
        ]

    def _context(self, text: str) -> list[int]:
        if text not in self._contexts:
            self._contexts[text] = self.template.encode(text)
        return self._contexts[text]

    def _frame(self, role: str, past: str) -> tuple[str, str, str]:
        """What the template writes before a turn of the role, and around its content."""
        if (role, past) not in self._frames:
            self._frames[role, past] = self._framed(role, past)
        return self._frames[role, past]

    def _framed(self, role: str, past: str) -> tuple[str, str, str]:
        message = Message(role, _MARK)
        dialogue = Dialogue(past=past, open=(message,))
        try:
            text, start = self._whole(dialogue)
            try:
                longer, _ = self._whole(dialogue, Message("user", MORE))
            except ConfigError:
                longer, _ = self._whole(dialogue, generation=True)
        except ConfigError:
            usual = _USUAL.get(role, "assistant")
            if past == usual:
                raise
            return self._framed(role, usual)
        if _MARK not in text or _MARK not in longer:
            raise ConfigError(f"the model's chat template writes nothing for a message of {role!r}")
        at = longer.index(_MARK)
        behind = longer[at + len(_MARK) :]
        shared = self.template.common(text[text.index(_MARK) + len(_MARK) :], behind)
        if not shared and behind.startswith(closing := self._closing(role)):
            shared = len(closing)
        return longer[:start], longer[start:at], behind[:shared]


def turns_of(tokenizer: Any) -> Turns:
    """The turns of a tokenizer's template; made once."""
    return _turns(template_of(tokenizer))


@lru_cache(maxsize=32)
def _turns(template: Template) -> Turns:
    return Turns(template)


def render(tokenizer: Any, role: str, text: str, past: str | None = None) -> RenderedTurn:
    """One turn: see :meth:`Turns.turn`."""
    return turns_of(tokenizer).turn(role, text, past)


def render_dialogue(tokenizer: Any, said: Sequence[tuple[str, str]]) -> list[RenderedTurn]:
    """The turns (role, text) of a dialogue from its begin, each with what the template adds to it."""
    turns = turns_of(tokenizer)
    past = ["", *(role for role, _ in said)]
    return [turns.turn(role, text, before) for before, (role, text) in zip(past, said, strict=False)]


def render_messages(tokenizer: Any, messages: Sequence[Message]) -> list[RenderedTurn]:
    """The messages of a dialogue from its begin, tools among them; all of a call or a result is scored.

    A message that the template writes into the next one has no turn of its own.
    """
    if not any(message.tool_calls or message.role == "tool" for message in messages):
        with suppress(ConfigError):  # no frame of its own for system text, say
            return render_dialogue(tokenizer, [(message.role, message.content) for message in messages])
    turns = turns_of(tokenizer)
    dialogue, rendered = turns.begin(), []
    for message in messages:
        step = turns.add(dialogue, message.without_thoughts(), back=False)
        ids = (*(step.final or ()), *step.ids)
        if ids:
            rendered.append(RenderedTurn(ids, (min(1, len(ids) - 1), len(ids))))
        dialogue = step.dialogue
    return rendered
