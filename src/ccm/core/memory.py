"""The memory as a value: it can be copied, batched, moved, saved, loaded and compared, and knows what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MemoryFileError, MismatchError
from ..files import memory_file
from ..files.atomic import PRIVATE, write_atomically
from ..files.fingerprint import made_by
from .rotary import Rotary, rotate


class KV(NamedTuple):
    """Keys and values of all layers, both (L, H, N, D). Keys are position-free."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Entries (N)."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    def slice(self, start: int, stop: int | None = None) -> KV:
        """Entries from ``start`` up to ``stop``, copied: (L, H, n, D)."""
        return KV(self.keys[:, :, start:stop].clone(), self.values[:, :, start:stop].clone())

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, both (H, N, D)."""
        return self.keys[index], self.values[index]

    def take(self, index: Tensor) -> KV:
        """Entries by index (L, H, n): every layer and head has its own choice."""
        keys, values = (p.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, p.shape[3])) for p in self)
        return KV(keys, values)

    def to(self, *args: Any) -> KV:
        """On another device or in another type, as ``Tensor.to``; the same object if nothing changes."""
        keys, values = self.keys.to(*args), self.values.to(*args)
        return self if keys is self.keys and values is self.values else KV(keys, values)

    @staticmethod
    def cat(parts: Iterable[KV]) -> KV:
        """Entries of all parts, (L, H, N, D) each, one behind the other."""
        keys, values = zip(*parts, strict=True)
        return KV(torch.cat(keys, dim=2), torch.cat(values, dim=2))


@dataclass(frozen=True)
class Row:
    """The memory of one conversation: [sink | slots | recent window].

    Attributes:
        sink: raw tokens that stay: those that are pinned, then the first ones of the text, once they have left the
            window.
        slots: the folded past, in fp32; or in codes, of a method that says so (``Method.width``).
        window: raw tokens that are not folded yet.
        segments: token counts of the raw segments in the window, oldest first.
        steps: segments folded so far (t).
        tokens: tokens folded so far.
        dropped: tokens whose trace a bounded rule has dropped.
        merged: tokens that share their slots with others, or have none.
        merged_segments: segments that these tokens are of.
        recent: token counts of the segments that have slots of their own, oldest first; empty with a rule that gives
            every segment its own.
        notes: what a method remembers beside keys and values: token ids, or numbers of blocks.
        pinned: how many of the first tokens of the sink are pinned. They are no part of the text.
    """

    sink: KV
    slots: KV
    window: KV
    segments: tuple[int, ...] = ()
    steps: int = 0
    tokens: int = 0
    dropped: int = 0
    merged: int = 0
    merged_segments: int = 0
    recent: tuple[int, ...] = ()
    notes: tuple[int, ...] = ()
    pinned: int = 0

    @property
    def pins(self) -> KV:
        """What is pinned, (L, H, N, D)."""
        return self.sink.slice(0, self.pinned)

    @property
    def sunk(self) -> int:
        """Tokens of the text that are in the sink."""
        return self.sink.length - self.pinned

    @property
    def bare(self) -> Row:
        """What is pinned alone: the row before anything was said."""
        nothing = self.sink.slice(0, 0)
        return Row(self.pins, nothing.to(torch.float32), nothing, pinned=self.pinned)

    def with_pins(self, pins: KV) -> Row:
        """The row with these entries (L, H, N, D) pinned, in place of those that were."""
        sink = KV.cat((pins, self.sink.slice(self.pinned)))
        return replace(self, sink=sink, pinned=pins.length)

    @property
    def seen(self) -> int:
        """All tokens so far."""
        return self.tokens + self.window.length

    @property
    def reach(self) -> int:
        """How many tokens are still told apart: raw, in slots of their segment alone, or with a slot of their own."""
        return self.seen - self.dropped - self.merged

    @property
    def length(self) -> int:
        """Entries in sink, slots and window."""
        return self.sink.length + self.slots.length + self.window.length

    def placed(self, rotary: Rotary, dtype: torch.dtype) -> KV:
        """Sink, slots and window as past keys and values, (L, H, m, D), keys at positions 0..m-1."""
        keys, values = zip(*self.layers(rotary, dtype), strict=True)
        return KV(torch.stack(keys), torch.stack(values))

    def layers(self, rotary: Rotary, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """What :meth:`placed` gives, one layer at a time, (H, m, D)."""
        positions = torch.arange(self.length, device=self.sink.keys.device)
        return placed_layers((self.sink, self.slots, self.window), positions, rotary, dtype)


def placed_layers(
    parts: Sequence[KV], positions: Tensor, rotary: Rotary, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries of all parts as past keys, at positions (N,), and values, one layer at a time, (H, N, D).

    A layer fits into a processor's cache, where all of them do not.
    """
    tables = rotary.tables(positions)
    for layer, kind in enumerate(rotary.layer_types):
        keys, values = (
            torch.cat([states.to(dtype) for states in each], dim=1)
            for each in zip(*(part.layer(layer) for part in parts), strict=True)
        )
        yield rotate(keys, *tables[kind]), values


