"""Another memory in fewer bits: its slots are codes between the turns, and numbers while something reads them.

As in KIVI (Liu et al., ICML 2024, arXiv 2402.02750), channels of keys lie far from zero, each at a place of its own.
That place is the model's, so a memory need not hold it: the model's mean key is made once, from tokens drawn with a
fixed seed, and codes say how a key differs from it. KIVI has a scale for each channel of a group of tokens. A memory
that is made anew with every turn would round such groups anew every time; here each entry has its own scales
(docs/decisions.md).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.memory import KV, Memory, Row
from ...core.reader import Ids, Reader
from ...errors import ConfigError, MemoryFileError
from ...files.fingerprint import mismatch
from ..base import Method, Segment, register
from ..parts import Part
from ..spec import Spec
from .codes import HALF, get_code

#: Random tokens whose keys are the model's mean key.
DRAWN = 256


@register("packed")
@dataclass(frozen=True, kw_only=True)
class Packed(Method):
    """Another memory in fewer bits: its slots as codes.

    After KIVI, Liu et al., ICML 2024, arXiv 2402.02750.

    Sink and window stay as they are. What is read is as long as it was, and made of floats while it is read: codes
    save what is held between the turns, in memory, in files and in stores.

    Attributes:
        of: the memory whose slots are held so, a method or an adapter.
        code: "int8", "int4" or "sparse" (Mustafar, arXiv 2505.22913): 68, 36 and 46 bytes for 64 channels.
        options: of that memory, such as options.slots=128.
        sink: first raw tokens that stay; by default as many as of that memory.
        window: newest raw tokens that stay; by default as many as of that memory.
    """

    made: ClassVar[str] = "coded"
    of: str = "attention-matching"
    code: str = "int8"
    options: dict[str, Any] = field(default_factory=dict)
    sink: int = None  # type: ignore[assignment]  # a number once it is known
    window: int = None  # type: ignore[assignment]
    inner: Method = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        get_code(self.code)
        inner = Spec(self.of, self.of, self.options).method()
        if isinstance(inner, Packed):
            raise ConfigError(f"method {self.name}: of is {self.of}, expected a memory that is not packed")
        given = {name: getattr(self, name) for name in ("sink", "window", "segment")}
        if more := {n: v for n, v in given.items() if v is not None and v != getattr(inner, n)}:
            object.__setattr__(self, "options", {**self.options, **more})
            inner = Spec(self.of, self.of, self.options).method()
        self._hold(inner)

    def _hold(self, inner: Method) -> None:
        for name in ("sink", "window", "segment"):
            object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "inner", inner)

    def bind(self, model: PreTrainedModel | Reader, tokenizer: Any = None) -> Packed:
        return self.around(self.inner.bind(model, tokenizer))

    def around(self, inner: Method) -> Packed:
        """The method on a memory that is bound to a model."""
        bound = copy.copy(self)
        bound._hold(inner)
        object.__setattr__(bound, "reader", inner.reader)
        object.__setattr__(bound, "tokenizer", inner.tokenizer)
        return bound

    # ------------------------------------------------------------------ codes

    def width(self, channels: int) -> int:
        return get_code(self.code).width(channels)

    def expanded(self, memory: Memory) -> Memory:
        """The memory as the method that is packed holds it."""
        rows = tuple(replace(row, slots=self._floats(row.slots)) for row in memory.rows)
        return replace(memory, rows=rows, fingerprint=self.inner.fingerprint())

    def coded(self, memory: Memory) -> Memory:
        """The memory with codes for slots, as it is held."""
        rows = tuple(replace(row, slots=self._codes(row.slots)) for row in memory.rows)
        return replace(memory, rows=rows, fingerprint=self.fingerprint())

    def _codes(self, slots: KV) -> KV:
        code, slots = get_code(self.code), slots.to(torch.float32)
        return KV(code.encode(slots.keys - self._mean(slots)), code.encode(slots.values))

    def _floats(self, slots: KV) -> KV:
        code, channels = get_code(self.code), self.reader.kv_shape()[2]
        keys, values = (code.decode(each, channels) for each in slots)
        return KV(keys + self._mean(slots), values)

    def _mean(self, slots: KV) -> Tensor:
        return _mean_key(self.reader).to(slots.keys.device) if slots.length else torch.zeros(())

    # ------------------------------------------------------------------ write and read

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()}-{self.code}"

    def check(self, memory: Memory, batch: int | None = None) -> None:
        maker, _, code = memory.fingerprint.rpartition("-")
        if code != self.code:
            raise mismatch(memory.fingerprint, self.fingerprint())
        self.inner.check(replace(memory, fingerprint=maker), batch)

    def admit(self, memory: Memory) -> Memory:
        self.check(memory, 1)
        layers, heads, channels = self.reader.kv_shape()
        slots = memory.rows[0].slots
        expected = layers, heads, slots.length, self.width(channels)
        if slots.keys.shape != expected or slots.keys.dtype != torch.uint8:
            raise MemoryFileError(
                f"the memory's slots are {tuple(slots.keys.shape)} of {slots.keys.dtype}, expected codes: {expected} "
                "of torch.uint8"
            )
        whole = self.expanded(memory)
        whole.check_finite()
        return self.coded(self.inner.admit(whole))

    def empty(self, batch: int = 1) -> Memory:
        return self.coded(self.inner.empty(batch))

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        return self.coded(self.inner.folded(self.expanded(memory), segment))

    def settled(self, rows: Sequence[Row], queries: Sequence[Tensor | None], window: int) -> tuple[Row, ...]:
        before = self.expanded(Memory(tuple(rows), self.fingerprint()))
        return self.coded(replace(before, rows=self.inner.settled(before.rows, queries, window))).rows

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        return self.inner.recall(self.expanded(memory), ids)

    # ------------------------------------------------------------------ as the other memory says

    @property
    def longest(self) -> int:
        return self.inner.longest

    @property
    def behind(self) -> int:
        return self.inner.behind

    @property
    def limit(self) -> int | None:
        return self.inner.limit

    @property
    def title(self) -> str:
        return f"{self.inner.title}-{self.code}"

    @property
    def text(self) -> str:
        plain = copy.copy(self)
        for name in ("sink", "window", "segment"):  # among the options, where they are not that memory's own
            object.__setattr__(plain, name, None)
        return str(Method.text.__get__(plain))

    def sizes(self) -> dict[str, int]:
        return self.inner.sizes()

    def sized(self, entries: int) -> dict[str, Any]:
        """As many more slots as fit into the bytes of those that are not packed, in 16 bits a number."""
        sizes = self.inner.sized(entries)
        channels = self.reader.kv_shape()[2]
        slots = sizes.pop(self.inner.most) * channels * HALF // self.width(channels)
        return {**sizes, "options": {**self.options, self.inner.most: slots}}

    def check_plain(self, engine: str) -> None:
        self.inner.check_plain(engine)

    def parts(self, row: Row, lengths: Sequence[int] = ()) -> list[Part]:
        return self.inner.parts(row, lengths)

    def size(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        return self.inner.size(lengths)

    def noted(self, row: Row, tokens: int) -> Row:
        return self.inner.noted(row, tokens)

    def apart(self, row: Row) -> int:
        return self.inner.apart(row)

    def losses(self, before: Row, after: Row) -> str:
        return self.inner.losses(before, after)


@torch.no_grad()
def _mean_key(reader: Reader) -> Tensor:
    """(L, H, 1, D) in fp32: the mean key of tokens drawn with a fixed seed, kept with the model.

    It is made by one pass over one row, whatever a memory holds, so that codes are read as they were written.
    """
    known = reader.model.__dict__
    if "_ccm_mean_key" not in known:
        words = reader.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(
            words, (1, min(DRAWN, reader.context)), generator=torch.Generator().manual_seed(0)
        )
        (kv,) = reader.read(ids.to(reader.model.device))
        known["_ccm_mean_key"] = kv.keys.float().mean(2, keepdim=True)
    return known["_ccm_mean_key"]
