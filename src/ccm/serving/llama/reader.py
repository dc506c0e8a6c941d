"""A method whose model reads, answers and folds in llama.cpp."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from ...core.memory import KV, Memory, Row
from ...core.reader import Ids, Reader
from ...core.window import joined
from ...errors import ConfigError
from ...methods import Method
from ...methods.default import check_fits
from ...models.hollow import is_hollow
from ...models.load import gguf_file
from ..engine.base import Sampling
from ..engine.sampling import Sampler
from .runtime import Runtime

#: Positions for prompt and answer beside a full memory, unless somebody says otherwise.
ROOM = 1024
#: Of transformers' ``generate``: what our sampler can do, and what changes nothing here.
_TAKEN = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"),
    *("eos_token_id", "pad_token_id", "tokenizer", "streamer", "stopping_criteria"),
    *("return_dict_in_generate", "use_cache"),
}


def in_llama(
    method: Method,
    path: str,
    *,
    sequences: int = 1,
    positions: int | None = None,
    kind: str = "f16",
    threads: int | None = None,
) -> Method:
    """The method with its passes in llama.cpp. What asks for queries, as eviction does, is still read by torch.

    Args:
        method: bound to the same model in transformers.
        path: of the model's GGUF file; "default": that of the embedded model.
        sequences: conversations that are read at a time.
        positions: most of one of them; None: a full memory and :data:`ROOM` more.
        kind: type of keys and values, "f32", "f16" or "q8_0".
        threads: of the CPU; None: as many as torch has.

    Raises:
        ConfigError: the method cannot be served by engines that know keys and values alone, the file is not of its
            model or cannot carry memories, or its memory does not fit the positions.
        MissingPackageError: llama-cpp-python is not installed.
    """
    method.check_plain("llama.cpp")
    if method.queries and is_hollow(
        method.reader.model
    ):  # every fold will ask: better now than in the first turn
        method.reader.model.ccm_hollow.fill()
    memory = None if method.limit is None else method.limit + method.longest + method.behind
    runtime = Runtime(
        gguf_file(path),
        method.reader,
        sequences=sequences,
        positions=positions or (memory and memory + ROOM),
        folds=memory,
        kind=kind,
        threads=threads,
    )
    reader = copy.copy(method.reader)
    reader.__class__ = _class(type(method.reader))
    reader.llama = runtime
    bound = method.bind(reader, method.tokenizer)
    check_fits(bound)
    return bound


class InLlama(Reader):
    """In front of a reader's own class: its passes run in llama.cpp."""

    parallel: ClassVar[bool] = False  # its passes go by ``step``
    llama: Runtime

    @property
    def context(self) -> int:
        return self.llama.context

    def step(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None,
        keep: int | None = None,
        gate: slice | None = None,
        asked: Any = None,
    ) -> list[tuple[KV, KV]]:
        conditional = comp is None or (self.llama.folding is not None and gate == slice(ids.shape[1], None))
        if asked is not None or torch.is_grad_enabled() or not conditional:
            return super().step(memory, ids, mask, comp, keep, gate, asked)
        texts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        some = [r for r, text in enumerate(texts) if text]
        rows, none = list(memory.rows), self.empty().rows[0].slots
        raw = dict.fromkeys(range(len(rows)), none)
        read = self.llama.texts([rows[r] for r in some], [texts[r] for r in some])
        for r, kv in zip(some, read, strict=True):
            raw[r] = kv
            rows[r] = joined(rows[r], kv, kv.length)
        blocks = [none] * len(rows)
        if comp is not None:
            each = comp.detach().float().cpu().expand(len(rows), -1, -1).numpy()
            blocks = self.llama.blocks(rows, list(each))
        place, dtype = self.model.device, self.model.dtype
        return [
            (
                raw[r].slice(0, keep).to(place, dtype) if keep is not None else raw[r].to(place, dtype),
                block.to(place),
            )
            for r, block in enumerate(blocks)
        ]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        ids, _, _, memory = self.prepare(input_ids, memory, attention_mask)
        if len(ids) != 1:
            raise ConfigError(f"llama.cpp answers one conversation at a time here, got {len(ids)}")
        if unknown := set(generate_kwargs) - _TAKEN:
            raise ConfigError(
                f"llama.cpp answers without {sorted(unknown)[0]}: leave it out, or leave --llama out"
            )
        settings = copy.deepcopy(self.model.generation_config)
        streamer, stops = (generate_kwargs.pop(name, None) for name in ("streamer", "stopping_criteria"))
        settings.update(**generate_kwargs)
        new = settings.max_new_tokens or 0
        self.check_room(memory, ids.shape[1], new, "ask for fewer new tokens (max_new_tokens)")
        prompt = ids[0].tolist()
        written = self._write(memory.rows[0], prompt, settings, streamer, stops or ())
        return torch.tensor([prompt + written], device=ids.device)

    def write(
        self, input_ids: Sequence[int], memory: Memory, **generate_kwargs: Any
    ) -> tuple[Tensor, KV | None]:
        """As :meth:`ccm.Reader.write`, and nothing of what was read: its sequence has read them."""
        return self.generate([list(input_ids)], memory, **generate_kwargs), None

    def _write(
        self, row: Row, prompt: list[int], settings: GenerationConfig, streamer: Any, stops: Sequence[Any]
    ) -> list[int]:
        ends = settings.eos_token_id
        last = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        draw = _drawer(settings, prompt)
        if streamer is not None:
            streamer.put(torch.tensor([prompt]))
        written: list[int] = []
        with self.llama.at([row], [prompt[:-1]]) as (place,):
            unread = prompt[len(place.ids) :]
            while len(written) < (settings.max_new_tokens or 0):
                (logits,) = self.llama.read([place], [unread], logits=True)
                written.append(draw(logits))
                unread = written[-1:]
                if streamer is not None:
                    streamer.put(torch.tensor(written[-1:]))
                whole = torch.tensor([prompt + written]) if stops else None
                if written[-1] in last or any(bool(stop(whole, None).any()) for stop in stops):
                    break
        if streamer is not None:
            streamer.end()
        return written


def _class(kind: type[Reader]) -> type[Reader]:
    """A reader's class with its passes in llama.cpp."""
    return type(f"{kind.__name__}InLlama", (InLlama, kind), {})


def _drawer(settings: GenerationConfig, prompt: list[int]) -> Any:
    """What draws the next token from logits (V,), as transformers' settings say; torch's seed decides."""
    options: dict[str, Any] = {"temperature": 0.0}
    if settings.do_sample:
        options = {
            "temperature": settings.temperature or 1.0,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
            "seed": int(torch.randint(1 << 62, ())),
        }
    sampler = Sampler(
        Sampling(repetition_penalty=settings.repetition_penalty or 1.0, **options), tuple(prompt)
    )
    return sampler.draw