@dataclass(frozen=True)
class Memory:
    """The memories of B conversations. Values: every operation returns a new one.

    ``len(memory)`` is B, ``memory[i]`` one of them, :meth:`stack` puts several together, of any sizes.
    """

    rows: tuple[Row, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Memory:
        return replace(self, rows=self.rows[index] if isinstance(index, slice) else (self.rows[index],))

    @staticmethod
    def stack(memories: Sequence[Memory]) -> Memory:
        """One batch from several memories.

        Raises:
            MismatchError: they come from different models, adapters or methods.
        """
        prints = {memory.fingerprint for memory in memories}
        if len(prints) != 1:
            makers = " and by ".join(map(made_by, sorted(prints)))
            raise MismatchError(f"cannot stack memories made by {makers}; give those of one")
        return Memory(tuple(row for memory in memories for row in memory.rows), prints.pop())

    @property
    def slots(self) -> int:
        """Slots per conversation, the largest of the batch."""
        return max(row.slots.length for row in self.rows)

    @property
    def length(self) -> int:
        """Positions that the memory takes: sink, slots and raw window, the largest of the batch."""
        return max(row.length for row in self.rows)

    @property
    def steps(self) -> int:
        """Segments folded so far, in the conversation that has most."""
        return max(row.steps for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens folded into slots, over the batch."""
        return sum(row.tokens for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, measured."""
        return sum(kv.nbytes for row in self.rows for kv in (row.sink, row.slots, row.window))

    def pinned_as(self, other: Memory) -> Memory:
        """The memory with what is pinned in another one: pins are read behind each other alone, so they fit any."""
        pairs = zip(self.rows, other.rows, strict=True)
        return replace(self, rows=tuple(row.with_pins(like.pins) for row, like in pairs))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Memory:
        """On a device, its raw tokens in a model's type; slots are fp32 everywhere, or codes. Itself if so."""
        rows = []
        for row in self.rows:
            sink, window = row.sink.to(device, dtype), row.window.to(device, dtype)
            held = row.slots.keys.dtype
            slots = row.slots.to(device, torch.float32 if held.is_floating_point else held)
            same = sink is row.sink and slots is row.slots and window is row.window
            rows.append(row if same else replace(row, sink=sink, slots=slots, window=window))
        same = all(new is old for new, old in zip(rows, self.rows, strict=True))
        return self if same else replace(self, rows=tuple(rows))

    def check_finite(self) -> None:
        """Raises MemoryFileError if a value is NaN or infinite."""
        for r, row in enumerate(self.rows):
            for name in ("sink", "slots", "window"):
                if not all(_is_finite(t) for t in getattr(row, name)):
                    raise MemoryFileError(
                        f"memory row {r}: {name} holds NaN or infinite values; do not use it"
                    )

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, atomically: the old file stays until the new one is complete.

        Args:
            path: where to.
            extra: more string metadata to keep with it.

        Raises:
            StorageError: the file cannot be written, and nothing half-written is left; or another kind of file is
                there, which is not replaced. A memory file is.
            MemoryFileError: the memory holds NaN.
        """
        memory_file.check_replaceable(Path(path))
        write_atomically(Path(path), self.dumps(extra), PRIVATE)

    def dumps(self, extra: Mapping[str, str] | None = None) -> bytes:
        """What :meth:`save` writes."""
        self.check_finite()
        return memory_file.file_bytes(list(map(vars, self.rows)), self.fingerprint, extra or {})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> tuple[Memory, dict[str, str]]:
        """Read a memory and its metadata. Compare ``fingerprint`` before use (``Compressor.check`` does).

        Raises:
            MemoryFileError: missing, truncated, changed after it was written, of another format, written by a newer
                ccm, or NaN inside.
        """
        rows, metadata = memory_file.load(path)
        return Memory.of(rows, metadata), metadata

    @staticmethod
    def loads(data: bytes, most: int = memory_file.MOST) -> tuple[Memory, dict[str, str]]:
        """As :meth:`load`, of a file's bytes, ``most`` of them."""
        rows, metadata = memory_file.read(data, memory_file.FILE, most)
        return Memory.of(rows, metadata), metadata

    @staticmethod
    def of(rows: Sequence[dict[str, Any]], metadata: Mapping[str, str]) -> Memory:
        """The memory that :mod:`ccm.files.memory_file` has read.

        Raises:
            MemoryFileError: NaN or infinite values.
        """
        made = (Row(**row | {part: KV(*row[part]) for part in memory_file.PARTS}) for row in rows)
        memory = Memory(tuple(made), metadata["fingerprint"])
        memory.check_finite()
        return memory


def _is_finite(x: Tensor) -> bool:
    """Whether all numbers are finite, by the least and the largest, so that nothing as large is made on the way."""
    return not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all())
