"""The online loop: a conversation that goes on and on in a memory that does not grow with it.

    memory = [sink | slots | recent window]

Turns arrive, raw; when the recent window overflows, its oldest segment is folded into slots and let go of. What is
answered is read raw, and folding waits until the answer is there.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .chat.answers import Answer
from .chat.dialogue import Dialogues, Step
from .chat.messages import Message
from .chat.template import template_of
from .core.compressor import Compressor
from .core.memory import Memory
from .core.reader import Known
from .errors import ConfigError, MemoryFileError
from .files.fingerprint import base_name
from .methods import Method, as_method, open_method
from .methods.accounting import counters, in_words, say_losses
from .methods.answering import written
from .methods.base import segments_of
from .methods.inside import TURNS, Inside, Said, look, read_by, saved, saved_pins
from .methods.picture import picture
from .methods.saved import metadata_of, options_of
from .models.load import load_tokenizer


class Session:
    """One conversation with a compressed memory.

    Args:
        memory: how the conversation is kept: a compressor, or a method that is bound to a model. Any number of
            sessions share it, on any number of threads.
        tokenizer: of the model.
        tools: that the model may call, in the form of chat templates:
            ``{"type": "function", "function": {"name": …, "parameters": …}}``.
        options: of the method, in place of its own. A compressor has slots, sink, window and segment (most tokens
            folded at once); :data:`ccm.methods.default.CHAT` is a good budget for its chats.

    Attributes:
        last: the newest answer, with its thoughts and the calls of tools that it asks for.
        said: the newest turns, each with the beginning of its text and its tokens; for pictures, not for the memory.
        pins: what was pinned, oldest first.

    Example:
        >>> session = ccm.Session.open(model, tokenizer)
        >>> session.append("My cat is called Miso.", role="user")
        >>> session.generate("What is my cat called?", max_new_tokens=20)
    """

    def __init__(
        self,
        memory: Method | Compressor,
        tokenizer: Any,
        *,
        tools: Sequence[dict[str, Any]] = (),
        **options: int | None,
    ):
        chosen = {name: value for name, value in options.items() if value is not None}
        self.method, self.tokenizer = as_method(memory, tokenizer, **chosen), tokenizer
        self.memory: Memory = self.method.empty()
        self.turns = 0
        self.last: Answer | None = None
        self.said: tuple[Said, ...] = ()
        self.pins: tuple[str, ...] = ()
        self.template = template_of(tokenizer)
        self.dialogues = Dialogues(self.template)
        self.dialogue = self.dialogues.begin(tools)
        self._before: Memory | None = self.memory  # from before the open messages, while they may change

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        memory: str | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        **options: int | None,
    ) -> Session:
        """A session on any model, trained for or not.

        Args:
            model: of a supported family.
            tokenizer: of the model; None loads it from where the model is from.
            memory: as ``--memory`` of the command line, such as "snapkv:tokens=256"; None is the best that there is
                for the model (``methods.default``).
            tools: that the model may call, in the form of chat templates.
            options: of the method, in place of its own.

        Raises:
            ConfigError: there is no such memory, or no tokenizer where the model is from.
            MismatchError: an adapter for another model.
            UnsupportedModelError: the model cannot carry a memory.
        """
        if tokenizer is None:
            tokenizer = load_tokenizer(model.name_or_path)
        return cls(open_method(memory, model, tokenizer), tokenizer, tools=tools, **options)

    # ------------------------------------------------------------------ the loop

    def append(
        self, text: str | Message, role: str = "user", *, on_read: Callable[[int, int], None] | None = None
    ) -> None:
        """Take in a turn without answering.

        Args:
            text: what is said, or a whole message, which brings its own role.
            role: who says it.
            on_read: called with how many tokens of the turn are taken in, and how many it has.

        Raises:
            ConfigError: empty text, or a role that the chat template refuses. The session is unchanged.
        """
        message = text if isinstance(text, Message) else Message(role, text)
        with self._as_a_whole():
            self._take(self._step(message), message, on_read=on_read)
            self.turns += 1

    def pin(self, text: str) -> None:
        """Keep a text in front of everything, word for word and for as long as the memory lives.

        It is read once, as system text where the chat template has some. What the memory holds already was read
        without it and stays as it is.

        Raises:
            ConfigError: empty text, or one that does not fit the model's context beside the memory at its largest.
                The session is unchanged.
        """
        pinned = self.method.pin(self.memory, self.dialogues.alone(text))
        self._have_pinned(pinned, (*self.pins, text))

    def pin_as(self, other: Session) -> None:
        """Have pinned what another session with the same memory has, and nothing else."""
        self._have_pinned(other.memory, other.pins)

    def _have_pinned(self, memory: Memory, pins: tuple[str, ...]) -> None:
        self.memory, self.pins = self.memory.pinned_as(memory), pins
        if self._before is not None:
            self._before = self._before.pinned_as(memory)

    def generate(
        self,
        text: str | Message | None = None,
        *,
        role: str = "user",
        streamer: Callable[[str], None] | Any | None = None,
        on_read: Callable[[int, int], None] | None = None,
        **generate_kwargs: Any,
    ) -> str:
        """Append ``text`` if there is any, answer as the assistant, and remember the answer.

        Args:
            text: what is said before the answer, or a whole message.
            role: who says it.
            streamer: a function that is called with each new piece of text, or a transformers streamer. A piece
                that the model thinks and does not say is a :class:`ccm.chat.messages.Thought`.
            on_read: as of :meth:`append`, for what is said.
            generate_kwargs: everything that transformers' ``generate`` takes. The model's
                own settings say how tokens are drawn where nothing else is given (:mod:`ccm.models.generation`);
                ``temperature=0`` takes the likeliest one every time. A ``max_new_tokens`` that does not fit the
                model's context is cut, with a warning.

        Returns:
            the answer, without its thoughts; :attr:`last` has these, too.

        Raises:
            ConfigError: empty text, a place where the chat template has no answer, or a memory that leaves no room
                for one in the model's context. The session is unchanged.
        """
        with self._as_a_whole():
            head = self._asked(text, role, on_read)
            self.last, known = self._written(head, streamer, generate_kwargs)
            self._take(self._step(self.last.message()), self.last.message(), known=known)
            self.turns += 1
            return self.last.content

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """A turn happens as a whole or not at all, also with Ctrl-C at any moment."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def _asked(
        self, text: str | Message | None, role: str, on_read: Callable[[int, int], None] | None = None
    ) -> tuple[int, ...]:
        """Take in what is said before an answer; returns the token ids that the answer is written behind."""
        message = text if isinstance(text, Message) or text is None else Message(role, text)
        step = self.dialogues.answer(self.dialogue) if message is None else self._step(message, answer=True)
        self.dialogues.check_answer(step.dialogue, step.head)
        self._take(step, message, answered=True, on_read=on_read)
        self.turns += message is not None
        return step.head

    def _written(
        self, head: tuple[int, ...], streamer: Any, options: Mapping[str, Any]
    ) -> tuple[Answer, Known | None]:
        tools = bool(self.dialogue.tools)
        return written(self.method, self.memory, self.template, head, tools, streamer, options)

    def _step(self, message: Message, answer: bool = False) -> Step:
        return self.dialogues.add(self.dialogue, message, answer, back=self._before is not None)

    def _take(
        self,
        step: Step,
        message: Message | None,
        answered: bool = False,
        on_read: Callable[[int, int], None] | None = None,
        known: Known | None = None,
    ) -> None:
        """Take in what a message brings; go back to before its exchange if the template writes that anew."""
        before, seen = self._before, self.memory.rows[0].seen
        memory = before if step.anew and before is not None else self.memory
        if step.final is not None:
            before = memory = self._folded(memory, step.final)
        memory = self._folded(memory, step.ids, answered, on_read, known)
        say_losses(self.memory, memory, self.method)
        self.memory, self.dialogue = memory, step.dialogue
        if message is not None:
            turn = Said(message.role, message.content, max(0, memory.rows[0].seen - seen)).shown()
            self.said = (*self.said, turn)[-TURNS:]
        # a second memory is kept only where the template may still change what stands behind it
        if not step.dialogue.open:
            before = memory
        elif not answered and self.dialogues.stands(step.dialogue):
            before = None
        self._before = before

    def _folded(
        self,
        memory: Memory,
        ids: tuple[int, ...],
        answered: bool = False,
        on_read: Callable[[int, int], None] | None = None,
        known: Known | None = None,
    ) -> Memory:
        """The memory with these tokens; those that were read behind it already are not read again."""
        segments, done = segments_of(ids, self.method.longest), 0
        while segments:
            count = self.method.portion(memory.length, segments)
            part, segments = segments[:count], segments[count:]
            read = None if known is None else known.shared(memory, part[0])
            memory = self.method.take_in(memory, [part], answered=[answered and not segments], read=[read])
            done += sum(map(len, part))
            if on_read:
                on_read(done, len(ids))
        return memory

    def stats(self) -> dict[str, int]:
        """What is held, what it stands for, and what full context would hold. Bytes are measured."""
        return {"turns": self.turns, **counters(self.memory, self.method)}

    def inside(self) -> Inside:
        """Which turns each entry of the memory stands for."""
        (row,) = self.method.recall(self.memory).rows
        return look(self.method, row, self.said, pins=self.pins)

    def ask(self, text: str, **generate_kwargs: Any) -> Inside:
        """Write an answer to ``text``, and say which entries it reads. Neither text nor answer is remembered.

        Args:
            text: what the user asks.
            generate_kwargs: as of :meth:`generate`.

        Raises:
            ConfigError: as :meth:`generate`; or the answer is empty.
        """
        twin = self.fork()
        head = twin._asked(text, "user")
        answer = twin._written(head, None, generate_kwargs)[0].content
        if not (ids := self.template.encode(answer)):
            raise ConfigError(f"the model's answer to {text[:40]!r} is empty: ask something else")
        reading = read_by(self.method, twin.memory, head, ids)
        return look(self.method, twin.memory.rows[0], twin.said, reading, answer, self.pins)

    def __repr__(self) -> str:
        name = f"{self.method.title} on {base_name(self.method.reader.model)}"
        return f"<ccm.Session: {name}, {self.turns} turns; {in_words(self.stats())}>"

    def _repr_html_(self) -> str:
        return picture(self.inside(), repr(self)[1:-1])

    # ------------------------------------------------------------------ copies and files

    def fork(self) -> Session:
        """An independent copy: what one is told, the other does not know."""
        return copy.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A fork: web frameworks copy what each visitor begins with, and the model is one for all."""
        return self.fork()

    def reset(self) -> None:
        """Forget everything, also what is pinned."""
        self.memory, self.turns, self.last, self.said, self.pins = self.method.empty(), 0, None, (), ()
        self.dialogue, self._before = self.dialogues.begin(self.dialogue.tools), self.memory

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to one safetensors file, atomically. An older memory file of this name is
        replaced, whichever conversation it held.

        Raises:
            StorageError: it cannot be written, or a file that is no memory is there; that file is intact.
        """
        self.memory.save(path, metadata_of(self.method, self.turns, self.dialogue, self.said, self.pins))

    @classmethod
    def load(cls, path: str | os.PathLike[str], method: Method | Compressor, tokenizer: Any) -> Session:
        """Continue a saved session where it was. An exchange that was open stays as it was taken in, also where the
        template would write it anew (docs/templates.md).

        Raises:
            MemoryFileError: missing, damaged, or a memory without a session.
            MismatchError: made by another model, adapter or method.
        """
        memory, metadata = Memory.load(path)
        method = as_method(method, tokenizer)
        method.check(memory, 1)
        try:
            state = json.loads(metadata["session"])
            session = cls(method, tokenizer, **options_of(state, method))
            session.turns, session.said, session.pins = state["turns"], saved(state), saved_pins(state)
            session.dialogue = session.dialogues.kept(state, memory.rows[0].seen)
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryFileError(f"{path} holds a memory but no session ({error})") from error
        session.memory = session.method.admit(memory)
        session._before = None
        return session
