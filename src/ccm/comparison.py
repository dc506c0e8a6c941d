"""One question, answered three ways: from the memory, from all that was said, and from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .chat.messages import Message
from .methods import get_method
from .session import Session

Way = Literal["memory", "full", "none"]
#: The three ways, and what each one reads, in words.
WAYS: dict[Way, str] = {"memory": "the memory", "full": "full context", "none": "nothing"}


@dataclass(frozen=True)
class Compared:
    """One of the three answers.

    Attributes:
        text: the answer.
        kv_bytes: bytes of the keys and values of the past that it was answered from.
        cut: whether the limit of new tokens has ended it.
    """

    text: str
    kv_bytes: int
    cut: bool = False


class Comparison:
    """A conversation in a memory, beside the same one in full context and beside nothing.

    Args:
        session: the conversation. No question changes it.

    Example:
        >>> said = [ccm.Message("user", "My dog is called Biscuit.")]
        >>> session.append(said[0])
        >>> ccm.Comparison(session).ask("What is my dog called?", said)["memory"].text
    """

    def __init__(self, session: Session):
        self.session = session
        self._read: list[Message] = []  # what the full context holds, behind what is pinned
        self._full = self._on("full")

    def ask(
        self,
        question: str,
        said: Sequence[Message],
        *,
        ways: Sequence[Way] = tuple(WAYS),
        seed: int | None = None,
        on_answer: Callable[[Way, Compared], None] = lambda way, answer: None,
        **generate_kwargs: Any,
    ) -> dict[Way, Compared]:
        """Ask one question in every way.

        Args:
            question: of the user.
            said: all messages of the conversation so far, which a session does not keep. The full context reads
                those that are new.
            ways: some of :data:`WAYS`.
            seed: of every answer, where it is drawn.
            on_answer: called with each answer as soon as it is there.
            generate_kwargs: as of :meth:`ccm.Session.generate`.

        Raises:
            ConfigError: as :meth:`ccm.Session.generate`; or the full context no longer fits the model's.
        """
        answers: dict[Way, Compared] = {}
        for way in ways:
            asked = self._past(way, said)
            held = asked.stats()["nbytes"]
            if seed is not None:
                torch.manual_seed(seed)
            text = asked.generate(question, **generate_kwargs)
            answers[way] = Compared(text, held, bool(asked.last and asked.last.cut))
            on_answer(way, answers[way])
        return answers

    def _past(self, way: Way, said: Sequence[Message]) -> Session:
        """A session of its own that holds what this way reads."""
        if way == "memory":
            return self.session.fork()
        if way == "none":
            return self._on("none")
        gone = self._read != list(said[: len(self._read)])  # something was taken back
        if gone or self._full.pins != self.session.pins:
            self._full, self._read = self._on("full"), []
        for message in said[len(self._read) :]:
            self._full.append(message)
            self._read.append(message)
        return self._full.fork()

    def _on(self, name: str) -> Session:
        session = self.session
        method = get_method(name).bind(session.method.reader.model, session.tokenizer)
        made = Session(method, session.tokenizer)
        for text in session.pins if name == "full" else ():
            made.pin(text)
        return made
