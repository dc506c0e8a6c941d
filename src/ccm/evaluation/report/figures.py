"""Rows as pictures. A method has one colour in all of them; the colours stay apart for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ...errors import MissingPackageError
from .load import Results, Row
from .measures import Metric, base, estimate, is_ccm, is_stream, is_window, metrics_of, metrics_of_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito (2008), then Paul Tol's muted scheme.
_KNOWN = {
    "none": "#9a9a9a",
    "full": "#000000",
    "ccm-concat": "#0072B2",
    "ccm-merge": "#D55E00",
    "gisting": "#009E73",
    "gisting-online": "#CC79A7",
    "compressive": "#E69F00",
    "autocompressor": "#56B4E9",
    "mean-pool": "#999933",
    "summary": "#882255",
    "streaming-llm": "#6b6b6b",
    "window": "#6b6b6b",
}
_FREE = ("#332288", "#44AA99", "#AA4499", "#117733", "#661100", "#DDAA33")
#: (x, y, method)
Point = tuple[float, float, str]
#: left, bottom, right, top
Box = tuple[float, float, float, float]
#: method -> arguments for matplotlib's ``plot``
Styles = dict[str, dict[str, Any]]
_MARKERS = "osD^vP*X"
_HATCHES = {"--": "//", ":": "..", "-.": "xx"}
_DPI = 150
_WIDTH = 10.5
#: the line from a point to a name that is not beside it
_LEADER = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
_TITLES = {"perplexity": "perplexity (lower is better)"}


def draw(results: Results, methods: Sequence[str]) -> dict[str, bytes]:
    """The figures of one file of results that it has rows for, as PNG.

    Args:
        methods: of all files on the page, so that a method looks the same everywhere.

    Returns:
        name of the file -> its content.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError(
            "figures need matplotlib: pip install 'compressed-context-memory[eval]'"
        ) from error
    styles = choose_styles(methods)
    plain = [task for task in results.tasks if not is_stream(results, task) and metrics_of(results, task)]
    streams = [task for task in results.tasks if is_stream(results, task)]
    kinds = [task for task in plain if len(results.tags(task)) > 1]
    figures: dict[str, bytes] = {}
    settings = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        if plain:
            figures[f"steps-{results.suite}.png"] = _panels(results, plain, styles, _draw_steps)
            figures[f"pareto-{results.suite}.png"] = _panels(
                results, plain, styles, _draw_pareto, legend=False
            )
        if kinds:
            figures[f"kinds-{results.suite}.png"] = _kinds(results, kinds, styles)
        for task in streams:
            figures[f"{task}-{results.suite}.png"] = _stream(results, task, styles)
    return figures


def choose_styles(methods: Sequence[str]) -> Styles:
    """Line styles by method.

    The colour is of the base name, lighter for every further choice of options; a method cut to the bytes of another
    has that one's colour. Windows are hollow, the second of one colour is dotted.
    """
    free = iter(_FREE * len(methods))
    hues = dict(_KNOWN)
    variants: dict[str, list[str]] = {}
    for name in methods:
        owner = name.split("@", 1)[-1]
        if base(owner) not in hues:
            hues[base(owner)] = next(free)
        if owner not in variants.setdefault(base(owner), []):
            variants[base(owner)].append(owner)
    styles: Styles = {}
    windows: dict[str, int] = {}
    for name in methods:
        owner = name.split("@", 1)[-1]
        number = variants[base(owner)].index(owner)
        color = _lighter(hues[base(owner)], min(0.25 * number, 0.6))
        line = ":" if name == "none" else "-"
        if is_window(name):
            before = windows[color] = windows.get(color, -1) + 1
            line, number = ("--", ":", "-.")[min(before, 2)], number + before
        styles[name] = {
            "color": color,
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 7 if is_ccm(name) else 5.5,
            "markerfacecolor": "white" if is_window(name) else color,
            "markeredgecolor": color,
            "linestyle": line,
            "linewidth": 2.2 if is_ccm(name) else 1.3,
            "zorder": 4 if is_ccm(name) else 3,
        }
    return styles


