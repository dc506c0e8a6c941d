"""``ccm data pack``: the rows of a run drawn once, into one file that trains anywhere.

Rows are drawn in parts of their own seeds, so that the file is the same whatever number of processes draws them.
Until it is whole, the parts lie in a folder beside it, each written as a whole or not at all; the same command goes
on.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..data.ahead import Ahead
from ..data.mixture import Mixture
from ..errors import ConfigError, DataError, StorageError
from ..files.atomic import write_atomically
from .config import TrainConfig
from .packed import ArrayRow, PackedFile, Table, encoded, ids_type, tokenizer_identity
from .rows import held_out_rows, open_sources
from .targets import marked

#: Tokens of a part.
PART = 2**17


@dataclass(frozen=True)
class Parts:
    """Makes the part of a number: the bytes of a packed file without held-out rows."""

    mixture: Mixture
    made_of: dict[str, Any]
    tokens: int

    def __call__(self, number: int) -> bytes:
        rng = random.Random(f"{self.mixture.seed}-{number}")
        rows: list[ArrayRow] = []
        places: list[int] = []
        tokens = 0
        while tokens < self.tokens:
            place, row = self.mixture.draw(rng)
            places.append(place)
            rows.append(ArrayRow.from_row(marked(row)))
            tokens += row.tokens
        table = Table.of(rows, places, ids_type(self.made_of["tokenizer"]))
        return encoded(table, self.made_of, len(rows), [0] * len(self.mixture.sources))


def pack(
    config: TrainConfig,
    tokenizer: Any,
    tokens: int,
    out: Path,
    processes: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> PackedFile:
    """Draw rows of a run's mixture until there are ``tokens`` of them, and its held-out rows, into a file.

    Args:
        config: the run; data, seed, tokens_per_batch (the longest row) and eval_rows count.
        out: the file; one that is finished already is left as it is.
        processes: how many draw beside this one; 0 draws here.
        on_progress: is told the tokens that are there: once for all of an earlier run, then part by part.

    Raises:
        ConfigError: the file, or the parts beside it, are of other settings.
        DataError: the data cannot be read, or a source has nothing to score.
        StorageError: it cannot be written.
    """
    made_of = {
        "tokenizer": tokenizer_identity(tokenizer),
        "data": json.loads(json.dumps(config.data, default=str)),
        "seed": config.seed,
        "longest": config.tokens_per_batch,
        "eval_rows": config.eval_rows,
    }
    folder = out.with_name(f"{out.name}.part")
    asked = {**made_of, "asked": tokens}
    if out.exists():
        _check(out, asked, out)
    else:
        sources = open_sources(config, tokenizer)
        held_out = held_out_rows(config, sources)
        weights = [config.weights[name] for name in sources]
        mixture = Mixture(list(sources.values()), weights, config.tokens_per_batch, config.rows, config.seed)
        files = _drawn(
            Parts(mixture, made_of, PART), tokens, folder, processes, on_progress or (lambda done: None)
        )
        rows, places = _first(files, tokens)
        later = [(place, row) for place, part in enumerate(held_out.values()) for row in part]
        table = Table.of(
            [*rows, *(ArrayRow.from_row(row) for _, row in later)],
            [*places, *(place for place, _ in later)],
            ids_type(made_of["tokenizer"]),
        )
        write_atomically(out, encoded(table, asked, len(rows), [len(part) for part in held_out.values()]))
    shutil.rmtree(folder, ignore_errors=True)
    return PackedFile.open(out, tokenizer)


def _drawn(
    parts: Parts, tokens: int, folder: Path, processes: int, on_progress: Callable[[int], None]
) -> list[Path]:
    """Files of parts with at least so many tokens together; those that are there already are kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror or error}; give another --out") from error
    files: list[Path] = []
    done = 0

    def add(file: Path) -> None:
        nonlocal done
        files.append(file)
        done += PackedFile.open(file).tokens

    names = (folder / f"{number:06}" for number in count())
    for file in names:
        if done >= tokens or not _kept(file, parts.made_of):
            break
        add(file)
    if files:
        on_progress(min(done, tokens))
    if done < tokens:
        with _items(parts, processes, len(files)) as items:
            while done < tokens:
                file = folder / f"{len(files):06}"
                write_atomically(file, next(items))
                add(file)
                on_progress(min(done, tokens))
    return files


@contextmanager
def _items(parts: Parts, processes: int, first: int) -> Iterator[Iterator[bytes]]:
    if not processes:
        yield map(parts, count(first))
        return
    ahead = Ahead(parts, processes, first)
    try:
        yield ahead
    finally:
        ahead.close()


def _kept(file: Path, made_of: dict[str, Any]) -> bool:
    """Whether a part is there and whole.

    Raises:
        ConfigError: it is of other settings.
    """
    try:
        PackedFile.open(file)
    except DataError:
        return False
    _check(file, made_of, file.parent)
    return True


def _check(file: Path, made_of: dict[str, Any], where: Path) -> None:
    """Raise ConfigError unless a file is whole and of these settings; it names those that differ."""
    advice = "delete it, or give another --out"
    try:
        header = PackedFile.open(file).header
    except DataError as error:
        raise ConfigError(f"{where} is there already, and not whole; {advice} ({error})") from error
    if different := [
        key if isinstance(value, dict) else f"{key}: it has {header.get(key)}, got {value}"
        for key, value in made_of.items()
        if header.get(key) != value
    ]:
        raise ConfigError(f"{where} was packed with other settings ({'; '.join(different)}); {advice}")


def _first(files: list[Path], tokens: int) -> tuple[list[ArrayRow], list[int]]:
    """The first rows of the parts until there are so many tokens, and the places of their sources."""
    rows: list[ArrayRow] = []
    places: list[int] = []
    there = 0
    for part in map(PackedFile.open, files):
        for index in range(len(part)):
            if there >= tokens:
                return rows, places
            rows.append(part.row(index))
            places.append(part.source(index))
            there += rows[-1].tokens
    return rows, places
