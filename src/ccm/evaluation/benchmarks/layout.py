"""Files of others: where they are, what they hold, and one line that says what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...data.logs import short, whole
from ...errors import DataError, needing

#: Files named in a message at most.
_NAMED = 5
_TYPES: dict[type, str] = {list: "a list", dict: "an object"}


def find(data: Path, patterns: Sequence[str], download: str) -> list[Path]:
    """Files below a folder whose names fit the first pattern that any fits, in order of their paths.

    Args:
        data: a folder, or the file itself.
        patterns: of names, or of the ends of paths, as ``Path.match`` has them.
        download: what is to be had where, for the message.

    Raises:
        DataError: there is no such file.
    """
    if data.is_file():
        return [data]
    if not data.exists():
        raise DataError(
            f"{data} is not there, expected a folder with {' or '.join(patterns)}: download {download}"
        )
    there = sorted(path for path in data.rglob("*") if path.is_file())
    for pattern in patterns:
        if found := [path for path in there if path.match(pattern)]:
            return found
    names = ", ".join(str(path.relative_to(data)) for path in there[:_NAMED]) or "no file"
    more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
    raise DataError(f"{data} holds {names}{more}, expected {' or '.join(patterns)}: download {download}")


def digest(paths: Sequence[Path]) -> str:
    """A hash of the contents of files, so that a changed file is another task."""
    hashes = [_digest(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    own = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            own.update(block)
    return own.hexdigest()


# ---------------------------------------------------------------------- what files hold


def records(path: Path) -> Iterator[Record]:
    """The records of a .json file that holds a list, of lines of JSON (.jsonl, .txt), or of a .parquet file.

    Raises:
        DataError: it cannot be read.
        MissingPackageError: pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        yield from (Record(row, f"{path.name}, row {k}") for k, row in enumerate(_parquet(path), 1))
    elif path.suffix in (".jsonl", ".txt"):
        with _opened(path) as lines:
            for k, line in enumerate(lines, 1):
                if line.strip():
                    yield Record(_json(line, f"{path.name}, line {k}"), f"{path.name}, line {k}")
    else:
        yield from listed(path)


def listed(path: Path) -> Iterator[Record]:
    """The records of a .json file, which must hold a list of them."""
    with _opened(path) as file:
        content = _json(file.read(), path.name)
    if not isinstance(content, list):
        raise DataError(f"{path.name} holds {short(content)}, expected a list of records")
    yield from (Record(record, f"{path.name}, record {k}") for k, record in enumerate(content, 1))


def one(path: Path) -> Record:
    """The one record of a .json file."""
    with _opened(path) as file:
        return Record(_json(file.read(), path.name), path.name)


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): download it again") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with needing(f"{path.name} needs pyarrow", "eval"):
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1):
            yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{path.name} is no parquet file ({error}): download it again") from error


class Record:
    """An object of a file, whose fields are checked when they are read.

    Attributes:
        value: the object.
        where: the file, and the place in it.
    """

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise DataError(f"{where} is {short(value)}, expected an object")
        self.value, self.where = value, where

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def text(self, key: str) -> str:
        """A field that holds a text that is not empty; numbers are written out.

        Raises:
            DataError: it does not.
        """
        value = self.value.get(key)
        if type(value) in (int, float):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, "a text")
        return whole(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that holds a list of texts, or one text.

        Raises:
            DataError: it does not.
        """
        values = self.value.get(key)
        values = values if isinstance(values, list) else [values]
        if not values or any(type(value) not in (str, int, float) or value == "" for value in values):
            raise self.wrong(key, "a text or a list of texts")
        return tuple(whole(str(value)) for value in values)

    def many(self, key: str) -> list[Any]:
        """A field that holds a list.

        Raises:
            DataError: it does not.
        """
        return self._typed(key, list)

    def object(self, key: str) -> Record:
        """A field that holds an object.

        Raises:
            DataError: it does not.
        """
        return Record(self._typed(key, dict), f"{self.where}: {key}")

    def objects(self, key: str) -> list[Record]:
        """A field that holds a list of objects.

        Raises:
            DataError: it does not.
        """
        return [Record(value, f"{self.where}: {key}[{k}]") for k, value in enumerate(self._typed(key, list))]

    def wrong(self, key: str, expected: str) -> DataError:
        """The error of a field that is not as expected."""
        got = f"is {short(self.value[key])}" if key in self.value else "is missing"
        return DataError(f"{self.where}: {key} {got}, expected {expected}")

    def _typed(self, key: str, kind: type) -> Any:
        if not isinstance(self.value.get(key), kind):
            raise self.wrong(key, _TYPES[kind])
        return self.value[key]
