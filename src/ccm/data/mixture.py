"""Several sources as one endless, reproducible stream of batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count

from ..errors import ConfigError
from .ahead import Ahead
from .rows import ConversationRow
from .sources import Source

#: Batches in a pool: rows of one pool are sorted by length, so that batches hold rows of similar length.
POOL = 16
#: Rows of a source that may be too long one after the other before that is an error.
TRIES = 50


class Mixture:
    """Endless batches of rows, drawn by chance from several sources.

    Rows stay apart: a batch is a list of rows, each of which becomes one row of the model's input. The stream is the
    same for the same arguments, whatever the number of processes: process ``rank`` of ``world`` takes every
    ``world``-th batch. To go on where a stream was left, set :attr:`served`, which is its whole state.

    Args:
        sources: where rows come from.
        weights: how often a row comes from each of them; they need not sum to one.
        tokens_per_batch: most tokens of a batch, padding included: rows times the longest row. COMP tokens, which
            the compressor adds, do not count. Longer rows are drawn again.
        max_rows: most rows of a batch.
        seed: of everything that is drawn.
        rank, world: which process this is, of how many.
        workers: processes that draw rows ahead of time, so that an accelerator need not wait for them; 0 draws them
            here. The batches are the same.

    Attributes:
        served: batches that all processes together have taken from the stream; it may be set, also to what a run
            with another number of processes has reached.

    Raises:
        ConfigError: sources and weights that do not fit together, or a limit below 1; and while iterating, if a
            source has no rows of at most ``tokens_per_batch`` tokens.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        tokens_per_batch: int,
        max_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ):
        if not sources or len(sources) != len(weights):
            raise ConfigError(
                f"{len(sources)} sources and {len(weights)} weights: expected one weight for each"
            )
        if any(not 0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ConfigError(f"weights are {list(weights)}: expected numbers of at least 0, not all 0")
        if tokens_per_batch < 1 or max_rows < 1:
            raise ConfigError(
                f"tokens_per_batch is {tokens_per_batch} and max_rows {max_rows}: expected at least 1"
            )
        if not 0 <= rank < world:
            raise ConfigError(f"rank is {rank} of {world}: expected 0 to {world - 1}")
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.tokens_per_batch, self.max_rows, self.seed = tokens_per_batch, max_rows, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.served = 0
        self._number = -1
        self._batches: list[list[ConversationRow]] = []
        self._pools: Iterator[list[list[ConversationRow]]] = iter(())

    def __iter__(self) -> Iterator[list[ConversationRow]]:
        return self

    def __next__(self) -> list[ConversationRow]:
        number, place = divmod(self.served + self.rank, POOL)
        if number != self._number:
            if number != self._number + 1 or self._number < 0:
                self._pools = self._from(number)
            self._batches, self._number = next(self._pools), number
        self.served += self.world
        return self._batches[place]

    def _from(self, number: int) -> Iterator[list[list[ConversationRow]]]:
        """Pools from ``number`` on."""
        if not self.workers:
            return map(self.pool, count(number))
        bare = Mixture(self.sources, self.weights, self.tokens_per_batch, self.max_rows, self.seed)
        return Ahead(bare.pool, self.workers, number)

    def close(self) -> None:
        """End the processes that draw rows; the stream may be read on, by new ones."""
        if isinstance(self._pools, Ahead):
            self._pools.close()
        self._number, self._pools = -1, iter(())

    def pool(self, number: int) -> list[list[ConversationRow]]:
        """Pool ``number``: as many rows as fill exactly ``POOL`` batches, cut by length, in a random order."""
        rng = random.Random(f"{self.seed}-{number}")
        rows: list[ConversationRow] = []
        batches: list[list[ConversationRow]] = []
        while True:
            more = cut([*rows, self.draw(rng)[1]], self.tokens_per_batch, self.max_rows)
            if len(more) > POOL:
                rng.shuffle(batches)
                return batches
            batches = more
            rows = [row for batch in batches for row in batch]

    def draw(self, rng: random.Random) -> tuple[int, ConversationRow]:
        """One row of at most ``tokens_per_batch`` tokens, behind the place of its source."""
        place = rng.choices(range(len(self.sources)), self.weights)[0]
        source = self.sources[place]
        for _ in range(TRIES):
            row = source.draw(rng)
            if row.tokens <= self.tokens_per_batch:
                return place, row
        raise ConfigError(
            f"rows of source {source.name} are too long: {TRIES} of them had more than {self.tokens_per_batch} "
            f"tokens, the last one {row.tokens}; set tokens_per_batch higher or give the source shorter rows"
        )


def cut(rows: Sequence[ConversationRow], tokens: int, most: int) -> list[list[ConversationRow]]:
    """Rows sorted by length and cut into batches of at most ``tokens`` padded tokens and ``most`` rows.

    From the longest row down, each batch is as full as it can be, which gives the fewest batches; one more row never
    gives more than one more batch.
    """
    batches: list[list[ConversationRow]] = []
    for row in sorted(rows, key=lambda row: row.tokens, reverse=True):
        last = batches[-1] if batches else []
        if last and len(last) < most and (len(last) + 1) * last[0].tokens <= tokens:
            last.append(row)
        else:
            batches.append([row])
    return batches
