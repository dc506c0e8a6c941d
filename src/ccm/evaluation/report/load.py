"""Reading ``results/eval/*.json`` and finding rows in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        task, method: names.
        step: segments in the memory, in streams tokens read.
        tag: kind of query; "" is all of them.
        metric: "perplexity", "accuracy", "recovered_share", ...
        value, ci_low, ci_high: the number and its 95 % interval.
        n: items behind it.
        kv_bytes: mean bytes of the keys and values that were read at this step.
        peak_kv_bytes: the most that was held.
        fold_seconds, ttft_seconds, seconds: to take in a segment, to the first token, of the whole.
    """

    task: str
    method: str
    step: int
    tag: str
    metric: str
    value: float
    n: int
    ci_low: float | None = None
    ci_high: float | None = None
    kv_bytes: float | None = None
    peak_kv_bytes: float | None = None
    fold_seconds: float | None = None
    ttft_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Results:
    """One file: the rows of a suite, and how they were made.

    Attributes:
        suite: name.
        rows: all of them, in the order of the file.
        about: everything else in the file, such as model, adapters, seeds, versions.
        skipped: method -> why it has no rows.
        warnings: what a reader of the rows must know.
    """

    suite: str
    rows: tuple[Row, ...]
    about: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @cached_property
    def _index(self) -> dict[tuple[str, str, int, str, str], Row]:
        return {(row.task, row.method, row.step, row.tag, row.metric): row for row in self.rows}

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))

    @cached_property
    def methods(self) -> list[str]:
        """Names, "none" and "full" first, the others as they come in the file."""
        names = dict.fromkeys(row.method for row in self.rows)
        ends = [name for name in ("none", "full") if name in names]
        return ends + [name for name in names if name not in ends]

    def get(self, task: str, method: str, step: int, metric: str, tag: str = "") -> Row | None:
        return self._index.get((task, method, step, tag, metric))

    def of(self, task: str, metric: str, tag: str = "") -> dict[str, list[Row]]:
        """method -> its rows of a task and metric by rising step; methods without any are left out."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if (row.task, row.metric, row.tag) == (task, metric, tag):
                found.setdefault(row.method, []).append(row)
        return {m: sorted(found[m], key=lambda row: row.step) for m in self.methods if m in found}

    def steps(self, task: str, metric: str, tag: str = "") -> list[int]:
        return sorted({row.step for rows in self.of(task, metric, tag).values() for row in rows})

    def last(self, task: str, method: str, metric: str, tag: str = "") -> Row | None:
        """A method's row at the last step that the task has."""
        steps = self.steps(task, metric, tag)
        return self.get(task, method, steps[-1], metric, tag) if steps else None

    def tags(self, task: str) -> list[str]:
        """Kinds of query, numbers in them by their size."""
        tags = {row.tag for row in self.rows if row.task == task and row.tag}
        return sorted(tags, key=lambda tag: re.sub(r"\d+", lambda digits: digits[0].zfill(9), tag))

    def items(self, task: str, metric: str, step: int, tag: str = "") -> int:
        """Items behind the numbers of a step, the most that a method has."""
        key = task, metric, step, tag
        return max(row.n for row in self.rows if (row.task, row.metric, row.step, row.tag) == key)

    def no_effect(self) -> list[tuple[str, str]]:
        """(method, task) where the memory changed nothing."""
        return [(row.method, row.task) for row in self.rows if row.metric == "no_effect" and row.value]


def load(paths: Sequence[Path]) -> list[Results]:
    """The results of files, and of folders with ``*.json`` in them, by name of the suite.

    Raises:
        DataError: no such file, none in a folder, or a file that is not what it should be; names file and key.
        ConfigError: two files of one suite.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: no *.json in this folder; run ccm eval quick first")
        files += found
    results = {file: read(file) for file in dict.fromkeys(files)}
    by_suite: dict[str, Path] = {}
    for file, result in results.items():
        if result.suite in by_suite:
            raise ConfigError(
                f"{by_suite[result.suite]} and {file} both hold suite {result.suite!r}; name one"
            )
        by_suite[result.suite] = file
    return sorted(results.values(), key=lambda result: result.suite)


def read(path: Path) -> Results:
    """One file.

    Raises:
        DataError: it cannot be read, or a key is missing or wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; ccm eval SUITE writes one") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON as ccm eval writes it ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {_kind(content)}, expected an object with schema, suite and rows")
    if content.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema is {content.get('schema')!r}, expected {SCHEMA}")
    suite = _value(content, "suite", str, f"{path}")
    rows = _value(content, "rows", list, f"{path}")
    skipped = _value({"skipped": {}, **content}, "skipped", dict, f"{path}")
    warnings = _value({"warnings": [], **content}, "warnings", list, f"{path}")
    if not rows:
        raise DataError(f"{path}: rows is empty, expected at least one")
    parsed = tuple(_row(row, f"{path}: rows[{i}]") for i, row in enumerate(rows))
    seen: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(parsed):
        key = (row.task, row.method, row.step, row.tag, row.metric)
        if key in seen:
            raise DataError(f"{path}: rows[{i}] and rows[{seen[key]}] are both {' / '.join(map(str, key))}")
        seen[key] = i
    told = ("schema", "suite", "rows", "skipped", "warnings")
    about = {k: v for k, v in content.items() if k not in told}
    return Results(
        suite, parsed, about, {str(k): str(v) for k, v in skipped.items()}, tuple(map(str, warnings))
    )


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {_kind(row)}, expected an object")
    types: dict[str, type | tuple[type, ...]] = {"str": str, "int": int}
    values = {}
    for entry in fields(Row):
        if entry.default is not MISSING and row.get(entry.name) is None:
            continue
        values[entry.name] = _value(row, entry.name, types.get(str(entry.type), (int, float)), where)
    if values["metric"] == "perplexity" and min(values["value"], values.get("ci_low", 1)) <= 0:
        raise DataError(f"{where}: value or ci_low of a perplexity is not above 0")
    return Row(**values)


def _value(content: Mapping[str, Any], key: str, expected: type | tuple[type, ...], where: str) -> Any:
    if key not in content:
        raise DataError(f"{where}: key {key!r} is missing")
    value = content[key]
    kinds = expected if isinstance(expected, tuple) else (expected,)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        names = " or ".join(_NAMES[kind] for kind in kinds)
        shown = value if isinstance(value, int | float | str | bool | None) else _kind(value)
        raise DataError(f"{where}: {key} is {shown!r}, expected {names}")
    return value


_NAMES = {
    str: "text", int: "a whole number", float: "a finite number", list: "a list", dict: "an object",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def _kind(value: Any) -> str:
    return _NAMES[type(value)]


def all_methods(results: Iterable[Results]) -> list[str]:
    """Every method of several files once, "none" and "full" first."""
    return list(dict.fromkeys(name for result in results for name in result.methods))
