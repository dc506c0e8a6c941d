"""Rows to learn from and rows to judge by, from the sources that a run names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

from ..data.mixture import Mixture
from ..data.rows import ConversationRow
from ..data.sources import Source, get_source
from ..errors import DataError
from .config import TrainConfig
from .targets import Row, marked, scored_from

log = logging.getLogger(__name__)


class Stream(Protocol):
    """Endless batches; ``served``, the batches that all processes have taken, is the whole state."""

    served: int

    def __iter__(self) -> Iterator[list[ConversationRow]]: ...

    def close(self) -> None:
        """End whatever draws rows ahead of time."""


def open_sources(config: TrainConfig, tokenizer: Any) -> dict[str, Source]:
    """The sources of a run by name; missing data is downloaded.

    Raises:
        UnknownNameError: no such source.
        ConfigError: an option that a source does not have.
        DataError: the data cannot be fetched or read.
    """
    return {name: get_source(name, tokenizer, **config.options(name)) for name in config.data}


def training_rows(config: TrainConfig, sources: dict[str, Source], rank: int, world: int) -> Stream:
    """The mixture of a run; together the processes see every batch once."""
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


def held_out_rows(config: TrainConfig, sources: dict[str, Source]) -> dict[str, list[Row]]:
    """Validation rows of every source; a warning tells what of the user's own files was left out or changed.

    Raises:
        DataError: a source has nothing that could be scored.
    """
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
