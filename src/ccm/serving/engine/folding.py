"""What engines share that fold on this machine: one thread takes in segments and keeps track of every job.

How answers are written is left to a subclass: on the same model (``padded``), or elsewhere (``ccm.serving.vllm``).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from ...chat.template import answer_ends, template_of
from ...chat.writer import Writer
from ...core.memory import Memory
from ...core.reader import Known
from ...errors import ConfigError
from ...methods import Method
from ...methods.answering import BEHIND
from ...methods.inside import Reading, read_by
from ...models.generation import own_drawing
from ..metrics import Metrics
from .base import Engine, EngineError, Job, Listener, OverloadedError, Result, Ticket
from .resting import rest, wake

log = logging.getLogger(__name__)

#: Seconds that the thread sleeps at most while answers are written elsewhere, so that it shows that it is alive.
_PULSE = 1.0


@dataclass(eq=False)
class Running:
    """A job that the engine works on; ``prompt`` empties when its answer begins.

    ``known`` is what was read to write the answer, once that is complete; ``read`` what one that was given reads.
    ``memory`` is at rest (``resting``) while the job waits, and while an answer is written.
    """

    job: Job
    ticket: Ticket
    listener: Listener
    writer: Writer
    submitted: float
    memory: Memory
    segments: list[tuple[int, ...]]
    prompt: list[int]
    pins: list[tuple[int, ...]]
    token: int = -1
    finish_reason: str = ""
    known: Known | None = None
    last: float = field(default=0.0)
    read: Reading | None = None


R = TypeVar("R", bound=Running)


class FoldingEngine(Engine, Generic[R]):
    """Many conversations under one method.

    Args:
        method: bound to a model; other threads may use it as well.
        tokenizer: of the model.
        rows: conversations that are worked on at once.
        waiting: jobs that may wait for a place beside them.
        context: most positions of memory, prompt and answer.
        metrics: where it counts.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Any,
        *,
        rows: int,
        waiting: int,
        context: int,
        metrics: Metrics | None,
    ):
        if rows < 1 or waiting < 0:
            raise ConfigError(f"engine: got rows={rows} and waiting={waiting}, expected at least 1 and 0")
        self.method, self.tokenizer, self.context = method, tokenizer, context
        self.rows, self.most = rows, rows + waiting
        self.metrics = metrics or Metrics()
        self.template = template_of(tokenizer)
        self._ends, self._end_texts = answer_ends(tokenizer, method.reader.model)
        self.own = own_drawing(method.reader.model)
        self._inbox: queue.SimpleQueue[R | Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs = 0  # submitted and not finished
        self._closed = False
        self._beat = time.monotonic()
        self._waiting: deque[R] = deque()
        self._active: list[R] = []
        self._writing: list[R] = []  # their answers have begun
        self._threads = torch.get_num_threads()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="ccm-engine", daemon=True)
        self._thread.start()
        self._begun.wait()

    # ------------------------------------------------------------------ what a subclass does

    @abstractmethod
    def _accept(self, **common: Any) -> R:
        """A job's state, from the fields of :class:`Running`."""

    @abstractmethod
    def _answer(self) -> None:
        """One round of answers: begin those of jobs in ``_active`` with a prompt and no segments left."""

    @abstractmethod
    def _stop(self, gone: Sequence[R]) -> None:
        """Let go of answers that are in ``_writing`` and will not go on."""

    def _known(self, running: R) -> Known | None:
        """What an answer in ``_writing`` has read behind its memory, if that is on this machine."""
        return None

    def _lost(self, rows: list[R]) -> list[R]:
        """The jobs that cannot go on after a step has failed for some."""
        return rows

    def _can_wait(self) -> bool:
        """Whether there is nothing to do on this thread until something comes in."""
        return not self._active

    # ------------------------------------------------------------------ from other threads

    def submit(self, job: Job, listener: Listener) -> Ticket:
        self.method.check(job.memory, 1)
        least = len(job.prompt) + (len(job.answer) or 1 if job.prompt else 0)
        if least > self.context:
            raise ConfigError(
                f"the prompt has {len(job.prompt)} tokens, the model's context is {self.context}: shorten it, or "
                "name a conversation, whose past is folded"
            )
        for ids in (*job.pins, *job.segments, job.prompt, job.answer):
            if ids:
                self.method.reader.check_ids(torch.tensor(ids))
        job = replace(job, memory=rest(job.memory))
        running = self._accept(
            job=job,
            ticket=Ticket(lambda: self._inbox.put(lambda: None)),
            listener=listener,
            writer=Writer(self.template.decode, (*job.sampling.stop, *self._end_texts)),
            submitted=time.monotonic(),
            memory=job.memory,
            segments=list(job.segments),
            prompt=list(job.prompt),
            pins=list(job.pins),
        )
        with self._lock:
            if self._closed:
                raise EngineError("the engine has stopped")
            if self._jobs >= self.most:
                self.metrics.refused.inc()
                raise OverloadedError(
                    f"{self._jobs} turns are running or waiting, the limit is {self.most}: try again later",
                    retry_after=1 + self._jobs // self.rows,
                )
            self._jobs += 1
            self.metrics.jobs.set(self._jobs)
            self._inbox.put(running)
        return running.ticket

    def idle_seconds(self) -> float:
        return 0.0 if not self._jobs and self._thread.is_alive() else time.monotonic() - self._beat

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)  # the setting is one of each thread,
        torch.get_num_threads()  # which has it once it has asked, whatever others set later
        self._begun.set()
        with torch.inference_mode():  # to the end: who leaves a batch of several writes into its tensors
            try:
                while self._admit():
                    self._beat = time.monotonic()
                    self._round()
            finally:
                self._end_all()

    def _end_all(self) -> None:
        """Tell every job that is here that the engine has stopped."""
        with self._lock:
            self._closed = True
        while not self._inbox.empty():
            if isinstance(item := self._inbox.get(), Running):
                self._waiting.append(item)
        for running in [*self._active, *self._waiting]:
            self._leave(running, EngineError("the engine stopped during this turn; nothing of it is kept"))

    def _round(self) -> None:
        for running in [r for r in (*self._active, *self._waiting) if r.ticket.cancelled]:
            self._leave(running)
        self._do(self._pin, [r for r in self._active if r.pins])
        self._do(self._take_in, self._foldable())
        for running in self._to_end():
            running.prompt, running.finish_reason = [], "stopped"
            self._end([running])
        for running in [r for r in self._active if r.job.answer and r.prompt and not r.segments]:
            self._do(self._look, [running])
        self._answer()
        for running in [r for r in self._active if not (r.segments or r.prompt or r in self._writing)]:
            self._finish(running)

    def _admit(self) -> bool:
        """Hear other threads, wait for them if there is nothing to do, and let jobs in; false at the end."""
        while True:
            try:
                item = self._inbox.get(self._can_wait() and not self._waiting_fits(), _PULSE)
            except queue.Empty:
                break
            if item is None:
                return False
            if isinstance(item, Running):
                self._waiting.append(item)
            elif not self._closed:  # an answer may not come to its end while the engine does
                item()
        while self._waiting_fits():
            running = self._waiting.popleft()
            self.metrics.waited.observe(time.monotonic() - running.submitted)
            self._active.append(running)
        return not self._closed

    def _to_end(self) -> list[R]:
        """Jobs that were told to end their answer, once all that stands before it is taken in."""
        told = [running for running in self._active if running.ticket.finished and not running.segments]
        return [running for running in told if running.prompt or running in self._writing]

    def _waiting_fits(self) -> bool:
        return bool(self._waiting) and len(self._active) < self.rows

    def _do(self, step: Callable[[list[R]], None], rows: list[R]) -> None:
        """One step for some jobs; if it fails, they have failed, and the others go on."""
        if not rows:
            return
        try:
            step(rows)
        except Exception as error:  # whatever it is, the engine must live
            log.exception("a step failed for %d turns", len(rows))
            for running in self._lost(rows):
                self._leave(running, EngineError(f"the model failed on this turn ({type(error).__name__})"))

    def _leave(self, running: R, event: Result | Exception | None = None) -> None:
        """Let go of a job and tell it how it ended; None: it was cancelled."""
        (self._active if running in self._active else self._waiting).remove(running)
        if running in self._writing:
            self._stop([running])
        with self._lock:
            self._jobs -= 1
            self.metrics.jobs.set(self._jobs)
        if running.ticket.cancelled:
            self.metrics.cancelled.inc()
        elif event is not None:
            running.listener(event)

    # ------------------------------------------------------------------ steps

    def _pin(self, rows: list[R]) -> None:
        """What is to be pinned."""
        for running in rows:
            try:
                for ids in running.pins:
                    running.memory = self.method.pin(running.memory, ids)
                running.pins = []
            except ConfigError as error:  # it does not fit the context
                self._leave(running, error)

    def _foldable(self) -> list[R]:
        """Jobs with segments that fit into one pass; those whose memory has no room for their next one have left."""

        def needs(rows: Sequence[R]) -> int:
            parts = [self._portion(r) for r in rows]
            return (
                max(r.memory.length for r in rows)
                + max(sum(map(len, part)) for part in parts)
                + max(map(len, parts)) * self.method.behind
            )

        chosen: list[R] = []
        for running in [r for r in self._active if r.segments]:
            if needs([running]) > self.context:
                full = f"the conversation's memory of {running.memory.length} positions fills the model's context of "
                advice = "begin a new one, or serve an adapter that merges"
                self._leave(running, ConfigError(f"{full}{self.context}: {advice}"))
            elif needs([*chosen, running]) <= self.context:
                chosen.append(running)
        return chosen

    def _portion(self, running: R) -> list[tuple[int, ...]]:
        """The segments of a job that are taken in next."""
        return running.segments[: self.method.portion(running.memory.length, running.segments)]

    def _take_in(self, rows: list[R]) -> None:
        """The next segments of every job that has some."""
        began = time.monotonic()
        before = [running.memory for running in rows]
        parts = [self._portion(running) for running in rows]
        known = [
            r.known.shared(r.memory, part[0]) if r.known else None
            for r, part in zip(rows, parts, strict=True)
        ]
        for running, part in zip(rows, parts, strict=True):
            del running.segments[: len(part)]
        answered = [bool(running.prompt) and not running.segments for running in rows]
        memory = self.method.take_in(Memory.stack(before), parts, answered=answered, read=known)
        for i, running in enumerate(rows):
            running.memory = rest(memory[i]) if answered[i] else memory[i]
            running.known = None
        self.metrics.folding.observe(time.monotonic() - began)
        self.metrics.folded.inc(memory.tokens - sum(m.tokens for m in before))

    def _look(self, rows: list[R]) -> None:
        """See what an answer that is there reads."""
        for running in rows:
            try:
                running.read = read_by(self.method, running.memory, running.prompt, running.job.answer)
            except ConfigError as error:  # it does not fit the context
                self._leave(running, error)
            running.prompt = []

    def _ready(self) -> list[R]:
        """Jobs whose answers can begin; those that have no room for one have left."""
        ready = [running for running in self._active if running.prompt and not running.segments]
        for running in ready:
            if self._most(running) < 1:
                full = f"memory and prompt fill the model's context of {self.context}, no room is left for an answer"
                advice = "begin a new conversation, or serve an adapter that merges"
                self._leave(running, ConfigError(f"{full}: {advice}"))
        return [running for running in ready if running in self._active]

    def _most(self, running: R) -> int:
        """Tokens that the answer may have."""
        job = running.job
        left = self.context - running.memory.length - len(job.prompt)
        if job.remember:  # the answer's end and the fold behind it need room too
            left -= BEHIND + self.method.behind
        return min(running.job.sampling.max_tokens, left)

    def _put(self, running: R, token: int) -> bool:
        """Pass on the text of one more token of an answer; whether it is the last one."""
        now = time.monotonic()
        if running.last:
            self.metrics.between.observe(now - running.last)
        else:
            self.metrics.first.observe(now - running.submitted)
        running.token, running.last = token, now
        if token in self._ends:
            running.finish_reason = "stop"
        else:
            self._tell(running, running.writer.put(token))
            if running.writer.stopped:
                running.finish_reason = "stop"
            elif len(running.writer.ids) >= self._most(running):
                running.finish_reason = "length"
        return bool(running.finish_reason)

    def _end(self, ended: Sequence[R]) -> None:
        """Answers that are complete are taken in."""
        for running in ended:
            running.known = self._known(running) if running.job.remember else None
        self._stop(ended)
        for running in ended:
            self._tell(running, running.writer.end())
            self.metrics.written.inc(len(running.writer.ids))
            if running.job.remember:
                kept = running.job.remember(running.writer.text)
                running.memory = running.memory if kept.memory is None else kept.memory
                running.segments = list(kept.segments)

    @staticmethod
    def _tell(running: R, piece: str) -> None:
        if piece and not running.ticket.cancelled:
            running.listener(piece)

    def _finish(self, running: R) -> None:
        writer = running.writer
        result = Result(
            wake(running.memory),
            writer.text,
            running.finish_reason or "stop",
            len(writer.ids) + (running.token in self._ends),
            running.read,
        )
        self._leave(running, result)
