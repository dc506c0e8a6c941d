"""A dialogue message by message: what each one brings, equal to what the template writes of the whole.

A conversation without end cannot be rendered again at every turn, and a template is a program: it may put the system
text into the last message, drop thoughts of older turns, or end a turn only when another follows. So a message is
rendered behind a short stand-in for what came before, and what is new is the difference:

    rendered     opening | stand-in for the past | open messages | new message | head of the answer
    taken in     <---------- long ago ----------> | <- already -> | <- now ---> | <- read, not kept ->

The *open* messages are the last exchange. The next message shows how the template writes them for good. If that is
not what was taken in (thoughts, say), they are taken in anew, behind the memory from before them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from .messages import Message, ToolCall
from .template import ANSWER, CALL, MORE, QUESTION, Template, Tools, tools_as_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialogue:
    """How far a dialogue has come: what the template needs to know to write the next message.

    Attributes:
        opening: system messages at its head.
        tools: that may be called, in the form of chat templates.
        past: role of the last message before the open ones; "" if there is none.
        open: messages of the last exchange.
        taken: token ids that were taken in since the past, those of the opening among them if there is no past.
    """

    opening: tuple[Message, ...] = ()
    tools: Tools = ()
    past: str = ""
    open: tuple[Message, ...] = ()
    taken: tuple[int, ...] = field(default=(), repr=False)

    @property
    def last(self) -> str:
        """Role of the newest message."""
        return self.open[-1].role if self.open else self.past

    def closed(self) -> Dialogue:
        """The same with its open messages as they were taken in."""
        return replace(self, past=self.last, open=(), taken=() if self.last else self.taken)

    def as_dict(self) -> dict[str, Any]:
        """What a file keeps. Of open messages it holds who spoke and what was called, and not what was said."""
        answered = not self.open or (self.last == "assistant" and not self.open[-1].tool_calls)
        kept = self.closed() if answered else replace(self, open=tuple(map(_without_words, self.open)))
        opening, open_ = ([asdict(message) for message in part] for part in (kept.opening, kept.open))
        return {"opening": opening, "tools": list(kept.tools), "past": kept.past, "open": open_}


def _without_words(message: Message) -> Message:
    calls = tuple(replace(call, arguments=CALL.arguments) for call in message.tool_calls)
    return replace(message, content=MORE if message.content else "", reasoning="", tool_calls=calls)


def _message(tool_calls: Sequence[dict[str, str]] = (), **rest: Any) -> Message:
    return Message(tool_calls=tuple(ToolCall(**call) for call in tool_calls), **rest)


@dataclass(frozen=True)
class Step:
    """What one message brings.

    Attributes:
        dialogue: with the message.
        anew: what was taken in of the open messages does not hold: go back to the memory from before them.
        final: token ids that complete the exchange before; the next step that goes back goes back to behind them.
            None: the exchange goes on.
        ids: token ids of the message.
        head: token ids that the answer is written behind; empty unless one was asked for.
    """

    dialogue: Dialogue
    anew: bool
    final: tuple[int, ...] | None
    ids: tuple[int, ...]
    head: tuple[int, ...] = ()


class Dialogues:
    """Dialogues of one template.

    Args:
        template: of the model.
    """

    def __init__(self, template: Template):
        self.template = template
        self._closings: dict[str, str] = {}

    # ------------------------------------------------------------------ message by message

    def begin(self, tools: Sequence[dict[str, Any]] = ()) -> Dialogue:
        """A dialogue in which nothing was said."""
        return Dialogue(tools=tuple(tools))

    def resume(self, state: dict[str, Any]) -> Dialogue:
        """A dialogue from :meth:`Dialogue.as_dict`.

        Raises:
            KeyError, TypeError, ConfigError: it did not write this, or for another template.
        """
        opening, open_ = (tuple(_message(**message) for message in state[key]) for key in ("opening", "open"))
        dialogue = Dialogue(opening, tuple(state["tools"]), str(state["past"]), open_)
        if open_:
            return replace(dialogue, taken=tuple(self._kept(dialogue, generation=False)[0]))
        return replace(dialogue, taken=() if dialogue.past else tuple(self._head(dialogue)))

    def kept(self, state: Mapping[str, Any], said: int) -> Dialogue:
        """The dialogue of a saved session; of one from before dialogues were saved, whether something was said.

        Raises:
            KeyError, TypeError, ConfigError: as :meth:`resume`.
        """
        if "dialogue" in state:
            return self.resume(state["dialogue"])
        return Dialogue(past="assistant" if said else "")

    def stands(self, dialogue: Dialogue) -> bool:
        """Whether what was taken in of the open messages stays as it is, whatever follows."""
        if not dialogue.open:
            return True
        if dialogue.last == "assistant":
            final = self._final(dialogue)
        else:
            final = self._final(replace(dialogue, open=(*dialogue.open, Message("assistant", ANSWER))))
        return tuple(final[: len(dialogue.taken)]) == dialogue.taken

    def add(self, dialogue: Dialogue, message: Message, answer: bool = False, back: bool = True) -> Step:
        """The next message.

        Args:
            dialogue: that it belongs to.
            message: the new one.
            answer: whether an answer is written behind it.
            back: whether the caller can go back to before the open messages; if not, they stay as they are.

        Raises:
            ConfigError: the template refuses the message, or writes nothing for it.
        """
        step = self._add(dialogue, self.template.fitted(message), answer)
        if step.anew and not back:
            return self._add(dialogue.closed(), self.template.fitted(message), answer)
        return step

    def _add(self, dialogue: Dialogue, message: Message, answer: bool) -> Step:
        if message.role == "system" and not dialogue.last:
            return self._open(dialogue, message, answer)
        if dialogue.tools and not self.template.knows_tools and not dialogue.last:
            dialogue, message = self._tools_as_text(dialogue, message)
        if message.role in ("assistant", "tool") or not dialogue.open:
            return self._onward(dialogue, message, answer)
        try:
            return self._settle(dialogue, message, answer)
        except ConfigError:
            if message.role != dialogue.last:
                raise
            # two messages of one speaker in a row, refused: the second one as if an answer had stood between
            try:
                step = self._onward(replace(dialogue.closed(), past="assistant"), message, answer)
            except ConfigError:
                step = None
            if step is None:
                raise
            log.info("the chat template refuses two messages of %r in a row: each is a turn", message.role)
            text, start = self._whole(dialogue)
            whole = tuple(self.template.part(text, start))
            known = len(dialogue.taken)
            return replace(step, final=whole[known:] if whole[:known] == dialogue.taken else ())

    def answer(self, dialogue: Dialogue) -> Step:
        """Ask for an answer behind the messages so far."""
        if not dialogue.last and not dialogue.opening:
            raise ConfigError("there is nothing to answer: append a message first")
        kept, head = self._kept(dialogue, generation=True)
        return self._step(dialogue, kept, head)

    def check_answer(self, dialogue: Dialogue, head: Sequence[int]) -> None:
        """See that an answer behind this head can be remembered, before it is written.

        Raises:
            ConfigError: the template has no place for an answer here; says why.
        """
        self._whole(replace(dialogue, open=(*dialogue.open, Message("assistant", ANSWER))))
        if not head:
            raise ConfigError(
                "the model's chat template begins no answer behind an answer: append a message first"
            )

    def _open(self, dialogue: Dialogue, message: Message, answer: bool) -> Step:
        """System text at the head; it waits for the first message if the template writes it in there."""
        dialogue = replace(dialogue, opening=(*dialogue.opening, message))
        if answer:
            return self.answer(dialogue)
        if self._lost(replace(dialogue, open=(Message("user", MORE),)), message):
            raise ConfigError(f"the model's chat template writes nothing for a message of {message.role!r}")
        return self._step(dialogue, self._head(dialogue), [])

    def _head(self, dialogue: Dialogue) -> list[int]:
        """Token ids of the opening, as far as they stand before a message is there."""
        if not dialogue.opening:
            return []
        text = self.template.text([*dialogue.opening, Message("user", MORE)], dialogue.tools)
        try:
            alone = self.template.text(dialogue.opening, dialogue.tools)
        except ConfigError:
            return []
        told = self.template.broken(dialogue.opening[-1].content.strip())
        kept = self.template.encode(alone) if text.startswith(alone) and told in alone else []
        return kept if kept == self.template.encode(text)[: len(kept)] else []

    def _onward(self, dialogue: Dialogue, message: Message, answer: bool) -> Step:
        """A message of the exchange that is open."""
        grown = replace(dialogue, open=(*dialogue.open, message))
        if message.role == "assistant" and not message.tool_calls:
            kept, head = self._final(grown), []
            if answer:
                head = self._kept(grown, generation=True)[1]
        else:
            kept, head = self._kept(grown, generation=answer)
        if self._lost(grown, message):
            raise ConfigError(f"the model's chat template writes nothing for a message of {message.role!r}")
        return self._step(grown, kept, head)

    def _settle(self, dialogue: Dialogue, message: Message, answer: bool) -> Step:
        """A message that ends the exchange before it."""
        final = self._final(dialogue, message)
        behind = replace(dialogue.closed(), taken=())
        kept, head = self._kept(replace(behind, open=(message,)), generation=answer)
        if self._lost(replace(behind, open=(message,)), message):
            raise ConfigError(f"the model's chat template writes nothing for a message of {message.role!r}")
        known = len(dialogue.taken)
        anew = dialogue.taken != tuple(final[:known])
        step = self._step(replace(behind, open=(message,)), kept, head)
        return replace(step, anew=anew, final=tuple(final if anew else final[known:]))

    def _step(self, dialogue: Dialogue, kept: list[int], head: list[int]) -> Step:
        """Take in what is kept beyond what was taken."""
        taken, whole = dialogue.taken, tuple(kept)
        anew = whole[: len(taken)] != taken
        return Step(
            replace(dialogue, taken=whole), anew, None, whole if anew else whole[len(taken) :], tuple(head)
        )

    def alone(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that stands in front of any dialogue: system text, or a user's where there is none.

        Raises:
            ConfigError: empty text.
        """
        if not text.strip():
            raise ConfigError("there is nothing to pin: got an empty text")
        with suppress(ConfigError):
            if ids := self.add(self.begin(), Message("system", text)).ids:
                return ids
        return self.add(self.begin(), Message("user", text)).ids

    # ------------------------------------------------------------------ renderings

    def _past(self, dialogue: Dialogue) -> list[Message]:
        """The opening, and a stand-in for what has been said."""
        if not dialogue.past:
            return list(dialogue.opening)
        call = Message("assistant", "", tool_calls=(CALL,))
        said = call if dialogue.past == "tool" else Message("assistant", ANSWER)
        past = [*dialogue.opening, Message("user", QUESTION), said]
        if dialogue.past == "tool":
            return [*past, Message("tool", MORE, tool_call_id=CALL.id, name=CALL.name)]
        return past if dialogue.past == "assistant" else [*past, Message(dialogue.past, MORE)]

    def _whole(self, dialogue: Dialogue, *more: Message, generation: bool = False) -> tuple[str, int]:
        """What the template writes with the open messages and more, and where these begin in it."""
        past = self._past(dialogue)
        text = self.template.text([*past, *dialogue.open, *more], dialogue.tools, generation)
        if not dialogue.past:
            return text, 0
        alone, last = self.template.text(past, dialogue.tools), past[-1].content
        if last not in alone or last not in text:
            raise ConfigError("the model's chat template does not write what was said")
        behind, start = alone[alone.index(last) + len(last) :], text.index(last) + len(last)
        rest = text[start:]
        shared = self.template.common(behind, rest)
        if not shared and rest.startswith(closing := self._closing(dialogue.past)):
            shared = len(closing)
        return text, start + shared

    def _closing(self, role: str) -> str:
        """What ends a turn that another one follows, where the template leaves it out at the end."""
        if role not in self._closings:
            past = self._past(Dialogue(past=role))
            rests = []
            for follower in (Message("user", MORE), Message("assistant", MORE), Message("system", MORE)):
                with suppress(ConfigError):
                    text = self.template.text([*past, follower])
                    rests.append(text[text.index(past[-1].content) + len(past[-1].content) :])
            shared = self.template.common(rests[0], rests[1]) if len(rests) > 1 else 0
            self._closings[role] = rests[0][:shared] if shared else ""
        return self._closings[role]

    def _kept(self, dialogue: Dialogue, generation: bool) -> tuple[list[int], list[int]]:
        """Token ids of the open messages that stay when something follows, and the head of an answer to them."""
        text, start = self._whole(dialogue)
        longer, _ = self._whole(dialogue, generation=True)
        stop = max(start, self.template.common(text, longer))
        kept, whole = self.template.part(longer, start, stop), self.template.part(longer, start)
        if whole[: len(kept)] != kept:  # a token reaches over the end of the message
            kept = kept[: shared(whole, kept)]
        if len(whole) == len(kept) and dialogue.last != "assistant":
            kept = kept[:-1]  # no head: an answer is written behind the message's own last token
        return kept, whole[len(kept) :] if generation else []

    def _final(self, dialogue: Dialogue, following: Message | None = None) -> list[int]:
        """Token ids of the open messages as they stay for good, when a message of another exchange follows."""
        message = following or Message("user", MORE)
        behind = replace(dialogue.closed(), taken=())
        try:
            text, start = self._whole(dialogue, message)
            next_text, next_start = self._whole(behind, message)
        except ConfigError:
            if following is not None:
                raise
            return self._kept(dialogue, generation=False)[0]
        tail = next_text[next_start:]
        if not text.endswith(tail) or len(text) - len(tail) < start:
            return self._kept(dialogue, generation=False)[0]
        return self.template.part(text, start, len(text) - len(tail))

    def _lost(self, dialogue: Dialogue, message: Message) -> bool:
        """Whether the template drops what the message says."""
        said = self.template.broken(message.content.strip())
        text, _ = self._whole(dialogue)
        if not said or said in text or message.tool_calls:  # beside calls, some templates write no text
            return False
        other = replace(message, content=message.content + " " + MORE)
        opening = tuple(other if m is message else m for m in dialogue.opening)
        changed = tuple(other if m is message else m for m in dialogue.open)
        return self._whole(replace(dialogue, opening=opening, open=changed))[0] == text

    def _tools_as_text(self, dialogue: Dialogue, message: Message) -> tuple[Dialogue, Message]:
        """Tools in the system text, or before the first message if there is no such role."""
        told = tools_as_text(dialogue.tools)
        before = "\n\n".join([*(m.content for m in dialogue.opening), told])
        opened = replace(dialogue, opening=(Message("system", before),))
        try:
            self._whole(replace(opened, open=(message,)))
        except ConfigError:
            return dialogue, replace(message, content=f"{told}\n\n{message.content}")
        return opened, message


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many token ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
