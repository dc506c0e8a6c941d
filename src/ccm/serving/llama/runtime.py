"""Sequences of llama.cpp that hold memories, and what was read behind them.

A sequence remembers which memory it began with and what it has read since. So a text that it has read already, such
as the answer that was just written, is not read again: its keys and values are taken out of the state.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.compressor import Compressor
from ...core.memory import KV, Row
from ...core.reader import Reader
from ...core.rotary import Tables, rotate, unrotate
from ...errors import ConfigError
from . import adapter, hollow
from .layout import Layout, LayoutError, transposed_in
from .library import TYPES, Context, LlamaError, Model, Part

_PROBE = 12  # tokens


@dataclass(eq=False)
class Place:
    """A sequence: the memory that it begins with, and the tokens read behind it.

    Attributes:
        number: of the sequence.
        base: the memory's row; None: nothing.
        ids: token ids behind it.
        new: keys and values, position-free, that were given out for those.
        held: it belongs to an answer that is being written.
    """

    number: int
    base: Row | None = None
    ids: list[int] = field(default_factory=list)
    new: KV | None = None
    held: bool = False
    used: int = 0

    @property
    def length(self) -> int:
        """Tokens from the start up to here."""
        return (0 if self.base is None else self.base.length) + len(self.ids)

    def moves_to(self, row: Row) -> None:
        """Begin with this row, if it is the one from before with what was read behind it in its window."""
        base, new = self.base, self.new
        if base is None or new is None or row is base or new.length > len(self.ids):
            return
        if row.sink is base.sink and row.slots is base.slots and _equal(row.window, base.window, new):
            self.base, self.ids, self.new = row, self.ids[new.length :], None

    def forget(self) -> None:
        """Let go of what was read."""
        self.base, self.ids, self.new = None, [], None


def _equal(window: KV, old: KV, new: KV) -> bool:
    """Whether a window is an older one and what was read behind it."""
    if window.length != old.length + new.length:
        return False
    return all(
        torch.equal(whole[:, :, : old.length], before)
        and torch.equal(whole[:, :, old.length :], behind.to(whole.device, whole.dtype))
        for whole, before, behind in zip(window, old, new, strict=True)
    )


class Runtime:
    """A model in llama.cpp with places for conversations; any thread may use it.

    Args:
        path: the GGUF file.
        reader: the same model in transformers; a compressor brings its adapter.
        sequences: conversations that are read at a time.
        positions: most of one of them; None: as many as the model has.
        folds: most positions that a fold takes; None: all of them.
        kind: type of keys and values: "f32", "f16" or "q8_0".
        threads: of the CPU.

    Raises:
        ConfigError: a file that llama.cpp cannot load, another model, or one whose state cannot be written.
        MissingPackageError: llama-cpp-python is not installed.
    """

    def __init__(
        self,
        path: str,
        reader: Reader,
        *,
        sequences: int = 1,
        positions: int | None = None,
        folds: int | None = None,
        kind: str = "f16",
        threads: int | None = None,
    ):
        if kind not in TYPES:
            raise ConfigError(f"llama.cpp: type {kind!r} of keys and values, expected {', '.join(TYPES)}")
        self.reader, self.model = reader, Model(path)
        words, width = reader.model.get_input_embeddings().weight.shape
        layers, heads, _ = reader.kv_shape()
        if self.model.shape != (expected := (words, width, layers, heads)):
            raise ConfigError(
                f"--llama {path}: vocabulary, hidden size, layers and KV heads are {self.model.shape}, the memory's "
                f"model has {expected}: give the GGUF file of that model"
            )
        positions = min(positions or reader.context, reader.context, self.model.context)
        sizes: dict[str, Any] = {
            "sequences": sequences,
            "kind": kind,
            "threads": threads or torch.get_num_threads(),
        }
        self.reading = Context(self.model, positions=positions, **sizes)
        self.context = min(positions, self.reading.positions)
        self.layout = self._tried(path, Layout(*reader.kv_shape(), kind, sequences))
        self.folding: Context | None = None
        if isinstance(reader, Compressor):
            self.folding = self._folding(reader, positions=min(folds or positions, positions), **sizes)
        self.lock = threading.RLock()
        self.places = [Place(number) for number in range(sequences)]
        self._clock = itertools.count(1)

    def _folding(self, compressor: Compressor, **sizes: Any) -> Context:
        """A context whose adapter is always on: to switch it costs more than to move a state."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.gguf"
            adapter.write(file, compressor, self.model.architecture, self.layout.interleaved)
            lora = self.model.adapter(file)
        return Context(self.model, **sizes, adapter=lora)

    # ------------------------------------------------------------------ before anything is served

    @torch.no_grad()
    def _tried(self, path: str, layout: Layout) -> Layout:
        """The layout of this build and this file: both models read a text, one of them maybe in its first layers, and
        a state is written and read back.

        Raises:
            LayoutError: the state is laid out otherwise.
            ConfigError: the two models do not read alike.
        """
        probe = np.linspace(3, self.model.words - 1, min(_PROBE, self.context), dtype=np.int32)
        self.reading.read([Part(0, 0, probe)])
        blob = self.reading.state(0)
        self.reading.cut(0, 0)
        expected = self._placed(hollow.read(self.reader, path, probe.tolist()), 0)
        layout = replace(layout, transposed=transposed_in(blob))
        ways = [replace(layout, interleaved=way) for way in (False, True)]
        first = slice(len(expected.keys))
        read = [KV(*(part[first] for part in way.unpack(blob))) for way in ways]
        error, found = min(
            ((_distance(got, expected), way) for got, way in zip(read, ways, strict=True)), key=lambda p: p[0]
        )
        if not error <= hollow.SAME:
            raise ConfigError(
                f"--llama {path}: it is not the model that the memory is for (keys and values of one text differ by "
                f"{error:.0%}): give the GGUF file of that model"
            )
        self._written(found)
        return found

    def _written(self, layout: Layout) -> None:
        """Raises LayoutError unless keys and values that are written are those that are there then."""
        generator = torch.Generator().manual_seed(0)
        shape = (layout.layers, layout.heads, min(7, self.context), layout.size)
        known = KV(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        last = self.reading.sequences - 1
        self.reading.put(last, layout.pack(known))
        error = _distance(layout.unpack(self.reading.state(last)), known)
        self.reading.cut(last, 0)
        if error > (0.02 if layout.kind == "q8_0" else 0.001):
            raise LayoutError(
                f"llama.cpp does not keep what is written into its state (it differs by {error:.1%}): install the "
                "release of llama-cpp-python that docs/llama.md names, or leave --llama out"
            )

    # ------------------------------------------------------------------ reading

    @contextmanager
    def at(self, rows: Sequence[Row], texts: Sequence[Sequence[int]] = ()) -> Iterator[list[Place]]:
        """Places for some memories, held for a block; what they know already of the texts behind stays there.

        Raises:
            LlamaError: more than there are places.
        """
        with self.lock:
            places: list[Place] = []
            try:
                for index, row in enumerate(rows):
                    places.append(self.take(row, texts[index] if texts else ()))
                yield places
            finally:
                for place in places:
                    place.held = False

    def take(self, row: Row, ids: Sequence[int] = ()) -> Place:
        """A place that begins with this memory, held until its owner lets go.

        Args:
            row: the memory.
            ids: token ids that will be read behind it.
        """
        with self.lock:
            free = [place for place in self.places if not place.held]
            if not free:
                raise LlamaError(f"all {len(self.places)} sequences of llama.cpp are taken")
            for place in free:
                place.moves_to(row)
            known = [place for place in free if place.base is row]
            if known:
                place = max(known, key=lambda each: _shared(each.ids, ids))
                del place.ids[_shared(place.ids, ids) :]
                self.reading.cut(place.number, place.length)
            else:
                place = min(free, key=lambda each: each.used)
                place.forget()
                self._put(self.reading, place.number, row)
                place.base = row
            place.new, place.held, place.used = None, True, next(self._clock)
            return place

    def read(
        self, places: Sequence[Place], texts: Sequence[Sequence[int]], logits: bool = False
    ) -> list[Tensor]:
        """Read token ids behind what the places hold.

        Returns:
            with ``logits`` those after the last token of each, (V,).

        Raises:
            LlamaError: llama.cpp failed; the places hold nothing any more.
        """
        with self.lock:
            parts = [
                Part(place.number, place.length, np.array(ids, np.int32))
                for place, ids in zip(places, texts, strict=True)
            ]
            try:
                found = self.reading.read(parts, logits)
            except LlamaError:
                for place in places:
                    place.forget()
                    self.reading.cut(place.number, 0)
                raise
            for place, ids in zip(places, texts, strict=True):
                place.ids += ids
            return [torch.from_numpy(row) for row in found]

    def texts(self, rows: Sequence[Row], texts: Sequence[Sequence[int]]) -> list[KV]:
        """Position-free keys and values, (L, H, T, D), of texts behind memories."""
        found: list[KV] = []
        while len(found) < len(rows):
            free = sum(not place.held for place in self.places)
            some = slice(len(found), len(found) + max(1, free))
            with self.at(rows[some], texts[some]) as places:
                rest = [ids[len(place.ids) :] for place, ids in zip(places, texts[some], strict=True)]
                self.read(places, rest)
                for place, row in zip(places, rows[some], strict=True):
                    kv = self.layout.unpack(self.reading.state(place.number), row.length)
                    place.new = self._free(kv, row.length)
                    found.append(place.new)
        return found

    # ------------------------------------------------------------------ folding

    def blocks(self, rows: Sequence[Row], embeddings: Sequence[NDArray[np.float32]]) -> list[KV]:
        """Position-free keys and values of embeddings (n, d) that are read behind each memory with the adapter on."""
        if self.folding is None:
            raise LlamaError("there is no adapter to fold with")
        found = []
        with self.lock:
            for start in range(0, len(rows), len(self.places)):
                some = rows[start : start + len(self.places)]
                parts = []
                for number, row in enumerate(some):
                    self._put(self.folding, number, row)
                    parts.append(Part(number, row.length, embeddings[start + number]))
                self.folding.read(parts)
                for number, row in enumerate(some):
                    kv = self.layout.unpack(self.folding.state(number), row.length)
                    found.append(self._free(kv, row.length))
        return found

    # ------------------------------------------------------------------ keys on and off their positions

    def _put(self, context: Context, number: int, row: Row) -> None:
        if row.length:
            layers = row.layers(self.reader.rotary, torch.float32)
            context.put(number, self.layout.packed(layers, row.length))
        else:
            context.cut(number, 0)

    def _placed(self, kv: KV, start: int) -> KV:
        return KV(rotate(kv.keys.float(), *self._tables(kv, start)), kv.values.float())

    def _free(self, kv: KV, start: int) -> KV:
        return KV(unrotate(kv.keys, *self._tables(kv, start)), kv.values)

    def _tables(self, kv: KV, start: int) -> Tables:
        at = torch.arange(start, start + kv.length, device=kv.keys.device)
        cos, sin, interleaved = self.reader.rotary.stacked(at)
        layers = len(kv.keys)  # they may be those of the first layers
        return Tables(cos[:layers], sin[:layers], interleaved)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many token ids two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _distance(got: KV, expected: KV) -> float:
    """The difference as a share of what is expected."""
    pairs = [(g.cpu(), e.cpu()) for g, e in zip(got, expected, strict=True)]
    return max(float((g - e).norm() / e.norm()) for g, e in pairs)
