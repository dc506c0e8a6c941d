"""What every engine has in common: jobs go in, pieces of text and new memories come out.

    job     = memory + segments to take in + prompt to answer behind
    ticket  = engine.submit(job, listener)        listener(event) is called on the engine's thread
    events  = piece of text, ..., Result          or one exception; nothing after that

An engine knows nothing of users, sessions and stores: it gets a memory and gives one back.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from ...core.memory import Memory
from ...errors import CCMError, ConfigError
from ...methods.inside import Reading
from ...models.generation import Drawing, drawing

#: Most tokens that one answer may have, whatever the model's context.
LONGEST_ANSWER = 1 << 15
#: Most characters of a text that ends an answer: it is looked for after every token.
LONGEST_STOP = 256


class EngineError(CCMError):
    """The engine failed on this job, or has stopped; the memory that it began with is as it was."""


class OverloadedError(CCMError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which it may be worth another try.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class StoppingError(OverloadedError):
    """The server is about to stop and takes no new turns."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is written. What is None is as the model's own settings say (:mod:`ccm.models.generation`).

    Attributes:
        max_tokens: at most so many.
        temperature: 0 takes the likeliest token every time.
        top_p, top_k, min_p: which tokens are drawn from, see :class:`~ccm.models.generation.Drawing`.
        seed: the same one gives the same answer; None draws one.
        stop: texts that end the answer; they are not part of it.
        frequency_penalty, presence_penalty: taken off the logits of tokens of the answer so far, per occurrence and
            once.
        repetition_penalty: logits of tokens of prompt and answer are divided by it (multiplied where negative).
        schema: JSON schema, as text, that the answer matches; None leaves it free.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    schema: str | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_tokens", 1, LONGEST_ANSWER),
            ("temperature", 0, 2),
            ("top_p", 0, 1),
            ("top_k", 0, 1 << 31),
            ("min_p", 0, 1),
            ("frequency_penalty", -2, 2),
            ("presence_penalty", -2, 2),
            ("repetition_penalty", 0.1, 10),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name}: got {value}, expected {least} to {most}")
        if len(self.stop) > 16 or not all(0 < len(text) <= LONGEST_STOP for text in self.stop):
            raise ConfigError(
                f"stop: got {len(self.stop)} texts, expected up to 16 of 1 to {LONGEST_STOP} characters"
            )

    def drawing(self, own: Drawing) -> Drawing:
        """How tokens are drawn by a model that has these settings of its own."""
        return drawing(own, vars(self))


@dataclass(frozen=True)
class Kept:
    """What an answer leaves in the memory.

    Attributes:
        segments: token ids to take in, each at most ``Method.longest`` long.
        memory: behind which; None: the one that the answer was written behind.
    """

    segments: tuple[tuple[int, ...], ...]
    memory: Memory | None = None


@dataclass(frozen=True)
class Job:
    """One turn of one conversation.

    Attributes:
        memory: of one conversation; what the turn begins with.
        segments: token ids that are taken in before the answer, each at most ``Method.longest`` long.
        pins: token ids of texts that are pinned before all that.
        prompt: token ids that the answer follows, read beside the memory; empty: nothing is written.
        sampling: of the answer.
        remember: what becomes of the answer, from its text; None: it is not taken in. It is called on the engine's
            thread.
        answer: token ids of an answer that is there already. None is written, and the result says what it reads.
    """

    memory: Memory
    segments: tuple[tuple[int, ...], ...] = ()
    prompt: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    remember: Callable[[str], Kept] | None = None
    answer: tuple[int, ...] = ()
    pins: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        memory: with everything taken in.
        text: the answer, whole, with marks of thoughts and calls.
        finish_reason: "stop", "length", or "stopped" after :meth:`Ticket.finish`.
        tokens: of the answer.
        reading: what the answer of the job reads, if it has one.
    """

    memory: Memory
    text: str = ""
    finish_reason: str = "stop"
    tokens: int = 0
    reading: Reading | None = None


Event = str | Result | Exception
Listener = Callable[[Event], None]


class Ticket:
    """A job from outside.

    Args:
        wake: tells the engine to look at its jobs.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._cancelled, self._finished = threading.Event(), threading.Event()
        self._wake = wake

    def cancel(self) -> None:
        """Stop the job soon; its listener hears nothing more."""
        self._cancelled.set()
        self._wake()

    def finish(self) -> None:
        """End the answer soon, with what is written by then; its listener hears the result."""
        self._finished.set()
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether the job was called off."""
        return self._cancelled.is_set()

    @property
    def finished(self) -> bool:
        """Whether the listener has heard the end."""
        return self._finished.is_set()


class Engine(ABC):
    """Runs many jobs at a time; :meth:`submit` may be called from any thread."""

    @abstractmethod
    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Take a job.

        Args:
            job: what to do.
            listener: hears the events of the job, on the engine's thread: it must be quick and must not raise.

        Raises:
            OverloadedError: too many jobs are waiting.
            EngineError: the engine has stopped.
            ConfigError: the job can never fit into the model's context.
        """

    def check(self, sampling: Sampling) -> None:  # noqa: B027, most have nothing to say
        """Whether answers can be written so; may take a second, hence not on an event loop's thread.

        Raises:
            ConfigError: a schema that cannot be followed.
            MissingPackageError: what follows schemas is not installed.
        """

    @abstractmethod
    def idle_seconds(self) -> float:
        """Seconds since the engine last showed that it is alive; large: it hangs or is dead."""

    @abstractmethod
    def close(self) -> None:
        """Stop; jobs that are running end with an EngineError."""
