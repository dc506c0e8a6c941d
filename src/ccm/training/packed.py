"""Rows laid out ahead of time, in one file that training reads with no start-up.

A file begins with ``MAGIC`` and the length of a header in JSON; behind it are five sections: ``stops`` (where each
segment ends in its row), ``segments`` (how many each row has), ``ids`` (of the tokens), ``source`` (of each row) and
``roles`` (of the tokens). Training rows come first, then the held-out rows of one source after the other. The header
and every section have a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .targets import Row

MAGIC, FORMAT = b"ccmrows\n", "ccm-packed/1"
#: The header ends where a multiple of this many bytes does, so that every section is aligned.
ALIGNED = 64

Array = npt.NDArray[Any]


class ArrayRow(NamedTuple):
    """A row of training as arrays.

    Attributes:
        ids: (T,) int32, token ids of all segments, end to end.
        roles: (T,) uint8, the role of each.
        stops: (G,) int32, where each segment ends.
    """

    ids: Array
    roles: Array
    stops: Array

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return len(self.ids)

    @classmethod
    def from_row(cls, row: Row) -> ArrayRow:
        """The same row as arrays."""
        ids = np.array(sum(row.segments, ()), np.int32)
        roles = np.array(sum(row.roles, ()), np.uint8)
        return cls(ids, roles, np.cumsum([len(part) for part in row.segments], dtype=np.int32))

    def to_row(self) -> Row:
        """The same row as tuples."""
        ids, roles, stops = self.ids.tolist(), self.roles.tolist(), self.stops.tolist()
        spans = list(zip([0, *stops], stops, strict=False))
        return Row(tuple(tuple(ids[a:b]) for a, b in spans), tuple(tuple(roles[a:b]) for a, b in spans))


class Table(NamedTuple):
    """Rows end to end: the sections of a file."""

    stops: Array
    segments: Array
    ids: Array
    source: Array
    roles: Array

    @classmethod
    def of(cls, rows: Sequence[ArrayRow], source: Sequence[int], ids: npt.DTypeLike) -> Table:
        """Rows and the index of each one's source; ``ids`` is the type that every token id fits."""

        def joined(parts: Sequence[Array], kind: npt.DTypeLike) -> Array:
            return np.concatenate([np.empty(0, kind), *(part.astype(kind) for part in parts)])

        return cls(
            joined([row.stops for row in rows], "<i4"),
            np.array([len(row.stops) for row in rows], "<u4"),
            joined([row.ids for row in rows], ids),
            np.array(source, "u1"),
            joined([row.roles for row in rows], "u1"),
        )


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What makes token ids mean the same: a digest of all tokens with their ids, and how many there are."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    return {"vocabulary": len(vocabulary), "largest": vocabulary[-1][0], "sha256": digest}


def ids_type(tokenizer: dict[str, Any]) -> str:
    """The type of token ids in a file, by the identity of the tokenizer."""
    return "<u2" if tokenizer["largest"] < 2**16 else "<u4"


def encoded(table: Table, made_of: dict[str, Any], rows: int, held_out: Sequence[int]) -> bytes:
    """A file as bytes.

    Args:
        table: training rows, then the held-out rows of every source.
        made_of: what the rows follow from; it becomes a part of the header.
        rows: how many are training rows.
        held_out: how many of each source are held-out rows.
    """
    sections = {
        name: {
            "type": part.dtype.str,
            "count": len(part),
            "sha256": hashlib.sha256(part.tobytes()).hexdigest(),
        }
        for name, part in table._asdict().items()
    }
    header = {"format": FORMAT, **made_of, "rows": rows, "held_out": list(held_out), "sections": sections}
    text = json.dumps({**header, "sha256": _digest(header)}, ensure_ascii=False).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % ALIGNED)
    return b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *(part.tobytes() for part in table)])


