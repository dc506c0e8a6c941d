"""The pages: ``results.md`` with the figures that decide, and ``results/SUITE.md`` with those of a suite."""

from __future__ import annotations

from collections.abc import Sequence

from . import benchmarks, brief, tables
from .figures import draw
from .load import Results

PAGE, FOLDER = "results.md", "results"

_SUMMARY = """\
These pages are written by `ccm report` from the files in `results`; nothing on them is typed by hand.

*Recovered share* is how much of what full context gains over no context a memory keeps: 0 is no context, 1 is full
context. KV bytes are those of the tensors that live tokens attend to. Brackets and small numbers are 95 % intervals,
by bootstrap over items."""

_SUITES = """\
## Suites of `ccm eval`

How much more a memory reaches at the last step than a window that is cut to its bytes before every segment: paired
differences in recovered share, accuracy or F1, in streams in nats per token. Held and not held say that the interval
is on one side of 0, and rests on five items or more."""

_GLANCE = """\
Small numbers are 95 % intervals by bootstrap over items. Recovered share is how much of what full context gains over
no context a method keeps; where the interval of that gain holds 0, there is nothing to keep. `A@B` is method A cut,
before every segment, to as many keys and values as B holds. What a method takes is a mean over tasks at their last
step. Bold is the Pareto frontier of a task: nothing with as few KV bytes is as good. It begins at no memory."""

_CLAIMS = """\
How much better the left side is at the last step, paired over items; in streams over their blocks, in nats per token;
with growth and against no context, of perplexities the gain in nats per token. Open is what has both signs in its
interval, is nothing but 0, or rests on fewer than five items. Where `full` > `none` is not held, a memory has little
to keep."""


def build(results: Sequence[Results], stored: benchmarks.Stored) -> dict[str, bytes]:
    """All pages and pictures by their path.

    Args:
        results: of the suites.
        stored: of the benchmarks.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    pictures = {f"{FOLDER}/{result.suite}.png": draw(result) for result in results}
    return pictures | {name: text.encode() for name, text in write(results, stored).items()}


def write(results: Sequence[Results], stored: benchmarks.Stored) -> dict[str, str]:
    """The pages alone."""
    pages = {PAGE: _summary(results, stored)}
    pages |= {f"{FOLDER}/{result.suite}.md": _suite(result) for result in results}
    return {name: "\n\n".join(filter(None, parts)) + "\n" for name, parts in pages.items()}


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _summary(results: Sequence[Results], stored: benchmarks.Stored) -> list[str]:
    parts = ["# Results", _lines(brief.summary(stored)), _SUMMARY, *benchmarks.sections(stored), _SUITES]
    for result in results:
        parts.append(f"### [{result.suite}]({FOLDER}/{result.suite}.md): {', '.join(result.tasks)}")
        against = {claim: of for claim, of in tables.claims(result).items() if "@" in claim}
        parts.append(tables.claims_table(against) if against else "")
    return parts


def _suite(results: Results) -> list[str]:
    name, claims = results.suite, tables.claims(results)
    parts = [
        f"# Suite `{name}`",
        _lines(brief.suite(results)),
        f"Written by `ccm report`; [all results](../{PAGE}).",
        _GLANCE,
    ]
    notes = [f"`{method}` has no rows: {why}" for method, why in results.about.get("skipped", {}).items()]
    notes += results.about.get("warnings", [])
    parts += [tables.glance(results), "\n".join(f"- {note}." for note in notes), f"![{name}]({name}.png)"]
    if claims:
        verdicts = [d.verdict for claim, of in claims.items() if claim[:6] != "`full`" for d in of.values()]
        held, failed, undecided = map(verdicts.count, ("held", "not held", "open"))
        count = f"Of {len(verdicts)} comparisons {held} held, {failed} did not, {undecided} are open."
        parts += ["## What the paper shows, here", _CLAIMS, count, tables.claims_table(claims)]
    for title, table in (("time step", tables.by_step(results)), ("kind of query", tables.by_kind(results))):
        parts += [f"## By {title}", table] if table else []
    for task in filter(results.is_stream, results.tasks):
        parts += [f"## {task}: perplexity by position", tables.stream(results, task)]
    return [*parts, "## How it was made", tables.about(results)]
