"""Rows to learn from and rows to judge by, from the sources that a run names."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..data.mixture import Mixture
from ..data.rows import ConversationRow
from ..data.sources import Source, get_source
from ..errors import ConfigError, DataError
from .config import TrainConfig
from .packed import Array, ArrayRow, PackedFile
from .targets import Row, marked, scored_from

log = logging.getLogger(__name__)

#: A row as it is drawn, and as it is packed.
Drawn: TypeAlias = ConversationRow | ArrayRow


class Stream(Protocol):
    """Endless batches; ``served``, the batches that all processes have taken, is the whole state."""

    served: int

    def __iter__(self) -> Iterator[Sequence[Drawn]]: ...

    def close(self) -> None:
        """End whatever draws rows ahead of time."""


def with_packed(config: TrainConfig, tokenizer: Any) -> tuple[TrainConfig, PackedFile | None]:
    """The packed file of a run, None if it has none, and the run with the data that the file was packed from.

    Raises:
        DataError: the file cannot be read, or is of another tokenizer.
    """
    if config.packed is None:
        return config, None
    file = PackedFile.open(config.packed, tokenizer)
    if config.data not in (file.data, TrainConfig().data):
        log.warning(
            "%s was packed from other data than the recipe names; what it was packed from counts", file.path
        )
    return replace(config, data=file.data), file


def open_sources(config: TrainConfig, tokenizer: Any) -> dict[str, Source]:
    """The sources of a run by name; missing data is downloaded.

    Raises:
        UnknownNameError: no such source.
        ConfigError: an option that a source does not have.
        DataError: the data cannot be fetched or read.
    """
    return {name: get_source(name, tokenizer, **config.options(name)) for name in config.data}


def training_rows(
    config: TrainConfig, sources: Mapping[str, Source] | PackedFile, rank: int, world: int
) -> Stream:
    """The mixture of a run, or its packed rows; together the processes see every batch once."""
    if isinstance(sources, PackedFile):
        return PackedRows(sources, config.tokens_per_batch, config.rows, config.seed, rank, world)
    weights = [config.weights[name] for name in sources]
    return Mixture(
        list(sources.values()),
        weights,
        config.tokens_per_batch,
        config.rows,
        config.seed,
        rank,
        world,
        config.data_workers,
    )


def held_out_rows(config: TrainConfig, sources: Mapping[str, Source] | PackedFile) -> dict[str, list[Row]]:
    """Validation rows of every source; a warning tells what of the user's own files was left out or changed.

    Raises:
        DataError: a source has nothing that could be scored, or a packed file has fewer rows than it could have.
    """
    if isinstance(sources, PackedFile):
        if config.eval_rows > (most := sources.header["eval_rows"]):
            raise DataError(
                f"{sources.path} was packed with {most} held-out rows a source, eval_rows is {config.eval_rows}; "
                f"set eval_rows={most}, or pack it again"
            )
        rows = {name: sources.held_out(name)[: config.eval_rows] for name in sources.sources}
    else:
        rows = {
            name: [later(marked(row)) for row in source.held_out("validation", config.eval_rows)]
            for name, source in sources.items()
        }
        for tally in (source.tally for source in sources.values()):
            if tally and (tally.skipped or tally.notes):
                log.warning("%s", tally)
    for name, part in rows.items():
        if not any(any(roles) for row in part for roles in row.roles):
            raise DataError(f"source {name} has no validation rows with anything to score; give it more data")
    return rows


def later(row: Row) -> Row:
    """The row with only its later segments scored, which have something to remember."""
    return scored_from(row, min(4, len(row.segments) // 2))


class PackedRows:
    """Endless batches of the rows of a packed file, in a new order each epoch.

    Batches are as full as their order allows; where an epoch ends within one, rows of the next fill it up.

    Args:
        file: the rows.
        tokens_per_batch: most tokens of a batch, all rows together; longer rows are left out.
        max_rows: most rows of a batch.
        seed: of the orders.
        rank, world: which process this is, of how many; it takes every ``world``-th batch.

    Attributes:
        served: batches that all processes together have taken; it may be set, and is the whole state.

    Raises:
        ConfigError: every row is longer than ``tokens_per_batch``.
    """

    def __init__(
        self, file: PackedFile, tokens_per_batch: int, max_rows: int, seed: int, rank: int = 0, world: int = 1
    ):
        self.file, self.tokens_per_batch, self.max_rows, self.seed = file, tokens_per_batch, max_rows, seed
        self.rank, self.world, self.served = rank, world, 0
        self._lengths = file.lengths
        self._fitting = np.flatnonzero(self._lengths <= tokens_per_batch)
        if left := len(file) - len(self._fitting):
            words = f"{left:,} of {len(file):,} rows of {file.path} are longer than {tokens_per_batch} tokens"
            if not len(self._fitting):
                raise ConfigError(f"{words}; set tokens_per_batch to at least {self._lengths.min()}")
            log.warning("%s and left out", words)
        self._begin()

    def _begin(self) -> None:
        self._epoch, self._first = 0, 0
        self._batches: list[Array] = []
        self._rest = self._fitting[:0]

    def __iter__(self) -> Iterator[list[ArrayRow]]:
        return self

    def __next__(self) -> list[ArrayRow]:
        number = self.served + self.rank
        if number < self._first:
            self._begin()
        while number >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._cut_epoch()
        self.served += self.world
        return [self.file.row(index) for index in self._batches[number - self._first]]

    def _cut_epoch(self) -> None:
        """The batches of the next epoch; rows that fill none at its end wait for the one after."""
        order = self._fitting.tolist()
        random.Random(f"{self.seed}-{self._epoch}").shuffle(order)
        order = np.concatenate([self._rest, order])
        ends = np.cumsum(self._lengths[order])
        self._batches, start, filled = [], 0, 0
        while True:
            full = int(np.searchsorted(ends, filled + self.tokens_per_batch, "right"))
            stop = min(full, start + self.max_rows)
            if stop == len(order):
                break
            self._batches.append(order[start:stop])
            start, filled = stop, int(ends[stop - 1])
        self._rest = order[start:]
        self._epoch += 1

    def close(self) -> None:
        """Nothing draws rows ahead of time."""
