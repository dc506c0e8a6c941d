"""The same file in llama.cpp, with a memory and without."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ...core.memory import KV
from ...methods import Method
from ...models.load import gguf_file
from ...models.options import Loading
from ...serving.engine import Engine
from ...serving.llama.layout import Layout, transposed_in
from ..sizes import ANSWER, HEAD, QUESTION
from .base import Contender, Setting, Turn, file_bytes
from .memories import InMemory


class InLlama(InMemory):
    """The same with llama.cpp as the reader."""

    name = "ccm in llama.cpp"
    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)
    in_torch = False

    def _load(self) -> tuple[Any, Any]:
        from ...serving.llama import hollow

        return hollow.load(Loading(self.setting.model), spinner=False)

    def _method(self, method: Method) -> Method:
        from ...serving.llama.reader import in_llama

        self.file = gguf_file(self.setting.llama)
        self.torch_method = method
        return in_llama(method, self.setting.llama, threads=self.threads)

    def _engine(self, count: int) -> Engine:
        from ...serving.llama.engine import LlamaEngine
        from ...serving.llama.reader import in_llama

        method = in_llama(self.torch_method, self.file, sequences=count, threads=self.threads)
        return LlamaEngine(method, self.tokenizer)

    @property
    def kv_bytes(self) -> int:
        return super().kv_bytes // self.method.reader.model.dtype.itemsize * 2  # f16

    @property
    def weight_bytes(self) -> int:
        return file_bytes(self.file)


class Llama(Contender):
    """llama.cpp with its own cache."""

    name = "llama.cpp"
    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)
    in_torch = False

    def __init__(self, setting: Setting):
        from ...serving.llama.library import Context, Model

        super().__init__(setting)
        self.file = gguf_file(setting.llama)
        self.model = Model(self.file)
        self.parameters = int(self.model.lib.llama_model_n_params(self.model.pointer))
        self.vocabulary = self.model.words
        self.context = Context(
            self.model, positions=self.reach + 512, sequences=1, kind="f16", threads=self.threads
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

        from ...serving.llama.library import Context

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

        from ...serving.llama.library import Part

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
        return file_bytes(self.file)