@dataclass(frozen=True, eq=False)
class PackedFile:
    """The rows of a file; it is mapped into memory, not read.

    Attributes:
        path: of the file.
        header: what it says of itself.
        fingerprint: of its whole content.
        table: its sections.
    """

    path: Path
    header: dict[str, Any] = field(repr=False)
    fingerprint: str
    table: Table = field(repr=False)

    @cached_property
    def _segments(self) -> Array:
        """(N + 1,) where the segments of every row begin, held-out ones included."""
        return np.concatenate([[0], np.cumsum(self.table.segments, dtype=np.int64)])

    @cached_property
    def _tokens(self) -> Array:
        """(N + 1,) where the tokens of every row begin."""
        lengths = self.table.stops[self._segments[1:] - 1]
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @classmethod
    def open(cls, path: str | Path, tokenizer: Any = None) -> PackedFile:
        """The file, checked in full.

        Args:
            tokenizer: of the model that is to read it; None takes any.

        Raises:
            DataError: no such file, no packed file, one of another format or tokenizer, truncated, damaged or empty.
        """
        path = Path(path)
        again = "pack it again with `ccm data pack`"
        try:
            raw: Array = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: {getattr(error, 'strerror', None) or 'it is empty'}; expected a file of `ccm data pack`"
            ) from error
        start = len(MAGIC) + 8
        if raw[: len(MAGIC)].tobytes() != MAGIC:
            raise DataError(f"{path} is not a packed file; expected one of `ccm data pack`")
        first = start + int.from_bytes(raw[len(MAGIC) : start].tobytes(), "little")
        text = raw[start:first].tobytes()
        damaged = f"{path} is truncated or damaged in its header; copy it anew, or {again}"
        try:
            header = json.loads(text)
            kind = header["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(damaged) from error
        if kind != FORMAT:
            raise DataError(f"{path}: got format {kind!r}, expected {FORMAT!r}; {again}")
        if (digest := header.pop("sha256", None)) and digest != _digest(header):  # older files have none
            raise DataError(damaged)
        if tokenizer is not None and header["tokenizer"] != (own := tokenizer_identity(tokenizer)):
            raise DataError(
                f"{path}: got rows of another tokenizer ({_told(header['tokenizer'])}), expected that of the model "
                f"({_told(own)}); give the model that it was packed for, or {again}"
            )
        sizes = [np.dtype(part["type"]).itemsize * part["count"] for part in header["sections"].values()]
        if len(raw) != first + sum(sizes):
            raise DataError(
                f"{path} is truncated or damaged: got {len(raw):,} bytes, expected {first + sum(sizes):,}; "
                f"copy it anew, or {again}"
            )
        parts = {}
        for (name, section), size in zip(header["sections"].items(), sizes, strict=True):
            part = raw[first : first + size]
            if hashlib.sha256(part.data).hexdigest() != section["sha256"]:
                raise DataError(f"{path} is damaged in its section {name}; copy it anew, or {again}")
            parts[name] = part.view(section["type"])
            first += size
        if not header["rows"]:
            raise DataError(f"{path}: got no training rows, expected at least one; {again}")
        return cls(path, header, hashlib.sha256(text).hexdigest()[:16], Table(**parts))

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """The sources with their options and weights, as in the recipe."""
        data: dict[str, dict[str, Any]] = self.header["data"]
        return data

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that the rows are from."""
        return tuple(self.data)

    @property
    def weights(self) -> dict[str, float]:
        """Source -> its share of the rows; they sum to 1."""
        given = {name: float(options.get("weight", 1.0)) for name, options in self.data.items()}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def __len__(self) -> int:
        """Training rows."""
        rows: int = self.header["rows"]
        return rows

    @property
    def lengths(self) -> Array:
        """(N,) tokens of every training row."""
        return np.diff(self._tokens[: len(self) + 1])

    @property
    def tokens(self) -> int:
        """Of the training rows."""
        return int(self._tokens[len(self)])

    def row(self, index: int) -> ArrayRow:
        """A training row; behind them come the held-out ones."""
        tokens = slice(self._tokens[index], self._tokens[index + 1])
        segments = slice(self._segments[index], self._segments[index + 1])
        return ArrayRow(
            self.table.ids[tokens].astype(np.int32),
            np.array(self.table.roles[tokens]),
            self.table.stops[segments].astype(np.int32),
        )

    def source(self, index: int) -> int:
        """Where a row comes from, as a place in :attr:`sources`."""
        return int(self.table.source[index])

    def held_out(self, source: str) -> list[Row]:
        """Validation rows of a source, with their later segments scored."""
        counts = self.header["held_out"]
        at = self.sources.index(source)
        first = len(self) + sum(counts[:at])
        return [self.row(index).to_row() for index in range(first, first + counts[at])]


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, ensure_ascii=False).encode()).hexdigest()


def _told(identity: dict[str, Any]) -> str:
    return f"{identity['vocabulary']:,} tokens, {identity['sha256'][:8]}"
