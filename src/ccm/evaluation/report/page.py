"""The page ``docs/results.md``: sentences with numbers out of rows, the tables and the figures."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import draw
from .load import Results, all_methods
from .measures import (
    FEW,
    Finding,
    Loss,
    growth,
    is_ccm,
    is_stream,
    losses,
    metrics_of,
    metrics_of_kinds,
    orderings,
)
from .tables import (
    about_table,
    costs_table,
    findings_table,
    glance,
    kinds_table,
    losses_tables,
    signed,
    steps_table,
    stream_table,
)

PAGE = "results.md"
FIGURES = "figures"

_INTRODUCTION = """\
# Results

This page is written by `ccm report` from the files in `results/eval`; nothing on it is typed by hand.

Small numbers are 95 % intervals by bootstrap over items. KV bytes are those of the tensors that live tokens attend
to, means over items. *Recovered share* is how much of what full context gains over no context a method keeps: 0 is
no context, 1 is full context. `A@B` is method A cut, before every segment, to as many keys and values as B holds."""


_NOTHING_TO_KEEP = """\
Full context itself is not surely better than none in: {tasks}. There a memory has little to keep, and a claim says
little about memories."""

_NOTHING_TO_GROW = """\
Full context itself does not surely grow in: {tasks}. There a memory has little to grow from."""

_DIFFERENCES = """\
A difference is how much better the left side is at the last step, or over all blocks of a stream, where perplexities
are compared by the logarithm of their ratio. Open means that its interval has both signs or is nothing but 0, or that
it rests on fewer than five items. The interval is by bootstrap over the items that both have answered, and for growth
with t over those that were asked at both steps; in streams it is that of the mean over blocks, which are taken to be
independent."""


def build(results: Sequence[Results]) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its figures by file name.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    methods = all_methods(results)
    figures: dict[str, bytes] = {}
    parts = [_INTRODUCTION]
    for result in results:
        drawn = draw(result, methods)
        figures.update(drawn)
        parts += _suite(result, list(drawn), _other_versions(result, results))
    return "\n\n".join(parts) + "\n", figures


def _other_versions(results: Results, others: Sequence[Results]) -> list[str]:
    """A line for every suite that has adapters of these names with other weights."""
    lines = []
    own = results.about.get("adapters", {})
    for other in others:
        theirs = other.about.get("adapters", {})
        names = [f"`{name}`" for name in own if name in theirs and theirs[name] != own[name]]
        if names:
            lines.append(
                f"- Not the adapters of suite `{other.suite}`, but other weights: {', '.join(names)}."
            )
    return lines


def _suite(results: Results, figures: Sequence[str], remarks: Sequence[str]) -> list[str]:
    name = results.suite
    plain = [task for task in results.tasks if not is_stream(results, task) and metrics_of(results, task)]
    streams = [task for task in results.tasks if is_stream(results, task)]
    parts = [f"## Suite `{name}`", "### At a glance", glance(results), *_notes(results, remarks)]
    parts += _claims(results)
    parts += [_picture(figure) for figure in figures if figure.startswith(("steps-", "pareto-"))]
    for task in plain:
        parts += _task(results, task)
    parts += [_picture(figure) for figure in figures if figure.startswith("kinds-")]
    for task in streams:
        parts += [f"### {task}: perplexity by position", stream_table(results, task)]
        parts += [
            _picture(f"{task}-{name}.png"),
            "What it costs at the last position:",
            costs_table(results, task),
        ]
    parts += _where_it_loses(results)
    parts += [f"### How `{name}` was made", about_table(results)]
    return parts


def _picture(file: str) -> str:
    return f"![{file.removesuffix('.png').replace('-', ', ', 1)}]({FIGURES}/{file})"


def _notes(results: Results, remarks: Sequence[str]) -> list[str]:
    lines = [
        *remarks,
        *(f"- `{method}` has no rows: {reason}." for method, reason in results.skipped.items()),
    ]
    told = results.warnings or [
        f"{task}: {method} changed nothing: its scores are those without any context"
        for method, task in results.no_effect()
    ]
    lines += [f"- {warning}." for warning in told]
    return ["\n".join(lines)] if lines else []


def _claims(results: Results) -> list[str]:
    parts: list[str] = []
    for title, findings, why in (
        ("What the paper shows, here", orderings(results), _NOTHING_TO_KEEP),
        (
            "Does quality grow with t? (Of perplexities: the gain over no context.)",
            growth(results),
            _NOTHING_TO_GROW,
        ),
    ):
        if any(not finding.of_full for finding in findings):
            parts += [
                f"### {title}",
                *([] if parts else [_DIFFERENCES]),
                _count(findings),
                *_why(findings, why),
                findings_table(results, findings),
            ]
    return parts


def _count(findings: Sequence[Finding]) -> str:
    claims = [finding for finding in findings if not finding.of_full]
    held, failed, undecided = (
        sum(finding.verdict == verdict for finding in claims) for verdict in ("held", "not held", "open")
    )
    return f"Of {len(claims)} comparisons {held} held, {failed} did not, {undecided} are open."


def _why(findings: Sequence[Finding], sentence: str) -> list[str]:
    """The tasks in which full context itself does not show what is asked of memories."""
    tasks = [finding.task for finding in findings if finding.of_full and finding.verdict != "held"]
    return [sentence.format(tasks=", ".join(tasks))] if tasks else []


def _task(results: Results, task: str) -> list[str]:
    parts = [f"### {task}"]
    for i, metric in enumerate(metrics_of(results, task)):
        title = metric.title[0].upper() + metric.title[1:]
        parts += [f"{title} by time step:", steps_table(results, task, metric, extras=i == 0)]
    tags = results.tags(task)
    if len(tags) > 1:
        for metric in metrics_of_kinds(results, task):
            title = metric.title[0].upper() + metric.title[1:]
            parts += [
                f"{title} by kind of query, at the last step of each:",
                kinds_table(results, task, metric),
            ]
    return [*parts, "What it costs at the last step:", costs_table(results, task)]


def _where_it_loses(results: Results) -> list[str]:
    found = losses(results)
    if not found:
        return []
    worst: dict[tuple[str, str], Loss] = {}
    for loss in found:
        if is_ccm(loss.method) and loss.n >= FEW:
            worst.setdefault((loss.method, loss.metric.name), loss)
    sentences = [_sentence(worst[key]) for key in sorted(worst)]
    lead = (
        "The difference to full context for every kind of query, at its last step; in words, for kinds with five "
        "items or more."
    )
    return ["### Where it loses", lead, "\n".join(sentences), losses_tables(results)]


def _sentence(loss: Loss) -> str:
    value, low, high = (signed(-number, 2) for number in (loss.lost.value, loss.lost.high, loss.lost.low))
    if loss.lost.value <= 0:
        return f"- `{loss.method}` loses no {loss.metric.lost}; the closest to it is {loss.kind} ({value})."
    return f"- `{loss.method}` loses most in {loss.kind}: {value} {loss.metric.lost} ({low} to {high})."
