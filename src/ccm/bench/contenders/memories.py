"""Memories of this library on transformers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch

from ...core.memory import KV, Memory, Row
from ...core.reader import Known
from ...decoding import COPIES, decodes_from
from ...methods import Method, open_method
from ...methods.base import segments_of
from ...models.load import load_model
from ...serving.engine import Job, Kept, PaddedEngine, Sampling
from ...serving.engine.base import Event
from ..sizes import ANSWER, ENTRIES
from .base import Contender, Setting, Turn

#: What one process loads is one model: where it lies moves a token by more than two memories differ.
_loaded = cache(load_model)


class _Streamer:
    """When each token came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


class InMemory(Contender):
    """A session of this library, with its default memory."""

    name = "ccm"
    reach = 100_000
    folds = True
    memory: ClassVar[str] = "default"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        loaded, self.tokenizer = self._load()
        self.method = self._method(open_method(self.memory, loaded, self.tokenizer))
        self.held: Memory = self.method.empty()
        self._runs(loaded)
        # decoding proves its step on the first tokens: these say something, random keys and values do not
        self._written(self.held, self.tokenizer("Once upon a time, there was a")["input_ids"])

    def _load(self) -> tuple[Any, Any]:
        own = self.setting
        return _loaded(own.model, own.dtype, own.device, decode_in=own.decode_in)

    def _method(self, method: Method) -> Method:
        return method

    def take(self, ids: list[int]) -> None:
        longest = self.method.longest
        lengths = [min(longest, len(ids) - start) for start in range(0, len(ids), longest)]
        sink, slots, window = self.method.size(lengths)
        newest: list[int] = []
        while sum(newest) < window:
            newest.insert(0, min(lengths[-1 - len(newest)], window - sum(newest)))
        row = Row(
            sink=self._random(sink),
            slots=self._random(slots),
            window=self._random(window),
            segments=tuple(newest),
            steps=len(lengths) - len(newest),
            tokens=len(ids) - window,
        )
        self.held = Memory((row,), self.method.fingerprint()).to(self.device, self.dtype)

    def _random(self, entries: int) -> KV:
        layers, heads, size = self.method.reader.kv_shape()
        return KV(*(torch.randn(layers, heads, entries, size) for _ in range(2)))

    def _folded(
        self, memory: Memory, ids: Sequence[int], answered: bool = False, known: Known | None = None
    ) -> Memory:
        """As a session takes in a text, which is told of what was read already."""
        segments = segments_of(ids, self.method.longest)
        read = None if known is None else known.shared(memory, segments[0])
        return self.method.take_in(memory, [segments], answered=[answered], read=[read])

    def _written(
        self, memory: Memory, head: list[int], streamer: _Streamer | None = None
    ) -> tuple[tuple[int, ...], Known | None]:
        """Head and greedy answer, and what was read to write it."""
        options = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "streamer": streamer}
        out, kv = self.method.reader.write(head, self.method.recall(memory), **options)
        ids = tuple(out[0].tolist())
        return ids, None if kv is None else Known(memory, ids[: kv.length], kv)

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        streamer = _Streamer(self.clock)
        began = self.clock()
        memory = self._folded(self.held, ids, answered=True)
        written, known = self._written(memory, head, streamer)
        self._folded(memory, written, known=known)
        ended = self.clock()
        return Turn.of(began, streamer.times[1:], ended)  # the first that it hears of is the prompt

    def prefill(self, ids: list[int]) -> float:
        began = self.clock()
        self.method.reader.read([ids])
        return self.clock() - began

    def fold(self, ids: list[int]) -> float:
        """Seconds in which these tokens are taken into the memory."""
        began = self.clock()
        self._folded(self.held, ids)
        return self.clock() - began

    def restore(self, head: list[int]) -> float:
        """Seconds from the bytes of a memory to the first token behind it."""
        data = self.held.dumps()
        began = self.clock()
        memory = self.method.admit(Memory.loads(data)[0])
        self.method.reader.generate([head], memory, max_new_tokens=1, do_sample=False, eos_token_id=None)
        return self.clock() - began

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        import queue

        done = queue.Queue[Event]()
        said = deque[tuple[int, ...]]()
        job = Job(
            self.held,
            segments_of(ids, self.method.longest),
            tuple(head),
            Sampling(max_tokens=ANSWER, temperature=0),
            remember=lambda text: Kept(segments_of(said.popleft(), self.method.longest)),
        )
        engine = self._engine(count)
        engine._ends = frozenset()  # so that all answers are of one length
        known = engine._known

        def heard(running: Any) -> Known | None:
            said.append((*head, *running.writer.ids))
            found: Known | None = known(running)
            return found

        # what random keys and values say is no text that comes back as the same tokens: it is kept as it was written
        engine._known = heard
        try:
            began = self.clock()
            for _ in range(count):
                engine.submit(job, lambda event: None if isinstance(event, str) else done.put(event))
            for _ in range(count):
                if isinstance(event := done.get(), Exception):
                    raise event
            return self.clock() - began
        finally:
            engine.close()
            del engine._known  # it holds the engine, whose memory would stay until somebody looks for circles

    def _engine(self, count: int) -> Any:
        return PaddedEngine(self.method, self.tokenizer, rows=count)

    @property
    def kv_bytes(self) -> int:
        row = self.held.rows[0]
        numbers = sum(t.numel() for kv in (row.sink, row.slots, row.window) for t in kv)
        return numbers * self.method.reader.model.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        model = self.method.reader.model
        return self.parameters * COPIES.get(decodes_from(model) or "", model.dtype.itemsize)


class Streaming(InMemory):
    """The same with StreamingLLM of as many entries."""

    name = "streaming-llm"
    memory = f"streaming-llm:window={ENTRIES - 4},sink=4"
