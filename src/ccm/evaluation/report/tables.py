"""Rows as Markdown tables. Every function takes results and returns text; none of them looks elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean

from .load import Results
from .measures import (
    METRICS,
    Estimate,
    Finding,
    Loss,
    Metric,
    estimate,
    is_ccm,
    is_stream,
    kv_bytes,
    losses,
    metrics_of,
    overall,
    pooled,
    slowdown,
)

MOST_POSITIONS = 6


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float, digits: int) -> str:
    """With a real minus sign, never "-0.00"; large perplexities without decimals."""
    digits = 0 if abs(value) >= 1000 else digits
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not any(c in "123456789" for c in text) else text.replace("-", "\u2212")


def signed(value: float, digits: int = 3) -> str:
    text = number(value, digits)
    return text if text.startswith("\u2212") or not any(c in "123456789" for c in text) else f"+{text}"


def with_interval(entry: Estimate, digits: int, sign: bool = False) -> str:
    """The value, and its interval in small."""
    show = signed if sign else number
    text = show(entry.value, digits)
    if entry.low == entry.high:
        return text
    return f"{text} <sub>{show(entry.low, digits)} to {show(entry.high, digits)}</sub>"


def size(count: float | None) -> str:
    """Bytes in MB, small ones in kB."""
    if count is None:
        return ""
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 or not count else f"{count / 1e3:.1f} kB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:,.0f} ms" if seconds < 10 else f"{seconds:,.0f} s"


# ---------------------------------------------------------------------- tables


def glance(results: Results) -> str:
    """Methods against tasks: the recovered share where there is one, otherwise the task's main metric."""
    columns: list[tuple[str, Callable[[str], str]]] = []  # title, method -> cell
    for task in results.tasks:
        for metric in metrics_of(results, task)[:1]:
            share = results.steps(task, "recovered_share")
            if share and metric.name == "perplexity" and not is_stream(results, task):
                columns.append((f"{task}: recovered share, t = {share[-1]}", partial(_share, results, task)))
            else:
                last = f", t = {results.steps(task, metric.name)[-1]}" if not is_stream(results, task) else ""
                columns.append((f"{task}: {metric.title}{last}", partial(_reached, results, task, metric)))
    rows = [
        [f"`{method}`", _share_of_full(results, method), *(cell(method) for _, cell in columns)]
        for method in results.methods
    ]
    return markdown(["method", "KV, share of full", *(title for title, _ in columns)], rows)


def _share(results: Results, task: str, method: str) -> str:
    row = results.last(task, method, "recovered_share")
    return with_interval(estimate(row), 2) if row else ""


def _reached(results: Results, task: str, metric: Metric, method: str) -> str:
    found = overall(results, task, method, metric)
    return with_interval(found, 1 if metric.name == "perplexity" else 2) if found else ""


def _share_of_full(results: Results, method: str) -> str:
    """KV bytes at the last step over those of full context, mean over tasks."""
    shares = []
    for task in results.tasks:
        own, full = kv_bytes(results, task, method), kv_bytes(results, task, "full")
        if own is not None and full:
            shares.append(own / full)
    return f"{100 * fmean(shares):.1f} %" if shares else ""


def steps_table(results: Results, task: str, metric: Metric, extras: bool = True) -> str:
    """Methods against time steps, with intervals; with ``extras`` KV bytes, recovered share and gap to full."""
    steps = results.steps(task, metric.name)
    wanted = {
        "recovered share": ("recovered_share", 2, False),
        "accuracy gap to full": ("accuracy_gap", 3, True),
    }
    more = {title: entry for title, entry in wanted.items() if extras and results.steps(task, entry[0])}
    counted = [f"t = {step}, n = {results.items(task, metric.name, step)}" for step in steps]
    header = ["method", *counted, *(("KV bytes",) if extras else ()), *more]
    rows = []
    for method, found in results.of(task, metric.name).items():
        by_step = {row.step: row for row in found}
        cells = [f"`{method}`"]
        cells += [
            with_interval(estimate(by_step[step]), metric.digits) if step in by_step else "" for step in steps
        ]
        if extras:
            cells.append(size(kv_bytes(results, task, method)))
        for name, digits, sign in more.values():
            row = results.last(task, method, name)
            cells.append(with_interval(estimate(row), digits, sign) if row else "")
        rows.append(cells)
    return markdown(header, rows)