def _lighter(color: str, share: float) -> str:
    """A colour with so much white in it."""
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def _save(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _panels(
    results: Results,
    tasks: Sequence[str],
    styles: Styles,
    draw_panel: Callable[[Axes, Results, str, Metric, Styles], list[Point]],
    legend: bool = True,
) -> bytes:
    """One panel a task, a legend of the methods in them, and names at the points that a panel gives back."""
    from matplotlib.figure import Figure

    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    methods = _methods(results, tasks)
    below = _legend_height(methods) if legend else 0.0
    figure = Figure(figsize=(_WIDTH, 3.9 * rows + below), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    named: list[tuple[Axes, list[Point]]] = []
    for axes, task in zip(grid, tasks, strict=False):
        metric = metrics_of(results, task)[0]
        axes.set(title=task, ylabel=_TITLES.get(metric.name, metric.title))
        axes.grid(color="0.92", zorder=0)
        named.append((axes, draw_panel(axes, results, task, metric, styles)))
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    if legend:
        _legend(figure, methods, styles)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # panels stay where they are now: names are placed by their distances
    for axes, points in named:
        _name_points(axes, points)
    return _save(figure)


def _methods(results: Results, tasks: Sequence[str]) -> list[str]:
    found = {row.method for row in results.rows if row.task in tasks}
    return [method for method in results.methods if method in found]


def _legend_height(methods: Sequence[str]) -> float:
    return 0.24 * -(-len(methods) // _columns(methods)) + 0.3


def _columns(methods: Sequence[str]) -> int:
    """As many as there is room for beside the longest name, in inches of its letters and of its line."""
    return max(1, min(4, int(_WIDTH / (0.075 * max(map(len, methods)) + 0.65))))


def _legend(figure: Figure, methods: Sequence[str], styles: Styles, bars: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(label=name, **_bar(name, styles)) if bars else Line2D([], [], label=name, **styles[name])
        for name in methods
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=_columns(methods), frameon=False, fontsize=9,
        handlelength=1.5 if bars else 3,
    )  # fmt: skip


def _bar(name: str, styles: Styles) -> dict[str, Any]:
    """Windows are hollow."""
    color, hollow = styles[name]["color"], is_window(name)
    return {
        "facecolor": "white" if hollow else color,
        "edgecolor": color,
        "hatch": _HATCHES[styles[name]["linestyle"]] if hollow else None,
    }


def _draw_steps(axes: Axes, results: Results, task: str, metric: Metric, styles: Styles) -> list[Point]:
    """Quality against time step, steps evenly spaced; the band is the interval of CCM with its own settings."""
    steps = results.steps(task, metric.name)
    place = {step: i for i, step in enumerate(steps)}
    for method, rows in results.of(task, metric.name).items():
        xs = [place[row.step] for row in rows]
        axes.plot(xs, [row.value for row in rows], **styles[method])
        if is_ccm(method) and method == base(method):
            bounds = [estimate(row) for row in rows]
            lows, highs = [bound.low for bound in bounds], [bound.high for bound in bounds]
            axes.fill_between(xs, lows, highs, color=styles[method]["color"], alpha=0.1, linewidth=0)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("time step t (segments in the memory)")
    values = [row.value for rows in results.of(task, metric.name).values() for row in rows]
    if metric.name == "perplexity" and max(values) > 10 * min(values):
        axes.set_yscale("log")
    return []


def _limit(axes: Axes, metric: Metric, rows: Sequence[Row]) -> None:
    """A perplexity far off (a window without sink) would flatten all others: it leaves the panel."""
    if metric.name != "perplexity":
        return
    values = sorted(row.value for row in rows)
    inside = [value for value in values if value <= 2.5 * values[len(values) // 2]]
    margin = 0.12 * (inside[-1] - inside[0]) or 0.1 * inside[-1]
    top = inside[-1] + 2 * margin
    outside = dict.fromkeys(row.method for row in rows if row.value > top)
    if outside:
        axes.set_ylim(inside[0] - margin, top)
        axes.annotate(
            fill("above the panel: " + ", ".join(outside), 90),
            (0.5, 0.985), xycoords="axes fraction", ha="center", va="top", fontsize=8, color="0.3",
        )  # fmt: skip


def _draw_pareto(axes: Axes, results: Results, task: str, metric: Metric, styles: Styles) -> list[Point]:
    """Quality against KV bytes at the last step; the line joins what nothing smaller beats."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    last = {m: results.last(task, m, metric.name) for m in results.methods}
    rows = [row for row in last.values() if row is not None]
    points = [(row.kv_bytes / 1e6, row.value, row.method) for row in rows if row.kv_bytes]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"KV read at t = {rows[0].step} (MB)" if rows else "KV read (MB)")
    for row in rows:
        if not row.kv_bytes:
            axes.axhline(row.value, color=styles[row.method]["color"], linestyle=":", zorder=1)
            axes.annotate(
                row.method, (0.005, row.value), xycoords=axes.get_yaxis_transform(), ha="left", va="bottom",
                fontsize=8, color="0.4",
            )  # fmt: skip
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda point: (point[0], -point[1] if metric.higher else point[1])):
        if not front or ((y > front[-1][1]) == metric.higher and y != front[-1][1]):
            front.append((x, y))
    axes.plot([x for x, _ in front], [y for _, y in front], color="0.75", linewidth=1.2, zorder=2)
    for x, y, method in points:
        axes.plot([x], [y], **{**styles[method], "linestyle": ""})
    axes.margins(x=0.2, y=0.12)
    _limit(axes, metric, rows)
    return points


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside their points, moved apart until none lies on another or on a marker."""
    scale = 72.0 / axes.figure.dpi  # all distances in typographic points
    panel = [edge * scale for edge in axes.get_window_extent().extents]
    places = [tuple(c * scale for c in axes.transData.transform((x, y))) for x, y, _ in points]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in places]
    for (x, y, method), (px, py) in sorted(zip(points, places, strict=True)):
        if not panel[1] <= py <= panel[3]:
            continue
        spots = list(_spots(px, py, 4.9 * len(method), 9.0))
        free = (spot for spot in spots if _inside(spot, panel) and not any(_overlap(spot, t) for t in taken))
        spot = next(free, spots[0])
        taken.append(spot)
        on_the_left = spot[2] < px
        gap = max(spot[0] - px, px - spot[2], spot[1] - py, py - spot[3])
        axes.annotate(
            method,
            (x, y),
            xytext=(spot[2 if on_the_left else 0] - px, (spot[1] + spot[3]) / 2 - py),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            va="center",
            fontsize=8,
            color="0.2",
            zorder=5,
            arrowprops={**_LEADER, "relpos": (float(on_the_left), 0.5)} if gap > 9 else None,
        )


def _spots(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    """Places for a text around a point, the nearest first."""
    for distance in (7, 15, 24, 34, 46, 60, 76):
        for dx, dy in ((1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1)):
            left = x + dx * distance - (width if dx < 0 else width / 2 if dx == 0 else 0)
            bottom = y + dy * distance - height / 2
            yield left, bottom, left + width, bottom + height


def _inside(a: Box, b: Sequence[float]) -> bool:
    return b[0] <= a[0] and a[2] <= b[2] and b[1] <= a[1] and a[3] <= b[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _stream(results: Results, task: str, styles: Styles) -> bytes:
    """Perplexity, memory and time by position."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    series = results.of(task, "perplexity")
    figure = Figure(figsize=(_WIDTH, 10.4 + _legend_height(list(series))), layout="constrained")
    quality, memory, fold, first = figure.subplots(4, 1, height_ratios=(2, 1, 1, 1), sharex=True)
    lower = ((memory, "kv_bytes", 1e-6), (fold, "fold_seconds", 1e3), (first, "ttft_seconds", 1e3))
    for method, rows in series.items():
        style = {**styles[method], "markersize": 4, "markevery": max(1, len(rows) // 16)}
        quality.plot([row.step for row in rows], [row.value for row in rows], **style)
        for axes, key, factor in lower:
            known = [(row.step, value * factor) for row in rows if (value := getattr(row, key)) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), **style)
    quality.set(title=f"{task}, {results.suite}", ylabel="perplexity of a block (lower is better)")
    held = [row.kv_bytes for rows in series.values() for row in rows if row.kv_bytes]
    if held and max(held) > 20 * min(held):
        memory.set_yscale("log")
    else:
        memory.set_ylim(0, 1.15e-6 * max(held) if held else 1)
    memory.set_ylabel("KV read (MB)")
    for axes, key, label in (
        (fold, "fold_seconds", "to fold a\nsegment (ms)"),
        (first, "ttft_seconds", "to the first\ntoken (ms)"),
    ):
        most = max([getattr(row, key) or 0.0 for rows in series.values() for row in rows])
        axes.set(ylabel=label, ylim=(0, 1.15e3 * most or 1))
    first.set_xlabel("tokens read")
    first.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    memory.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axes in (quality, memory, fold, first):
        axes.grid(color="0.92", zorder=0)
    _limit(quality, metrics_of(results, task)[0], [row for rows in series.values() for row in rows])
    _legend(figure, list(series), styles)
    return _save(figure)


def _kinds(results: Results, tasks: Sequence[str], styles: Styles) -> bytes:
    """Bars of every method for every kind of query, at the kind's last step."""
    from matplotlib.figure import Figure

    methods = _methods(results, tasks)
    height = 2.8 * len(tasks) + _legend_height(methods)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        tags = results.tags(task)
        metric = metrics_of_kinds(results, task)[0]
        shown = _methods(results, [task])  # no gaps for those that were not put to this task
        bar = 0.84 / len(shown)
        for i, method in enumerate(shown):
            found = [
                (t, row)
                for t, tag in enumerate(tags)
                if (row := results.last(task, method, metric.name, tag))
            ]
            places = [t + (i + 0.5) * bar - 0.42 for t, _ in found]
            bounds = [estimate(row) for _, row in found]
            # a percentile interval need not hold the value
            errors = [[max(0, b.value - b.low) for b in bounds], [max(0, b.high - b.value) for b in bounds]]
            axes.bar(
                places, [row.value for _, row in found], bar * 0.9, yerr=errors, zorder=3,
                error_kw={"elinewidth": 0.8, "ecolor": "0.35"}, **_bar(method, styles),
            )  # fmt: skip
        axes.set_xticks(range(len(tags)), [fill(tag, 12, break_long_words=False) for tag in tags])
        axes.set(title=task, ylabel=_TITLES.get(metric.name, metric.title), xlim=(-0.55, len(tags) - 0.45))
        axes.grid(axis="y", color="0.92", zorder=0)
    _legend(figure, methods, styles, bars=True)
    return _save(figure)
