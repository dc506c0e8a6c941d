"""The bytes of one sequence's state in llama.cpp, as keys and values and back.

    magic, flags | streams | cells | per cell: position, 1, sequence | transposed, layers
    per layer: type of K, bytes a row | one row a cell, heads side by side
    per layer: type of V, bytes a row | as K         or, transposed: type, bytes an element, width | one row a number

All streams but one hold no cells. The files of some architectures have the two halves of every head interleaved, as
llama.cpp rotates neighbours there; which ones is measured (``runtime``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.memory import KV
from ...errors import ConfigError
from .library import TYPES

_MAGIC = 0xAF143CD8
_HEAD = 12  # bytes in front of each layer's rows
_QUANTIZED = gguf.GGMLQuantizationType.Q8_0


class LayoutError(ConfigError):
    """A state that is not laid out as it is known here."""


@dataclass(frozen=True)
class Layout:
    """How a context lays out its sequences.

    Attributes:
        layers, heads, size: of the model (L, H, D).
        kind: type of keys and values.
        streams: sequences of the context.
        transposed: whether values lie number by number.
        interleaved: whether the halves of a head are.
    """

    layers: int
    heads: int
    size: int
    kind: str
    streams: int
    transposed: bool = False
    interleaved: bool = False

    @property
    def _row(self) -> int:
        """Bytes of the keys of one cell in one layer."""
        width = self.heads * self.size
        return {"f32": 4 * width, "f16": 2 * width, "q8_0": width // 32 * 34}[self.kind]

    @property
    def _number(self) -> Any:
        """Of the types that are plain numbers."""
        return np.float16 if self.kind == "f16" else np.float32

    def _heads(self) -> tuple[bytes, bytes]:
        """What stands in front of a layer's keys and of its values."""
        plain = struct.pack("<iQ", TYPES[self.kind], self._row)
        if not self.transposed:
            return plain, plain
        width = self.heads * self.size
        return plain, struct.pack("<iII", TYPES[self.kind], self._row // width, width)

    # ------------------------------------------------------------------ write

    def pack(self, kv: KV) -> NDArray[np.uint8]:
        """The state of a sequence that holds these keys, at positions 0..N-1, and values, (L, H, N, D), N > 0."""
        return self.packed(zip(*kv, strict=True), kv.length)

    def packed(self, layers: Iterable[tuple[Tensor, Tensor]], count: int) -> NDArray[np.uint8]:
        """As :meth:`pack`, of the keys and values of each layer, (H, N, D)."""
        meta = np.empty((count, 3), np.int32)
        meta[:, 0], meta[:, 1], meta[:, 2] = np.arange(count), 1, 0
        begin = struct.pack("<IiII", _MAGIC, 0, self.streams, count) + meta.tobytes()
        begin += struct.pack("<II", int(self.transposed), self.layers)
        end = len(begin) + 2 * self.layers * (_HEAD + self._row * count)
        blob = np.empty(end + 4 * (self.streams - 1), np.uint8)
        blob[: len(begin)], blob[end:] = np.frombuffer(begin, np.uint8), 0
        sections = blob[len(begin) : end].reshape(2, self.layers, -1)
        for section, head in zip(sections, self._heads(), strict=True):
            section[:, :_HEAD] = np.frombuffer(head, np.uint8)
        for layer, (keys, values) in enumerate(layers):
            sections[0, layer, _HEAD:] = self._encoded(keys, halves=self.interleaved)
            sections[1, layer, _HEAD:] = self._encoded(values, transposed=self.transposed)
        return blob

    def _encoded(self, states: Tensor, halves: bool = False, transposed: bool = False) -> NDArray[np.uint8]:
        """The rows of one layer, from (H, N, D), with interleaved halves or number by number."""
        states = states.detach().to("cpu", torch.float16 if self.kind == "f16" else torch.float32)
        states = states.permute(0, 2, 1) if transposed else states.transpose(0, 1)
        if halves:
            states = torch.stack(states.chunk(2, -1), dim=-1)
        numbers = states.reshape(-1).numpy()
        return gguf.quants.quantize(numbers, _QUANTIZED) if self.kind == "q8_0" else numbers.view(np.uint8)

    # ------------------------------------------------------------------ read

    def unpack(self, blob: NDArray[np.uint8], start: int = 0) -> KV:
        """Keys, at the positions that they have in the sequence, and values, (L, H, N, D), from an entry on.

        Raises:
            LayoutError: the bytes are laid out otherwise.
        """
        cells, at = self._begin(blob)
        count, chosen = len(cells), cells[start:]
        sections = []
        for head in self._heads():
            end = at + self.layers * (_HEAD + self._row * count)
            section = blob[at:end].reshape(self.layers, -1)
            self._expect("rows of a layer", bytes(section[0, :_HEAD]).hex(), head.hex())
            if not (section[:, :_HEAD] == section[0, :_HEAD]).all():
                raise LayoutError(_unknown("layers", "of several kinds", "of one"))
            sections.append(section[:, _HEAD:])
            at = end
        keys = self._decoded(sections[0].reshape(self.layers, count, -1)[:, chosen])
        keys = keys.unflatten(-1, (self.heads, self.size))
        if self.interleaved:
            keys = keys.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        if self.transposed:
            numbers = sections[1].view(self._number).reshape(self.layers, -1, count)[:, :, chosen]
            values = torch.from_numpy(numbers.astype(np.float32, copy=False)).transpose(1, 2)
        else:
            values = self._decoded(sections[1].reshape(self.layers, count, -1)[:, chosen])
        values = values.unflatten(-1, (self.heads, self.size))
        return KV(keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous())

    def _begin(self, blob: NDArray[np.uint8]) -> tuple[NDArray[np.intp], int]:
        """The cells in the order of their positions, and where the keys begin."""
        words = blob[: 12 + 4 * self.streams].view(np.uint32)
        self._expect("mark", int(words[0]), _MAGIC)
        self._expect("number of streams", int(words[2]), self.streams)
        stream = next((s for s in range(self.streams) if words[3 + s]), self.streams - 1)
        count = int(words[3 + stream])
        at = 12 + 4 * (stream + 1)
        expected = at + 12 * count + 8 + 2 * self.layers * (_HEAD + self._row * count)
        self._expect("length", len(blob), expected + 4 * (self.streams - 1 - stream))
        meta = blob[at : at + 12 * count].view(np.int32).reshape(count, 3)
        cells = np.argsort(meta[:, 0])
        if not (meta[cells, 0] == np.arange(count)).all() or not (meta[:, 1] == 1).all():
            raise LayoutError(_unknown("cells", "not one for each position", "one"))
        at += 12 * count
        transposed, layers = blob[at : at + 8].view(np.uint32)
        self._expect("number of layers", int(layers), self.layers)
        self._expect("way of values", int(transposed), int(self.transposed))
        return cells, at + 8

    def _decoded(self, rows: NDArray[np.uint8]) -> Tensor:
        if self.kind == "q8_0":
            return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(rows), _QUANTIZED))
        numbers = np.ascontiguousarray(rows).view(self._number)
        return torch.from_numpy(numbers.astype(np.float32, copy=False))

    @staticmethod
    def _expect(what: str, got: object, expected: object) -> None:
        if got != expected:
            raise LayoutError(_unknown(what, got, expected))


def transposed_in(blob: NDArray[np.uint8]) -> bool:
    """Whether values lie number by number in a state of the first sequence."""
    at = 16 + 4 * 3 * int(blob[12:16].view(np.uint32)[0])
    if len(blob) < at + 4:
        raise LayoutError(_unknown("length", len(blob), "that of its cells"))
    return bool(blob[at : at + 4].view(np.uint32)[0])


def _unknown(what: str, got: object, expected: object) -> str:
    return (
        f"llama.cpp lays out its state otherwise than is known here: {what} is {got}, expected {expected}; install "
        "the release of llama-cpp-python that docs/llama.md names, or leave --llama out"
    )
