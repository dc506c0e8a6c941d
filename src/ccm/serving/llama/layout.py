"""The bytes of one sequence's state in llama.cpp, as keys and values and back.

    magic, flags | streams | cells | per cell: position, 1, sequence | transposed, layers
    per layer: type of K, bytes a row | one row a cell, heads side by side
    per layer: type of V, bytes a row | as K         or, transposed: type, bytes an element, width | one row a number

All streams but one hold no cells. The files of some architectures have the two halves of every head interleaved, as
llama.cpp rotates neighbours there; which ones is measured (``runtime``).
"""

from __future__ import annotations

import struct
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
        count = kv.length
        keys, values = (part.detach().to("cpu", torch.float32).transpose(1, 2) for part in kv)
        if self.interleaved:
            keys = keys.unflatten(-1, (2, -1)).transpose(-1, -2)
        values = values.flatten(2)
        if self.transposed:
            values = values.transpose(1, 2)
        meta = np.empty((count, 3), np.int32)
        meta[:, 0], meta[:, 1], meta[:, 2] = np.arange(count), 1, 0
        begin = struct.pack("<IiII", _MAGIC, 0, self.streams, count)
        middle = struct.pack("<II", int(self.transposed), self.layers)
        sections = [
            self._section(part, head) for part, head in zip((keys, values), self._heads(), strict=True)
        ]
        parts = [np.frombuffer(begin, np.uint8), meta.view(np.uint8).reshape(-1)]
        parts += [np.frombuffer(middle, np.uint8), *sections, np.zeros(4 * (self.streams - 1), np.uint8)]
        return np.concatenate(parts)

    def _section(self, part: Tensor, head: bytes) -> NDArray[np.uint8]:
        rows = self._encoded(part.reshape(self.layers, -1))
        section = np.empty((self.layers, _HEAD + rows.shape[1]), np.uint8)
        section[:, :_HEAD] = np.frombuffer(head, np.uint8)
        section[:, _HEAD:] = rows
        return section.reshape(-1)

    def _encoded(self, numbers: Tensor) -> NDArray[np.uint8]:
        if self.kind == "q8_0":
            return gguf.quants.quantize(numbers.contiguous().numpy(), _QUANTIZED)
        plain = numbers.to(torch.float16 if self.kind == "f16" else torch.float32).contiguous().numpy()
        return plain.view(np.uint8)

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
            numbers = sections[1].reshape(self.layers, self.heads * self.size, count, -1)[:, :, chosen]
            values = self._decoded(numbers.reshape(*numbers.shape[:2], -1)).transpose(1, 2)
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
        kind: Any = np.float16 if self.kind == "f16" else np.float32
        return torch.from_numpy(np.ascontiguousarray(rows).view(kind).astype(np.float32, copy=False))

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
