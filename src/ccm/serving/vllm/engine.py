"""The server's engine with generation in vLLM: segments are folded here, answers are written there.

    segments -> method -> memory -> store -> vLLM -> tokens -> method -> memory

The memory that an answer reads is one of the middle of a turn, which the server does not commit. It lies in a store
that vLLM reads too, as long as the answer takes, under an id that is used once and cannot be guessed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ...core.memory import Memory
from ...errors import CCMError, ConfigError
from ...methods import Method
from ...models.generation import Drawing
from ..engine.base import EngineError, Sampling
from ..engine.folding import FoldingEngine, Running
from ..metrics import Metrics
from ..store import NotFoundError, Snapshot, Store, codec
from .client import Call, VllmServer
from .reference import Reference

log = logging.getLogger(__name__)

#: In the store, beside the tenants of a server: its keys are names without blanks.
TENANT = "vllm turns"


@dataclass(eq=False, kw_only=True)
class _Answer(Running):
    """A job with its request to vLLM."""

    call: Call = field(default_factory=Call)


class VllmEngine(FoldingEngine[_Answer]):
    """Many conversations: one method, and vLLM.

    Args:
        method: bound to a model; other threads may use it as well.
        tokenizer: of the model.
        server: vLLM with the same model and our connector.
        store: that the connector reads; the engine closes it. With limits that end sessions after an hour or so,
            what a killed server leaves in it goes away.
        rows: conversations that are worked on at once.
        waiting: jobs that may wait for a place beside them.
        metrics: where it counts.

    Raises:
        ConfigError: the method is not plain, or vLLM does not load memories, not from this store, or not for this
            model.
        EngineError: it is not reachable.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Any,
        server: VllmServer,
        store: Store,
        *,
        rows: int = 64,
        waiting: int = 64,
        metrics: Metrics | None = None,
    ):
        method.check_plain("vLLM")
        self.server, self.store = server, store
        self._check(method)
        self._pool = ThreadPoolExecutor(max(1, rows), thread_name_prefix="ccm-vllm")
        context = min(method.reader.context, server.context)
        super().__init__(method, tokenizer, rows=rows, waiting=waiting, context=context, metrics=metrics)

    def close(self) -> None:
        super().close()
        self._pool.shutdown()
        self.store.close()

    # ------------------------------------------------------------------ before the first job

    def _check(self, method: Method) -> None:
        """vLLM must refuse a memory that is not there, and load one that is."""
        options = {"max_tokens": 1, "temperature": 0}

        def answers(reference: Reference | None) -> bool:
            try:
                return bool(list(self.server.tokens([0], reference, options, Call())))
            except EngineError as error:
                log.info("%s", error)
                return False

        missing = Reference(TENANT, "none", 1, 1)
        if answers(missing):
            raise ConfigError(
                f"vLLM at {self.server.url} answers without the memory: start it with our connector (docs/scaling.md)"
            )
        told = method.fold(method.empty(), [[0, 0]], answered=True)
        with self._staged(method.recall(told)) as reference:
            if not answers(reference):
                raise ConfigError(
                    f"vLLM at {self.server.url} cannot load a memory of this server: it must have the same model, "
                    "and a connector that reads the same store; its log says why"
                )

    # ------------------------------------------------------------------ on the engine's thread

    def _accept(self, **common: Any) -> _Answer:
        return _Answer(**common)

    def _can_wait(self) -> bool:
        return not any(running.segments for running in self._active)

    def _answer(self) -> None:
        self._do(self._begin, self._ready())

    def _begin(self, rows: list[_Answer]) -> None:
        for running in rows:
            running.prompt = []
            self._writing.append(running)
            self._pool.submit(self._ask, running, self._most(running))

    def _stop(self, gone: Sequence[_Answer]) -> None:
        self._writing = [running for running in self._writing if running not in gone]
        for running in gone:
            running.call.close()

    def _hear(self, running: _Answer, tokens: list[int]) -> None:
        if running in self._writing and not running.ticket.finished:  # what comes later was not waited for
            self._do(partial(self._take, tokens), [running])

    def _take(self, tokens: list[int], rows: list[_Answer]) -> None:
        (running,) = rows
        for token in tokens:
            if self._put(running, token):
                self._end(rows)
                return

    def _fail(self, running: _Answer, error: Exception) -> None:
        if running in self._writing and not running.ticket.finished:
            self._leave(running, error)

    # ------------------------------------------------------------------ on a thread of the answer

    def _ask(self, running: _Answer, most: int) -> None:
        job = running.job
        options = _options(job.sampling, self.own, most, sorted(self._ends))
        try:
            with self._staged(self.method.recall(running.memory)) as reference:
                for tokens in self.server.tokens(list(job.prompt), reference, options, running.call):
                    self._inbox.put(partial(self._hear, running, tokens))
            error: Exception = EngineError(f"vLLM at {self.server.url} ended the answer before its end")
        except CCMError as failure:
            error = failure
        except Exception as failure:
            log.exception("a turn failed")
            error = EngineError(f"the turn failed ({type(failure).__name__})")
        self._inbox.put(partial(self._fail, running, error))  # of no effect if the answer is complete

    @contextmanager
    def _staged(self, memory: Memory) -> Iterator[Reference | None]:
        """A memory where vLLM finds it; None: it is empty."""
        if not memory.length:
            yield None
            return
        session = self.store.create(TENANT)
        try:
            payload, metadata = codec.encode(memory)
            stored = self.store.commit(TENANT, session, 0, Snapshot(payload, metadata))
            yield Reference(TENANT, session, stored.version, memory.length)
        finally:
            try:
                self.store.delete(TENANT, session)
            except NotFoundError:
                log.warning("a memory expired in the store while it was read: give it more time")
            except OSError as error:
                log.warning("a memory stays in the store until it expires: %s", error)


def _options(sampling: Sampling, own: Drawing, most: int, ends: list[int]) -> dict[str, Any]:
    """Of ``/v1/completions``; what a model's own defaults could change is said as well. Stop texts are found here."""
    drawn = sampling.drawing(own)
    options: dict[str, Any] = {
        "max_tokens": most,
        **asdict(drawn),
        "top_p": max(drawn.top_p, torch.finfo(torch.float32).eps),
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "stop_token_ids": ends,
        "ignore_eos": True,
    }
    if sampling.seed is not None:
        options["seed"] = sampling.seed & (1 << 63) - 1
    if sampling.schema is not None:
        options["structured_outputs"] = {"json": json.loads(sampling.schema)}
    return options
