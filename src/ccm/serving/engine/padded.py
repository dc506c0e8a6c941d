"""The embedded engine: one thread, one model, one padded batch.

Every round of its loop takes in the next segments of every job that has some left, as many as one pass holds, lets
jobs that are ready join the batch, and writes one token of every answer. So a long prompt holds up the others for one
pass, not for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.batch import Batch
from ...core.live import Live
from ...core.memory import Memory
from ...core.reader import Known, Reader
from ...core.segments import left_padded
from ...methods import Method
from ..metrics import Metrics
from .drawing import CHUNK, DrawingEngine, Drawn


@dataclass(eq=False, kw_only=True)
class _Row(Drawn):
    """A job and, while a long prompt is read, what is read so far."""

    reading: Live | None = None


class PaddedEngine(DrawingEngine[_Row]):
    """Many conversations on one model.

    Args:
        method: bound to a model; other threads may use it as well.
        tokenizer: of the model.
        rows: conversations in the batch at most.
        waiting: jobs that may wait for a place beside them.
        metrics: where it counts.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Any,
        *,
        rows: int = 16,
        waiting: int = 64,
        metrics: Metrics | None = None,
    ):
        self._batch: Batch | None = None  # its rows are those of ``_writing``, in that order
        context = method.reader.context
        super().__init__(method, tokenizer, rows=rows, waiting=waiting, context=context, metrics=metrics)

    def _with_sampler(self, **common: Any) -> _Row:
        return _Row(**common)

    def _answer(self) -> None:
        self._do(self._join, self._ready())
        self._do(self._write, list(self._writing))

    def _stop(self, gone: Sequence[_Row]) -> None:
        leaving = [i for i, running in enumerate(self._writing) if running in gone]
        if self._batch is None or len(leaving) == len(self._writing):
            self._batch, self._writing = None, []
        elif leaving:
            self._writing = [self._writing[i] for i in self._batch.leave(leaving)]

    def _known(self, running: _Row) -> Known | None:
        if self._batch is None or running not in self._writing:
            return None
        held, reader = self.method.recall(running.memory).length, self.method.reader
        kv = self._batch.live.read(self._writing.index(running), held, reader.rotary)
        return Known(running.memory, (*running.job.prompt, *running.writer.ids)[: kv.length], kv)

    def _lost(self, rows: list[_Row]) -> list[_Row]:
        if any(running in self._writing for running in rows):  # their common cache is half a step further
            rows = list({*rows, *self._writing})
            self._batch, self._writing = None, []
        return rows

    # ------------------------------------------------------------------ the two steps of an answer

    def _join(self, rows: list[_Row]) -> None:
        """Read prompts, a chunk at a time; jobs whose prompt is read begin to write."""
        long = [running for running in rows if len(running.prompt) > CHUNK or running.reading]
        short = [running for running in rows if running not in long]
        if long:
            self._read(long[:1], long[0].reading)
        if short:
            self._read(short, None)

    def _read(self, rows: list[_Row], batch: Live | None) -> None:
        parts = [tuple(running.prompt[:CHUNK]) for running in rows]
        ids, mask = left_padded(parts, self.method.reader.model.device)
        if batch is None:
            memory = Memory.stack([running.memory for running in rows])
            batch = self.method.reader.live(self.method.recall(memory))
        batch, logits = run(self.method.reader, batch, ids, mask)
        for running, part in zip(rows, parts, strict=True):
            del running.prompt[: len(part)]
        if rows[0].prompt:  # more chunks to come, of a single long prompt
            rows[0].reading = batch
            return
        if self._batch is None:
            self._batch = Batch(batch)
        else:
            self._batch.join(batch)
        self._writing += rows
        self._draw(rows, logits)

    def _write(self, rows: list[_Row]) -> None:
        """One more token of every answer."""
        if self._batch is None:
            return
        tokens = torch.tensor([[running.token] for running in rows], device=self.method.reader.model.device)
        self._batch.reserve(1)
        self._batch.live, logits = run(self.method.reader, self._batch.live, tokens)
        self.metrics.occupancy.observe(len(rows))
        self._draw(rows, logits)


def run(reader: Reader, batch: Live, ids: Tensor, mask: Tensor | None = None) -> tuple[Live, Tensor]:
    """Read tokens (B, T), padded at the left where the mask is false, behind a batch that must not be used again.

    Returns:
        the batch with these tokens, and the logits (B, V) after the last one.
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    batch, call = batch.ahead(mask, reader.adapter)
    return batch, reader.model(input_ids=ids, logits_to_keep=1, **call).logits[:, -1]