def stream_table(results: Results, task: str) -> str:
    """Perplexity by position for a few positions and over all blocks; bytes; and whether a segment's time grows."""
    steps = results.steps(task, "perplexity")
    last = len(steps) - 1
    places = sorted({round(i * last / (MOST_POSITIONS - 1)) for i in range(MOST_POSITIONS)})
    shown = [steps[i] for i in places]
    rows = []
    for method, found in results.of(task, "perplexity").items():
        by_step = {row.step: row for row in found}
        whole = pooled(found)
        cells = [f"`{method}`", with_interval(whole, 2) if whole else ""]
        cells += [number(by_step[step].value, 1) if step in by_step else "" for step in shown]
        end = found[-1]
        slower = slowdown(found)
        cells += [size(end.kv_bytes), size(end.peak_kv_bytes), "" if slower is None else number(slower, 2)]
        rows.append([*cells, f"{end.step:,}"])
    positions = (f"at {step:,}" for step in shown)
    header = [
        "method",
        "all blocks",
        *positions,
        "KV bytes",
        "peak",
        "time, last quarter / first",
        "tokens read",
    ]
    return markdown(header, rows)


def costs_table(results: Results, task: str) -> str:
    """What the memory takes at the last step: bytes held and at most, seconds to fold and to the first token."""
    rows = []
    for metric in metrics_of(results, task)[:1]:
        for method, found in results.of(task, metric.name).items():
            row = found[-1]
            times = (row.fold_seconds, row.ttft_seconds, row.seconds)
            rows.append([f"`{method}`", size(row.kv_bytes), size(row.peak_kv_bytes), *map(duration, times)])
    return markdown(["method", "KV bytes", "peak", "to fold a segment", "to the first token", "in all"], rows)


def kinds_table(results: Results, task: str, metric: Metric) -> str:
    """Methods against kinds of query, each at its last step."""
    tags = [tag for tag in results.tags(task) if results.steps(task, metric.name, tag)]
    rows = []
    for method in results.methods:
        found = [results.last(task, method, metric.name, tag) for tag in tags]
        if any(found):
            rows.append([f"`{method}`", *(with_interval(estimate(row), 2) if row else "" for row in found)])
    last = {tag: results.steps(task, metric.name, tag)[-1] for tag in tags}
    counted = [f"{tag}, n = {results.items(task, metric.name, last[tag], tag)}" for tag in tags]
    return markdown(["method", *counted], rows)


def findings_table(results: Results, findings: Sequence[Finding]) -> str:
    """Claims against tasks: the verdict, the difference with its interval, and how the KV bytes compare."""
    by_task = sorted(findings, key=lambda finding: results.tasks.index(finding.task))
    tasks = list(dict.fromkeys(f"{f.task} ({f.metric.lost})" for f in by_task))
    by_claim: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        by_claim.setdefault(finding.claim, {})[f"{finding.task} ({finding.metric.lost})"] = finding
    rows = []
    for claim, found in by_claim.items():
        ratios = [f.kv[0] / f.kv[1] for f in found.values() if f.kv[0] and f.kv[1]]
        cells = [
            f"{f.verdict} {with_interval(f.gain, 2, sign=True)}" if (f := found.get(task)) else ""
            for task in tasks
        ]
        rows.append([claim, f"{fmean(ratios):.1f}×" if ratios else "", *cells])
    return markdown(["claim", "KV, left / right", *tasks], rows)


def losses_tables(results: Results) -> str:
    """Where methods lose against full context: a table for each metric, kinds with the worst CCM loss first."""
    everything = losses(results)
    parts = []
    for metric in METRICS.values():
        kinds: dict[str, list[Loss]] = {}
        for loss in everything:
            if loss.metric is metric:
                kinds.setdefault(loss.kind, []).append(loss)
        if not kinds:
            continue
        rows = []
        for kind in sorted(kinds, key=lambda kind: (-_worst(kinds[kind]), kind)):
            listed = kinds[kind]
            cells = [_name(loss) + " " + signed(-loss.lost.value, 2) for loss in listed]
            rows.append([kind, number(listed[0].full, metric.digits), ", ".join(cells)])
        header = [f"{metric.title}: task · kind", "full", f"difference to full in {metric.lost}, worst first"]
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def _worst(listed: list[Loss]) -> float:
    """The largest loss of a CCM method, or of any if there is none."""
    return max([loss.lost.value for loss in listed if is_ccm(loss.method)] or [listed[0].lost.value])


def _name(loss: Loss) -> str:
    return f"**`{loss.method}`**" if is_ccm(loss.method) else f"`{loss.method}`"


def about_table(results: Results) -> str:
    """How the results were made: everything in the file that is no row."""
    rows: list[list[str]] = []
    for key, value in results.about.items():
        rows += _flat(key, value)
    return markdown(["setting", "value"], rows).replace("| --- | ---: |", "| --- | --- |")


def _flat(key: str, value: object) -> list[list[str]]:
    """Nested settings as one line a leaf, keys joined by dots."""
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _flat(f"{key}.{name}", inner)]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [line for i, inner in enumerate(value) for line in _flat(f"{key}.{i}", inner)]
    shown = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return [[key, shown]]
