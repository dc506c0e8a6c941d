"""Ways to keep a conversation, each with the same calls: take in a history, play a turn behind it, answer many.

A turn is what a user waits for: a question of some tokens is read, an answer of a given length is written greedily,
and the state is ready for the next question. Then it goes back to where it was: every repetition is the same turn.

A history is not read before: keys and values of the size that it would leave are put in place, random ones, because
what they say makes no difference to the time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from ..core.memory import KV, Memory, Row
from ..core.reader import Known
from ..core.room import CACHE
from ..core.twin import kv_shape
from ..decoding import COPIES, decodes_from
from ..errors import ConfigError
from ..methods import Method, open_method
from ..methods.base import segments_of
from ..models.load import gguf_file, load_model
from ..models.placement import AUTO
from ..serving.engine import Engine, Job, Kept, PaddedEngine, Sampling
from ..serving.engine.base import Event
from ..serving.llama.layout import Layout, transposed_in
from .machine import clock_of
from .sizes import ANSWER, HEAD, QUESTION


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn.

    Attributes:
        first: to the first token.
        between: between two tokens, the median.
        total: until the next question may come.
    """

    first: float
    between: float
    total: float

    @classmethod
    def of(cls, began: float, tokens: Sequence[float], ended: float) -> Turn:
        """From the times at which it began, each token came, and it ended."""
        gaps = sorted(b - a for a, b in pairwise(tokens))
        return cls(tokens[0] - began, gaps[len(gaps) // 2], ended - began)


class Contender(ABC):
    """One way, with a model of its own.

    Args:
        model: folder, GGUF file or hub id; None is the embedded one.
        llama: GGUF file of the same model.
        threads: of the CPU.
    """

    name: ClassVar[str]
    #: Longest history that it is measured at.
    reach: ClassVar[int] = 4_000
    #: Most conversations at once that it is measured with.
    crowd: ClassVar[int] = 32

    def __init__(self, model: str | None, llama: str, threads: int):
        self.threads, self.clock = threads, clock_of(threads)
        torch.set_num_threads(threads)

    @abstractmethod
    def take(self, ids: list[int]) -> None:
        """Be as behind this history."""

    @abstractmethod
    def turn(self, ids: list[int], head: list[int]) -> Turn:
        """Play a turn, and go back."""

    @abstractmethod
    def prefill(self, ids: list[int]) -> float:
        """Seconds in which these tokens are read behind nothing."""

    @abstractmethod
    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        """Seconds of a turn of so many conversations at once, all with the history of this one."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Of the keys and values that the next token attends to."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Of the weights that every token reads."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Of the model, without a table of embeddings that is only looked up."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Token ids that the model has."""


# ---------------------------------------------------------------------- transformers alone


class _Transformers(Contender):
    def __init__(self, model: str | None, llama: str, threads: int):
        super().__init__(model, llama, threads)
        self.model, _ = load_model(model)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.model.dtype.itemsize

    @property
    def parameters(self) -> int:
        return _parameters(self.model)

    @property
    def vocabulary(self) -> int:
        return _vocabulary(self.model)

    def prefill(self, ids: list[int]) -> float:
        began = self.clock()
        self._read(DynamicCache(), [ids])
        return self.clock() - began

    def _read(self, cache: DynamicCache, ids: list[list[int]]) -> torch.Tensor:
        """The likeliest next token of each row, (B, 1)."""
        out = self.model(input_ids=torch.tensor(ids), logits_to_keep=1, **{CACHE: cache})
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _write(self, cache: DynamicCache, ids: list[list[int]]) -> list[float]:
        """Write answers behind the given tokens, and read their last token; when each token came."""
        token, times = self._read(cache, ids), []
        for _ in range(ANSWER):
            times.append(self.clock())
            token = self._read(cache, token.tolist())
        return times


class Full(_Transformers):
    """A cache of everything said, in transformers."""

    name = "full cache"
    crowd = 16

    def __init__(self, model: str | None, llama: str, threads: int):
        super().__init__(model, llama, threads)
        self.cache = DynamicCache()

    def take(self, ids: list[int]) -> None:
        self.cache = DynamicCache()
        layers, heads, size = kv_shape(self.model.config)
        for index in range(layers):
            self.cache.update(*(torch.randn(1, heads, len(ids), size) for _ in range(2)), index)

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        length = self.cache.get_seq_length()
        began = self.clock()
        times = self._write(self.cache, [ids + head])
        ended = self.clock()
        self.cache.crop(length - self.cache.get_seq_length())  # by so many
        return Turn.of(began, times, ended)

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = (states.repeat(count, 1, 1, 1) for states in (layer.keys, layer.values))
            cache.update(keys, values, index)
        began = self.clock()
        self._write(cache, [ids + head] * count)
        return self.clock() - began

    @property
    def kv_bytes(self) -> int:
        return sum(states.nbytes for layer in self.cache.layers for states in (layer.keys, layer.values))


class Resend(_Transformers):
    """The whole conversation read again at every turn, in transformers."""

    name = "resend"
    crowd = 0
    #: Newest tokens that are sent; None: all.
    newest: ClassVar[int | None] = None

    def __init__(self, model: str | None, llama: str, threads: int):
        super().__init__(model, llama, threads)
        self.ids: list[int] = []

    def take(self, ids: list[int]) -> None:
        self.ids = ids

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        sent = self.ids if self.newest is None else self.ids[-self.newest :]
        began = self.clock()
        times = self._write(DynamicCache(), [sent + ids + head])
        return Turn.of(began, times, self.clock())

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        raise ConfigError(f"{self.name} is not measured with many at once")

    @property
    def kv_bytes(self) -> int:
        return 0


class Window(Resend):
    """The newest tokens read again at every turn."""

    name = "window"
    reach = 100_000
    newest = 328  # as many entries as the memory has


# ---------------------------------------------------------------------- memories


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
    memory: ClassVar[str] = "default"

    def __init__(self, model: str | None, llama: str, threads: int):
        super().__init__(model, llama, threads)
        loaded, self.tokenizer = load_model(model, decode_in=AUTO)  # as the commands do
        self.method = self._method(open_method(self.memory, loaded, self.tokenizer), llama)
        self.held: Memory = self.method.empty()
        self.answered: tuple[int, ...] = ()
        self._parameters, self._vocabulary = _parameters(loaded), _vocabulary(loaded)
        # decoding proves its step on the first tokens: these say something, random keys and values do not
        self._written(self.held, self.tokenizer("Once upon a time, there was a")["input_ids"])

    def _method(self, method: Method, llama: str) -> Method:
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
        self.held, self.answered = Memory((row,), self.method.fingerprint()), ()

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
        if not self.answered:  # what all of them answer, as token ids that are remembered
            self.answered, _ = self._written(self._folded(self.held, ids, answered=True), head)
        kept = Kept(segments_of(self.answered, self.method.longest))
        job = Job(
            self.held,
            segments_of(ids, self.method.longest),
            tuple(head),
            Sampling(max_tokens=ANSWER, temperature=0),
            remember=lambda text: kept,
        )
        engine = self._engine(count)
        engine._ends = frozenset()  # so that all answers are of one length
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

    @property
    def parameters(self) -> int:
        return self._parameters

    @property
    def vocabulary(self) -> int:
        return self._vocabulary


class Streaming(InMemory):
    """The same with StreamingLLM of as many entries."""

    name = "streaming-llm"
    memory = "streaming-llm:window=324,sink=4"


# ---------------------------------------------------------------------- llama.cpp


class InLlama(InMemory):
    """The same with llama.cpp as the reader."""

    name = "ccm in llama.cpp"
    reach = 100_000

    def _method(self, method: Method, llama: str) -> Method:
        from ..serving.llama.reader import in_llama

        self.file = gguf_file(llama)
        self.torch_method = method
        return in_llama(method, llama, threads=self.threads)

    def _engine(self, count: int) -> Engine:
        from ..serving.llama.engine import LlamaEngine
        from ..serving.llama.reader import in_llama

        method = in_llama(self.torch_method, self.file, sequences=count, threads=self.threads)
        return LlamaEngine(method, self.tokenizer)

    @property
    def kv_bytes(self) -> int:
        return super().kv_bytes // self.method.reader.model.dtype.itemsize * 2  # f16

    @property
    def weight_bytes(self) -> int:
        return _file_bytes(self.file)


class Llama(Contender):
    """llama.cpp with its own cache."""

    name = "llama.cpp"

    def __init__(self, model: str | None, llama: str, threads: int):
        from ..serving.llama.library import Context, Model

        super().__init__(model, llama, threads)
        self.file = gguf_file(llama)
        self.model = Model(self.file)
        self.context = Context(
            self.model, positions=self.reach + 512, sequences=1, kind="f16", threads=threads
        )
        self.length = 0

    def take(self, ids: list[int]) -> None:
        self.context.cut(0, 0)
        self._read(self.context, [ids[:1]], [0])
        _, width, layers, heads = self.model.shape
        size = width // int(self.model.lib.llama_model_n_head(self.model.pointer))
        layout = Layout(layers, heads, size, "f16", 1, transposed_in(self.context.state(0)))
        kv = KV(*(torch.randn(layers, heads, len(ids), size) for _ in range(2)))
        self.context.put(0, layout.pack(kv))
        self.length = len(ids)

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        began = self.clock()
        times = self._write(self.context, [ids + head], [self.length])
        ended = self.clock()
        self.context.cut(0, self.length)
        return Turn.of(began, times, ended)

    def prefill(self, ids: list[int]) -> float:
        state = self.context.state(0)
        self.context.cut(0, 0)
        began = self.clock()
        self._read(self.context, [ids], [0])
        seconds = self.clock() - began
        if self.length:
            self.context.put(0, state)
        return seconds

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        import numpy as np

        from ..serving.llama.library import Context

        positions = self.length + QUESTION + HEAD + ANSWER + 1
        many = Context(self.model, positions=positions, sequences=count, kind="f16", threads=self.threads)
        state = np.concatenate([self.context.state(0), np.zeros(4 * (count - 1), np.uint8)])
        state[8:12].view(np.uint32)[0] = count  # of one stream among so many, the others empty
        for number in range(count):
            many.put(number, state)
        began = self.clock()
        self._write(many, [ids + head] * count, [self.length] * count)
        return self.clock() - began

    def _read(self, context: Any, ids: list[list[int]], at: list[int]) -> list[int]:
        import numpy as np

        from ..serving.llama.library import Part

        parts = [Part(i, at[i], np.array(row, np.int32)) for i, row in enumerate(ids)]
        return [int(logits.argmax()) for logits in context.read(parts, logits=True)]

    def _write(self, context: Any, ids: list[list[int]], at: list[int]) -> list[float]:
        tokens, times = self._read(context, ids, at), []
        at = [start + len(row) for start, row in zip(at, ids, strict=True)]
        for _ in range(ANSWER):
            times.append(self.clock())
            tokens = self._read(context, [[token] for token in tokens], at)
            at = [start + 1 for start in at]
        return times

    @property
    def kv_bytes(self) -> int:
        return len(self.context.state(0)) if self.length else 0

    @property
    def weight_bytes(self) -> int:
        return _file_bytes(self.file)

    @property
    def parameters(self) -> int:
        return int(self.model.lib.llama_model_n_params(self.model.pointer))

    @property
    def vocabulary(self) -> int:
        return self.model.words


CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind for kind in (InMemory, InLlama, Llama, Full, Streaming, Window, Resend)
}


def history(length: int, vocabulary: int) -> list[int]:
    """Token ids of the one history that all have; what they say makes no difference to the time."""
    generator = torch.Generator().manual_seed(0)
    most = min(10_000, vocabulary)
    return torch.randint(min(100, most // 2), most, (length,), generator=generator).tolist()


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _parameters(model: Any) -> int:
    """A head that is tied to the embeddings counts, a table that is only looked up does not."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    return total if head is table else total - table.numel()


def _file_bytes(path: str) -> int:
    from pathlib import Path

    return Path(path).stat().st_size
