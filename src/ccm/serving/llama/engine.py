"""The server's engine on llama.cpp: every conversation has a sequence, and all are read and written in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...methods import Method
from ..engine.drawing import CHUNK, DrawingEngine, Drawn
from ..metrics import Metrics
from .reader import InLlama
from .runtime import Place


@dataclass(eq=False, kw_only=True)
class _Row(Drawn):
    """A job and its sequence, from when its prompt is read."""

    place: Place | None = None


class LlamaEngine(DrawingEngine[_Row]):
    """Many conversations on one model in llama.cpp.

    Args:
        method: bound to a reader in llama.cpp (``in_llama``); it has as many sequences as rows.
        tokenizer: of the model.
        waiting: jobs that may wait for a place beside those that run.
        metrics: where it counts.
    """

    def __init__(self, method: Method, tokenizer: Any, *, waiting: int = 64, metrics: Metrics | None = None):
        assert isinstance(method.reader, InLlama)
        self.llama = method.reader.llama
        rows, context = len(self.llama.places), self.llama.context
        super().__init__(method, tokenizer, rows=rows, waiting=waiting, context=context, metrics=metrics)

    def _with_sampler(self, **common: Any) -> _Row:
        return _Row(**common)

    def _answer(self) -> None:
        self._do(self._read, self._ready())
        self._do(self._write, list(self._writing))

    def _leave(self, running: _Row, event: Any = None) -> None:
        self._let_go([running])
        super()._leave(running, event)

    def _stop(self, gone: Sequence[_Row]) -> None:
        self._writing = [running for running in self._writing if running not in gone]
        self._let_go(gone)

    @staticmethod
    def _let_go(rows: Sequence[_Row]) -> None:
        for running in rows:
            if running.place is not None:
                running.place.held, running.place = False, None

    # ------------------------------------------------------------------ the two steps of an answer

    def _read(self, rows: list[_Row]) -> None:
        """One chunk of every prompt; a job whose prompt is read begins to write."""
        parts = [running.prompt[:CHUNK] for running in rows]
        places: list[Place] = []
        for running, part in zip(rows, parts, strict=True):
            if running.place is None:
                (row,) = self.method.recall(running.memory).rows
                running.place = self.llama.take(row, part[:-1])
                del part[: len(running.place.ids)]
            places.append(running.place)
        logits = self.llama.read(places, parts, logits=True)
        ready = []
        for i, running in enumerate(rows):
            del running.prompt[:CHUNK]
            if not running.prompt:
                ready.append(i)
        self._writing += [rows[i] for i in ready]
        self._draw([rows[i] for i in ready], [logits[i] for i in ready])

    def _write(self, rows: list[_Row]) -> None:
        """One more token of every answer."""
        places = [running.place for running in rows if running.place is not None]
        logits = self.llama.read(places, [[running.token] for running in rows], logits=True)
        self.metrics.occupancy.observe(len(rows))
        self._draw(rows, logits)
