"""What ``ccm eval`` shows: figures of a task while it is measured and when it is done, and single questions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from rich import box
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..evaluation import runner, summary
from ..evaluation.items import Choice, Generation, Item, Likelihood, Query
from ..evaluation.metrics import frontier

#: Seconds between two looks at figures that are not whole yet.
_PACE = 3.0
#: What a task is told by, the first that it has; of perplexities less is better.
_MAIN = ("accuracy", "f1", "perplexity")
#: Most letters of a text that was asked or answered.
_LETTERS = 300

_B = TypeVar("_B", bound="Bar")


class Bar:
    """Progress, and what is left of the time; where nobody sees a bar move, a line for every tenth."""

    def __init__(self, console: Console):
        self.console = console
        columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=None)
        self._live = Live(self._bar, console=console, transient=True)
        self._begun = time.monotonic()
        self._first: int | None = None
        self._left = ""
        self._tenths, self._said = 0, False

    def __enter__(self: _B) -> _B:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def on_progress(self, place: runner.Progress) -> None:
        """See :meth:`ccm.evaluation.runner.Evaluation.run`."""
        where = f"{place.task} · {place.method} · {place.item}"
        self._bar.update(self._task, completed=place.done, total=place.total, description=where)
        if self._first is None:
            self._first, self._begun = place.done, time.monotonic()
        if done := place.done - self._first:
            minutes = (time.monotonic() - self._begun) / done * (place.total - place.done) / 60
            share = f"{place.done / place.total:.0%} measured"
            self._left = f"{share}, about {max(1, round(minutes))} min left" if minutes else share
            self._tenths, before = 10 * place.done // place.total, self._tenths
            self._said |= self._tenths > before

    def on_record(self, task: str, records: list[dict[str, Any]], complete: bool) -> None:
        """See :meth:`ccm.evaluation.runner.Evaluation.run`."""
        if self._said and not self.console.is_terminal:
            self.console.print(self._left)
        self._said = False


class View(Bar):
    """The same, and the figures of the task in hand; whole tasks stay on the screen."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._shown: set[str] = set()
        self._looked = time.monotonic()

    def on_record(self, task: str, records: list[dict[str, Any]], complete: bool) -> None:
        """See :meth:`ccm.evaluation.runner.Evaluation.run`."""
        if task in self._shown or not (complete or time.monotonic() - self._looked > _PACE):
            return
        table = figures(task, summary.rows(records), short=not complete)
        if complete:
            self._shown.add(task)
            self.console.print(table)
            if not self.console.is_terminal and self._left:
                self.console.print(self._left)
        self._live.update(self._bar if complete else Group(table, self._bar))
        self._looked = time.monotonic()


def figures(task: str, rows: Sequence[Mapping[str, Any]], short: bool = False) -> Group:
    """A task at its last step: what full context is worth there, and every method with the items behind it.

    Args:
        task: its name.
        rows: see :func:`ccm.evaluation.summary.rows`.
        short: one metric alone.
    """
    last = max((row["step"] for row in rows), default=0)
    now = [row for row in rows if row["step"] == last and not row["tag"]]
    main = next((name for name in _MAIN if any(row["metric"] == name for row in now)), "")
    worth = next((row for row in now if row["metric"] == main + summary.WORTH), None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")  # long names give way, figures do not
    table.add_column("metric", no_wrap=True)
    for name in ("value", "95 % CI", "n", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    title = Text(f"{task}, step {last}{_worth(worth)}", style="bold cyan")
    best, method = frontier(_points(now, main)), None
    for row in now:
        by_definition = row["metric"] == "recovered_share" and row["method"] in ("none", "full")
        if " " in row["metric"] or by_definition or (short and row["metric"] != main):
            continue
        first, method = row["method"] != method, row["method"]
        known = row["ci_low"] is not None and row["ci_high"] is not None
        nothing = row["metric"] == "recovered_share" and worth is not None and not kept(worth)
        table.add_row(
            f"{method}{' *' if method in best else ''}" if first else "",
            row["metric"].replace("_", " "),
            "nothing to keep" if nothing else f"{row['value']:.3f}",
            f"{row['ci_low']:.2f}, {row['ci_high']:.2f}" if known and not nothing else "",
            str(row["n"]),
            decimal(round(row["kv_bytes"])) if first else "",
        )
    if best:
        table.caption = "* nothing with as few KV bytes is as good; it begins at no memory"
        table.caption_justify = "left"
    return Group(title, table)


def kept(worth: Mapping[str, Any]) -> bool:
    """Whether full context is better than none: the whole interval of the gain is above 0; of one item, the gain."""
    return bool((worth["value"] if worth["ci_low"] is None else worth["ci_low"]) > 0)


def _worth(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    ends = "one item" if row["ci_low"] is None else f"{row['ci_low']:+.2f} to {row['ci_high']:+.2f}"
    if kept(row):
        return f": full context gains {row['value']:.2f} over none ({ends})"
    return f": nothing to keep, full context is no better than none ({row['value']:+.2f}, {ends})"


def _points(rows: Sequence[Mapping[str, Any]], main: str) -> dict[str, tuple[float, float]]:
    """method -> KV bytes and quality."""
    sign = -1 if main == "perplexity" else 1
    return {row["method"]: (row["kv_bytes"], sign * row["value"]) for row in rows if row["metric"] == main}


# ---------------------------------------------------------------------- single questions


def questions(
    task: str, item: Item, records: Mapping[str, Mapping[str, Any]], tokenizer: Any
) -> Iterator[Text]:
    """What was asked at the last step of an item, and what every method answered.

    Args:
        task: its name.
        item: what arrived, and what was asked.
        records: method -> its record of the item.
        tokenizer: of the model.
    """
    step = max(item.queries, default=0)
    for index, query in enumerate(item.queries.get(step, ())):
        yield Text(f"{task} · {item.name} · after {step} segments", style="bold cyan")
        asked, right = _asked(query, tokenizer)
        yield Text(f"  asked: {asked}")
        yield Text(f"  right: {right}")
        for method, record in records.items():
            if "error" in record:
                yield Text(f"  {method}: left out, {record['error']}")
            for found in record.get("queries", ()):
                if (found["step"], found["index"]) == (step, index):
                    yield Text(f"  {method}: {_answered(query, found, tokenizer)}")


def _asked(query: Query, tokenizer: Any) -> tuple[str, str]:
    if isinstance(query, Likelihood):
        start, stop = query.scored
        return "the next text, by its likelihood", _text(query.ids[start:stop], tokenizer)
    asked = _text(query.prompt, tokenizer)
    if isinstance(query, Choice):
        options = " | ".join(_text(option, tokenizer) for option in query.options)
        return f"{asked} [{options[:_LETTERS]}]", _text(query.options[query.answer], tokenizer)
    return asked, " | ".join(query.answers)


def _answered(query: Query, found: Mapping[str, Any], tokenizer: Any) -> str:
    if isinstance(query, Likelihood):
        return f"{found['nll'] / max(1, found['tokens']):.2f} nats per token"
    if isinstance(query, Generation):
        return f"{found['text']!r} (F1 {found['f1']:.2f})"
    mark = "right" if found["correct"] else "wrong"
    return f"{_text(query.options[found['chosen']], tokenizer)} ({mark})"


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """Of token ids, in one line; the end of a long text counts, for that is where the question stands."""
    text = " ".join(tokenizer.decode(list(ids), skip_special_tokens=True).split())
    return text if len(text) <= _LETTERS else f"…{text[-_LETTERS:]}"
