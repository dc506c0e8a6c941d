"""Reading ``results/eval/*.json`` and finding rows in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, DataError
from ..summary import LEADERBOARD, WORTH

SCHEMA = 1
#: Resampling fewer items than this says nothing.
FEW = 5
#: A step as large as this is no number of segments: streams count the tokens that were read.
STREAM_STEP = 1024
#: Metrics and their titles, in the order in which a task's main one is chosen.
TITLES = {
    "score": "score",
    "accuracy": "accuracy",
    "f1": "F1",
    "em": "exact match",
    "rouge_l": "ROUGE-L",
    "perplexity": "perplexity",
    "recovered_share": "recovered share",
}


class Estimate(NamedTuple):
    """A number with its 95 % interval, and whether it rests on ``FEW`` items."""

    value: float
    low: float
    high: float
    sure: bool = True

    @property
    def verdict(self) -> str:
        """Of a difference: "open" has both signs in its interval, is nothing but 0, or rests on too little."""
        if not self.sure or self.low == self.high == 0:
            return "open"
        return "held" if self.low >= 0 else "not held" if self.high <= 0 else "open"


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        task, method, metric: names.
        step: segments in the memory, in streams tokens read.
        tag: kind of query; "" is all of them.
        value, ci_low, ci_high: the number and its 95 % interval.
        n: items behind it.
        kv_bytes, peak_kv_bytes: of the keys and values read at this step (mean), and the most that was held.
        fold_seconds, ttft_seconds: to take in a segment, and to the first token.
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
    kv_bytes: float = 0.0
    peak_kv_bytes: float = 0.0
    fold_seconds: float = 0.0
    ttft_seconds: float = 0.0

    @property
    def estimate(self) -> Estimate:
        """The value with its interval, and whether it rests on items enough."""
        low, high = (self.value if end is None else end for end in (self.ci_low, self.ci_high))
        return Estimate(self.value, low, high, self.n >= FEW)


@dataclass(frozen=True)
class Results:
    """One file: the rows of a suite, and all else in it, such as model, adapters, versions."""

    suite: str
    rows: tuple[Row, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _index(self) -> dict[tuple[str, str, str], dict[str, list[Row]]]:
        found: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
        for row in sorted(self.rows, key=lambda row: (self.methods.index(row.method), row.step)):
            found.setdefault((row.task, row.metric, row.tag), {}).setdefault(row.method, []).append(row)
        return found

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows if row.metric in TITLES))

    @cached_property
    def methods(self) -> list[str]:
        """Names, "none" and "full" first, the others as they come in the file."""
        names = dict.fromkeys(row.method for row in self.rows)
        return sorted(names, key=lambda name: ("none", "full", name).index(name))  # stable

    def of(self, task: str, metric: str, tag: str = "") -> dict[str, list[Row]]:
        """method -> its rows of a task and metric by rising step; methods without any are left out."""
        return self._index.get((task, metric, tag), {})

    def steps(self, task: str, metric: str, tag: str = "") -> list[int]:
        """Time steps at which the metric was measured."""
        return sorted({row.step for rows in self.of(task, metric, tag).values() for row in rows})

    def get(self, task: str, method: str, metric: str, step: int, tag: str = "") -> Row | None:
        """The row of a method at a step; None if it was not measured."""
        return next((row for row in self.of(task, metric, tag).get(method, ()) if row.step == step), None)

    def last(self, task: str, method: str, metric: str, tag: str = "") -> Row | None:
        """A method's row at the last step that the task has."""
        steps = self.steps(task, metric, tag)
        return self.get(task, method, metric, steps[-1], tag) if steps else None

    def tags(self, task: str) -> list[str]:
        """Kinds of query, numbers in them by their size."""
        tags = {row.tag for row in self.rows if row.task == task and row.tag}
        return sorted(tags, key=lambda tag: re.sub(r"\d+", lambda digits: digits[0].zfill(9), tag))

    def is_stream(self, task: str) -> bool:
        """Whether the task is a text without end, scored block by block."""
        return self.steps(task, self.main(task))[-1] >= STREAM_STEP

    def main(self, task: str) -> str:
        """What a task measures first."""
        return next(metric for metric in TITLES if self.of(task, metric))

    def yardstick(self, task: str) -> str:
        """What tells methods apart: the recovered share in place of perplexities, but for streams."""
        main = self.main(task)
        shares = main == "perplexity" and not self.is_stream(task) and self.of(task, "recovered_share")
        return "recovered_share" if shares else main

    def worth(self, task: str) -> Estimate | None:
        """What full context gains over none at the last step; None if it is not known."""
        row = self.last(task, "full", self.main(task) + WORTH)
        return row.estimate if row else None

    def nothing_to_keep(self, task: str) -> bool:
        """Whether full context is no better than none at the last step: the interval of its gain holds 0."""
        worth = self.worth(task)
        return worth is not None and worth.low <= 0


def load(paths: Sequence[Path]) -> list[Results]:
    """The results of files, and of folders with files of ``ccm eval`` in them or in their ``eval``, by suite.

    Of a folder, what ``ccm leaderboard`` stored is left out: it has a page of its own.

    Raises:
        DataError: no such file, none in a folder, or a file that is not what it should be; names file and key.
        ConfigError: two files of one suite.
    """
    files: list[Path] = []
    for path in paths:
        inside = path / "eval" if (path / "eval").is_dir() else path
        found = [file for file in sorted(inside.glob("*.json")) if not _is_leaderboard(file)]
        found = found if path.is_dir() else [path]
        if not found:
            raise DataError(
                f"{inside}: no *.json in this folder; run ccm eval quick first, or name other files"
            )
        files += found
    by_suite: dict[str, tuple[Path, Results]] = {}
    for file in dict.fromkeys(files):
        results = read(file)
        if results.suite in by_suite:
            other = by_suite[results.suite][0]
            raise ConfigError(f"{other} and {file} both hold suite {results.suite!r}; name one")
        by_suite[results.suite] = file, results
    return [by_suite[suite][1] for suite in sorted(by_suite)]


def _is_leaderboard(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("suite") == LEADERBOARD


def read(path: Path) -> Results:
    """One file.

    Raises:
        DataError: it cannot be read, or a key is missing or wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or folder; ccm eval SUITE writes one") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON as ccm eval writes it ({error})") from error
    if _value(content, "schema", "int", f"{path}") != SCHEMA:
        raise DataError(f"{path}: schema is {content['schema']}, expected {SCHEMA}")
    if content.get("suite") == LEADERBOARD:
        raise DataError(f"{path} is of ccm leaderboard, which has written its page; expected one of ccm eval")
    suite, rows = (_value(content, *key, f"{path}") for key in (("suite", "str"), ("rows", "list")))
    if not rows:
        raise DataError(f"{path}: rows is empty, expected at least one")
    parsed: dict[tuple[Any, ...], Row] = {}
    for i, entry in enumerate(rows):
        row = _row(entry, f"{path}: rows[{i}]")
        if parsed.setdefault((row.task, row.method, row.step, row.tag, row.metric), row) is not row:
            raise DataError(f"{path}: rows[{i}] is there twice ({row.task}, {row.method}, {row.metric})")
    about = {key: value for key, value in content.items() if key not in ("schema", "suite", "rows")}
    return Results(suite, tuple(parsed.values()), about)


def _row(row: Any, where: str) -> Row:
    values = {
        entry.name: _value(row, entry.name, str(entry.type).split(" | ")[0], where)
        for entry in fields(Row)
        if entry.default is MISSING or (isinstance(row, dict) and row.get(entry.name) is not None)
    }
    if values["metric"] == "perplexity" and min(values["value"], values.get("ci_low", 1)) <= 0:
        raise DataError(f"{where}: value or ci_low of a perplexity is not above 0")
    return Row(**values)


_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a finite number"),
    "list": (list, "a list"),
}


def _value(content: Any, key: str, kind: str, where: str) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise DataError(f"{where}: key {key!r} is missing")
    value, (expected, name) = content[key], _KINDS[kind]
    good = isinstance(value, expected) and not isinstance(value, bool)
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{where}: {key} is {value!r}, expected {name}")
    return value
