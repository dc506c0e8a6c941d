"""Rows as Markdown tables. Every function takes results and returns text; none of them looks elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median, stdev

from ..metrics import frontier
from .load import TITLES, Estimate, Results

#: (better, worse): whether there is anything to keep, then what the paper shows, of methods that had the same short
#: training
ORDER = (
    ("full", "none"),
    ("ccm-concat-short", "ccm-merge-short"),
    ("ccm-concat-short", "gisting-online"),
    ("ccm-merge-short", "gisting-online"),
    ("ccm-concat-short", "compressive"),
    ("ccm-merge-short", "compressive"),
    ("ccm-concat-short", "autocompressor"),
    ("ccm-concat-short", "mean-pool"),
    ("ccm-concat", "ccm-merge"),
)
MOST_POSITIONS = 6
#: claim -> task -> how much better its left side is
Claims = dict[str, dict[str, Estimate]]
#: What stands for it in a title, step, kind of query
Place = tuple[str, int, str]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """With a real minus sign, never "-0.00"; large perplexities without decimals."""
    text = f"{value:{'+' if sign else ''},.{0 if abs(value) >= 1000 else digits}f}"
    return text.replace("-", "\u2212") if any(c in "123456789" for c in text) else text.lstrip("+-")


def cell(found: Estimate | None, digits: int = 2, sign: bool = False) -> str:
    """The value, and its interval in small."""
    if found is None:
        return ""
    value, low, high = (number(part, digits, sign) for part in found[:3])
    return value if found.low == found.high else f"{value} <sub>{low} to {high}</sub>"


def size(count: float) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:,.2f} MB"


def _digits(metric: str) -> int:
    return 1 if metric == "perplexity" else 2


# ---------------------------------------------------------------------- what follows from rows


def reached(results: Results, task: str, method: str) -> Estimate | None:
    """What a method reaches at the last step; of a stream the perplexity over all blocks, as if independent."""
    if not results.is_stream(task):
        row = results.last(task, method, results.yardstick(task))
        return row.estimate if row else None
    logs = [[math.log(x) for x in row.estimate[:3]] for row in results.of(task, "perplexity").get(method, ())]
    if not logs:
        return None
    mean = fmean(value for value, _, _ in logs)
    below = math.hypot(*(value - low for value, low, _ in logs)) / len(logs)
    above = math.hypot(*(high - value for value, _, high in logs)) / len(logs)
    return Estimate(math.exp(mean), math.exp(mean - below), math.exp(mean + above))


def gain(results: Results, task: str, better: str, worse: str) -> Estimate | None:
    """How much better one method is than another at the last step, paired; None if they were not compared."""
    metric = results.yardstick(task)
    if results.is_stream(task):
        return _over_blocks(results, task, better, worse)
    if row := results.last(task, better, f"{metric} over {worse}"):
        return row.estimate
    if row := results.last(task, worse, f"{metric} over {better}"):
        value, low, high, sure = row.estimate
        return Estimate(-value, -high, -low, sure)
    return None


def _over_blocks(results: Results, task: str, better: str, worse: str) -> Estimate | None:
    """The mean gain in nats over the blocks that both have, with the interval of a mean of independent numbers."""
    own, other = (
        {row.step: row.value for row in results.of(task, "perplexity").get(m, ())} for m in (better, worse)
    )
    gains = [math.log(other[step] / own[step]) for step in own.keys() & other.keys()]
    if not gains:
        return None
    spread = stdev(gains) if len(gains) > 1 else 0.0
    half = _student(len(gains) - 1) * spread / math.sqrt(len(gains))
    mean = fmean(gains)
    return Estimate(mean, mean - half, mean + half, len(gains) > 1)


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, to within 0.01."""
    small = (0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    return small[freedom] if freedom < len(small) else 1.96 + 2.37 / freedom + 2.8 / freedom**2


def claims(results: Results) -> Claims:
    """The paper's order of methods, every memory against its window, growth of CCM with the time step.

    Where full context is no better than none, shares are not compared.
    """
    found: Claims = {}
    for task in results.tasks:
        if results.yardstick(task) == "recovered_share" and (worth := results.worth(task)):
            found.setdefault("`full` > `none`", {})[task] = worth
    windows = [(name.split("@", 1)[1], name) for name in results.methods if "@" in name]
    for better, worse in (*ORDER, *windows):
        for task in results.tasks:
            shares = results.yardstick(task) == "recovered_share"
            moot = shares and (better == "full" or results.nothing_to_keep(task))
            if not moot and (gained := gain(results, task, better, worse)):
                found.setdefault(f"`{better}` > `{worse}`", {})[task] = gained
    for row in results.rows:
        name, _, first = row.metric.partition(" since ")
        if first and name == results.main(row.task) and row.method.startswith(("full", "ccm-")):
            found.setdefault(f"`{row.method}`: last t > first t", {})[row.task] = row.estimate
    return found


# ---------------------------------------------------------------------- tables


def glance(results: Results) -> str:
    """Methods against tasks at their last step, and what each method takes."""
    header = ["method", "KV of full", "to fold a segment", "to the first token"]
    for task in results.tasks:
        metric = results.yardstick(task)
        n = items(results, task)
        where = "" if results.is_stream(task) else f", t = {results.steps(task, metric)[-1]}, n = {n}"
        header.append(f"{task}: {TITLES[metric]}{where}")
    best = {task: frontier(points(results, task)) for task in results.tasks}
    rows = [
        [f"`{m}`", *costs(results, m), *(_glanced(results, t, m, m in best[t]) for t in results.tasks)]
        for m in results.methods
    ]
    return markdown(header, rows)


def points(results: Results, task: str) -> dict[str, tuple[float, float]]:
    """method -> KV bytes and quality at the last step, of which more is better."""
    metric = results.main(task)
    found = {}
    for method in results.methods:
        if row := results.last(task, method, metric):
            found[method] = row.kv_bytes, -row.value if metric == "perplexity" else row.value
    return found


def _glanced(results: Results, task: str, method: str, best: bool) -> str:
    """What a method reaches, bold on the frontier; with its number of items where others have more."""
    metric = results.yardstick(task)
    found = cell(reached(results, task, method), _digits(metric))
    if not found:
        return ""
    if metric == "recovered_share" and results.nothing_to_keep(task):
        found = "" if method in ("none", "full") else "nothing to keep"
    value, small, rest = found.partition(" <sub>")
    text = f"**{value}**{small}{rest}" if best and value else found
    own = results.last(task, method, metric)
    fewer = own is not None and not results.is_stream(task) and own.n < items(results, task)
    return f"{text} (n = {own.n})" if own and fewer else text


def items(results: Results, task: str) -> int:
    """Most items that a method was measured on at the last step."""
    return max(rows[-1].n for rows in results.of(task, results.yardstick(task)).values())


def costs(results: Results, method: str) -> list[str]:
    """Means over tasks at their last step: KV bytes over those of full context, time to fold, to the first token."""
    ends = [row for task in results.tasks if (row := results.last(task, method, results.main(task)))]
    fulls = {task: row for task in results.tasks if (row := results.last(task, "full", results.main(task)))}
    shares = [row.kv_bytes / fulls[row.task].kv_bytes for row in ends if row.task in fulls]
    kv = f"{100 * fmean(shares):.1f} %" if shares else ""
    return [
        kv,
        *(
            f"{1e3 * fmean(s):,.0f} ms"
            for s in zip(*((r.fold_seconds, r.ttft_seconds) for r in ends), strict=True)
        ),
    ]


def claims_table(found: Claims) -> str:
    """Claims against tasks: the verdict, and the difference with its interval."""
    tasks = list(dict.fromkeys(task for of in found.values() for task in of))
    rows = [
        [claim, *(f"{of[t].verdict} {cell(of[t], sign=True)}" if t in of else "" for t in tasks)]
        for claim, of in found.items()
    ]
    return markdown(["claim", *tasks], rows)


def by_step(results: Results) -> str:
    """Methods against tasks; a cell has all time steps."""
    return _joined(results, "at t =", lambda task, name: [(str(t), t, "") for t in results.steps(task, name)])


def by_kind(results: Results) -> str:
    """Methods against tasks; a cell has all kinds of query, each at its last step."""

    def places(task: str, name: str) -> list[Place]:
        return [
            (tag, steps[-1], tag) for tag in results.tags(task) if (steps := results.steps(task, name, tag))
        ]

    return _joined(results, "of", places)


def _joined(results: Results, word: str, places: Callable[[str, str], list[Place]]) -> str:
    """Methods against tasks, a cell with the main metric at several places; empty if no task has them."""
    columns: dict[str, tuple[str, str, list[Place]]] = {}
    for task in results.tasks:
        metric = results.main(task)
        if not results.is_stream(task) and len(found := places(task, metric)) > 1:
            shown = " · ".join(label for label, _, _ in found)
            title = f"{task}: {TITLES[metric]} {word} {shown}, n = {_counts(results, task, metric, found)}"
            columns[title] = task, metric, found
    rows = []
    for method in results.methods:
        cells = []
        for task, metric, found in columns.values():
            ends = [results.get(task, method, metric, step, tag) for _, step, tag in found]
            shown = " · ".join(number(row.value, _digits(metric)) if row else "?" for row in ends)
            cells.append(shown if any(ends) else "")
        if any(cells):
            rows.append([f"`{method}`", *cells])
    return markdown(["method", *columns], rows) if columns else ""


def _counts(results: Results, task: str, metric: str, found: Sequence[Place]) -> str:
    """Items behind each place; one number where they are the same."""
    counts = [
        max(row.n for rows in results.of(task, metric, tag).values() for row in rows if row.step == step)
        for _, step, tag in found
    ]
    return " · ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def stream(results: Results, task: str) -> str:
    """Perplexity over all blocks and at a few positions; bytes; and whether a segment's time grows."""
    steps = results.steps(task, "perplexity")
    shown = sorted({steps[round(i * (len(steps) - 1) / (MOST_POSITIONS - 1))] for i in range(MOST_POSITIONS)})
    rows = []
    for method, found in results.of(task, "perplexity").items():
        at = [results.get(task, method, "perplexity", step) for step in shown]
        seconds = [row.fold_seconds + row.ttft_seconds for row in found]
        quarter = max(1, len(seconds) // 4)
        first, last = median(seconds[:quarter]), median(seconds[-quarter:])
        cells = [cell(reached(results, task, method)), *(number(row.value, 1) if row else "" for row in at)]
        cells += [
            size(found[-1].kv_bytes),
            size(found[-1].peak_kv_bytes),
            number(last / first) if first else "",
        ]
        rows.append([f"`{method}`", *cells])
    header = ["method", "all blocks", *(f"at {step:,}" for step in shown)]
    return markdown([*header, "KV", "peak", "time of a segment, last quarter / first"], rows)


def about(results: Results) -> str:
    """How the results were made, a line a key."""
    told = ("skipped", "warnings")
    return "\n".join(f"- {key}: {_flat(value)}" for key, value in results.about.items() if key not in told)


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items() if inner != {"options": {}})
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
