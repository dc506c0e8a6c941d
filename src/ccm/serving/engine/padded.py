"""The embedded engine: one thread, one model, one padded batch.

Every round of its loop takes in one segment of every job that has some left, lets jobs that are ready join the batch,
and writes one token of every answer. So a long prompt holds up the others for one segment, not for all of it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import chat
from ...compressor import Compressor
from ...errors import ConfigError
from ...memory import Memory
from ..metrics import Metrics
from .base import Engine, EngineError, Job, Listener, OverloadedError, Result, Ticket, segments_of
from .batch import Batch
from .sampling import Sampler, Writer

log = logging.getLogger(__name__)

#: Prompt tokens that are read at once.
CHUNK = 256


@dataclass(eq=False)
class _Running:
    """A job that the engine works on."""

    job: Job
    ticket: Ticket
    listener: Listener
    sampler: Sampler
    writer: Writer
    submitted: float
    memory: Memory
    segments: list[tuple[int, ...]]
    prompt: list[int]
    reading: Batch | None = None
    token: int = -1
    finish_reason: str = ""
    last: float = field(default=0.0)


class PaddedEngine(Engine):
    """Many conversations on one model.

    Args:
        compressor: model and adapter; nobody else may use it while the engine runs.
        tokenizer: of the model.
        rows: conversations in the batch at most.
        waiting: jobs that may wait for a place beside them.
        metrics: where it counts.
    """

    def __init__(
        self,
        compressor: Compressor,
        tokenizer: Any,
        *,
        rows: int = 16,
        waiting: int = 64,
        metrics: Metrics | None = None,
    ):
        if rows < 1 or waiting < 0:
            raise ConfigError(f"engine: got rows={rows} and waiting={waiting}, expected at least 1 and 0")
        self.compressor, self.tokenizer = compressor, tokenizer
        self.rows, self.most = rows, rows + waiting
        self.metrics = metrics or Metrics()
        self._ends = chat.ends(tokenizer)
        self._inbox: queue.SimpleQueue[_Running | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs = 0  # submitted and not finished
        self._closed = False
        self._beat = time.monotonic()
        self._active: list[_Running] = []
        self._writing: list[_Running] = []  # rows of the batch, in its order
        self._batch: Batch | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, name="ccm-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from other threads

    def submit(self, job: Job, listener: Listener) -> Ticket:
        reader = self.compressor
        reader.check(job.memory, 1)
        longest = reader.model.config.max_position_embeddings
        least = len(job.prompt) + (1 if job.prompt else 0)
        if least > longest:
            raise ConfigError(
                f"the prompt has {len(job.prompt)} tokens, the model's context is {longest}: shorten it, or name a "
                "conversation, whose past is folded"
            )
        for ids in (*job.segments, job.prompt):
            if ids:
                reader._check_ids(torch.tensor(ids))
        running = _Running(
            job=job,
            ticket=Ticket(),
            listener=listener,
            sampler=Sampler(job.sampling, job.prompt),
            writer=Writer(self.tokenizer, job.sampling.stop),
            submitted=time.monotonic(),
            memory=job.memory,
            segments=list(job.segments),
            prompt=list(job.prompt),
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
        torch.set_num_threads(self._threads)  # the setting is one of each thread
        try:
            self._rounds()
        finally:
            with self._lock:
                self._closed = True
            while not self._inbox.empty():
                if (running := self._inbox.get()) is not None:
                    self._active.append(running)
            for running in list(self._active):
                self._leave(
                    running, EngineError("the engine stopped during this turn; nothing of it is kept")
                )

    def _rounds(self) -> None:
        with torch.inference_mode():
            while self._admit():
                self._beat = time.monotonic()
                for running in [r for r in self._active if r.ticket.cancelled]:
                    self._leave(running)
                self._do(self._take_in, [r for r in self._active if r.segments])
                self._do(self._join, [r for r in self._active if r.prompt and not r.segments])
                self._do(self._write, list(self._writing))
                for running in [
                    r for r in self._active if not (r.segments or r.prompt or r in self._writing)
                ]:
                    self._finish(running)

    def _admit(self) -> bool:
        """Let waiting jobs in, and wait for one if there is nothing to do; false at the end."""
        while len(self._active) < self.rows:
            try:
                running = self._inbox.get(block=not self._active)
            except queue.Empty:
                return True
            if running is None:
                return False
            self.metrics.waited.observe(time.monotonic() - running.submitted)
            self._active.append(running)
        return not self._closed

    def _do(self, step: Callable[[list[_Running]], None], rows: list[_Running]) -> None:
        """One step for some jobs; if it fails, they have failed, and the others go on."""
        if not rows:
            return
        try:
            step(rows)
        except Exception as error:  # whatever it is, the engine must live
            log.exception("a step failed for %d turns", len(rows))
            if any(running in self._writing for running in rows):  # their common cache is half a step further
                rows = list({*rows, *self._writing})
                self._batch, self._writing = None, []
            for running in rows:
                self._leave(running, EngineError(f"the model failed on this turn ({type(error).__name__})"))

    def _leave(self, running: _Running, event: Result | Exception | None = None) -> None:
        """Let go of a job and tell it how it ended; None: it was cancelled."""
        self._active.remove(running)
        if running in self._writing:
            rows = [i for i, row in enumerate(self._writing) if row is not running]
            self._writing.remove(running)
            self._batch = self._batch.select(rows) if self._batch and rows else None
        with self._lock:
            self._jobs -= 1
            self.metrics.jobs.set(self._jobs)
        if running.ticket.cancelled:
            self.metrics.cancelled.inc()
        elif event is not None:
            running.listener(event)

    # ------------------------------------------------------------------ the three steps

    def _take_in(self, rows: list[_Running]) -> None:
        """One segment of every job that has some, for those with one budget."""
        budget = rows[0].job.budget
        rows = [running for running in rows if running.job.budget == budget]
        began = time.monotonic()
        ids, mask = _left_padded([running.segments[0] for running in rows], self.compressor.model.device)
        before = [running.memory for running in rows]
        memory = self.compressor.compress(
            ids, Memory.stack(before), mask, slots=budget.slots, sink=budget.sink, window=budget.window
        )
        for i, running in enumerate(rows):
            running.segments.pop(0)
            running.memory = memory[i]
        self.metrics.folding.observe(time.monotonic() - began)
        self.metrics.folded.inc(memory.tokens - sum(m.tokens for m in before))

    def _join(self, rows: list[_Running]) -> None:
        """Read prompts, a chunk at a time; jobs whose prompt is read begin to write."""
        for running in rows:
            room = self._room(running)
            if room < len(running.prompt) + 1:
                self._leave(
                    running, ConfigError(f"memory and prompt fill the model's context of {room} tokens")
                )
        rows = [running for running in rows if running in self._active]
        long = [running for running in rows if len(running.prompt) > CHUNK or running.reading]
        short = [running for running in rows if running not in long]
        if long:
            self._read(long[:1], long[0].reading)
        if short:
            self._read(short, None)

    def _room(self, running: _Running) -> int:
        """Tokens of the model's context that are not taken by the memory."""
        context = self.compressor.model.config.max_position_embeddings
        read = running.reading.valid.shape[1] if running.reading else running.memory.length
        return int(context - read)

    def _read(self, rows: list[_Running], batch: Batch | None) -> None:
        parts = [tuple(running.prompt[:CHUNK]) for running in rows]
        ids, mask = _left_padded(parts, self.compressor.model.device)
        batch = batch or Batch.over(self.compressor, Memory.stack([running.memory for running in rows]))
        batch, logits = batch.run(ids, mask)
        for running, part in zip(rows, parts, strict=True):
            del running.prompt[: len(part)]
        if rows[0].prompt:  # more chunks to come, of a single long prompt
            rows[0].reading = batch
            return
        self._batch = Batch.cat([self._batch, batch] if self._batch else [batch])
        self._writing += rows
        self._put(rows, logits)

    def _write(self, rows: list[_Running]) -> None:
        """One more token of every answer."""
        if self._batch is None:
            return
        tokens = torch.tensor([[running.token] for running in rows], device=self.compressor.model.device)
        self._batch, logits = self._batch.run(tokens)
        self.metrics.occupancy.observe(len(rows))
        self._put(rows, logits)

    def _put(self, rows: list[_Running], logits: Tensor) -> None:
        """Draw the next token of each row, pass its text on, and take those out that have ended."""
        ended = []
        for running, row in zip(rows, logits, strict=True):
            token = running.sampler.draw(row)
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
            if running.finish_reason:
                ended.append(running)
        if ended:
            self._end(ended)

    def _most(self, running: _Running) -> int:
        context = self.compressor.model.config.max_position_embeddings
        left = context - running.memory.length - len(running.job.prompt)
        return min(running.job.sampling.max_tokens, left)

    def _end(self, ended: Sequence[_Running]) -> None:
        """Answers that are complete leave the batch and are taken in."""
        kept = [i for i, running in enumerate(self._writing) if running not in ended]
        self._batch = self._batch.select(kept) if self._batch and kept else None
        self._writing = [self._writing[i] for i in kept]
        for running in ended:
            self._tell(running, running.writer.end())
            self.metrics.written.inc(len(running.writer.ids))
            if running.job.remember:
                reply = self._reply(running.writer)
                whole = (*running.job.prompt, *reply, *running.job.closing)
                running.segments = list(segments_of(whole, running.job.budget))

    def _reply(self, writer: Writer) -> list[int]:
        """Token ids of the answer, at least one."""
        text = writer.text or " "
        if writer.stopped or not writer.ids:  # what came behind the stop text was never said
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return writer.ids

    @staticmethod
    def _tell(running: _Running, piece: str) -> None:
        if piece and not running.ticket.cancelled:
            running.listener(piece)

    def _finish(self, running: _Running) -> None:
        writer = running.writer
        result = Result(
            running.memory,
            writer.text,
            running.finish_reason or "stop",
            len(writer.ids) + (running.token in self._ends),
        )
        self._leave(running, result)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T), padding at the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask
