"""A suite as one picture: a panel a task, quality by time step, or of streams by tokens read."""

from __future__ import annotations

import io
from typing import Any

from ...errors import needing
from .load import TITLES, Results

#: Okabe and Ito (2008), then Paul Tol's muted scheme: they stay apart for colour-blind readers.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933", "#882255",
    "#332288", "#44AA99", "#AA4499", "#117733", "#661100", "#DDAA33",
)  # fmt: skip
_ENDS = {"none": "#9a9a9a", "full": "#000000"}


def draw(results: Results) -> bytes:
    """The picture as PNG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needing("figures need matplotlib", "plot"):
        import matplotlib
        from matplotlib.figure import Figure
    styles, lines, drawn = _styles(results), -(-len(results.tasks) // 2), {}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 2.8 * lines + 0.07 * len(styles) + 0.4), layout="constrained")
        for place, task in enumerate(results.tasks, 1):
            axes, metric, far = (
                figure.add_subplot(lines, 2, place),
                results.main(task),
                results.is_stream(task),
            )
            steps = results.steps(task, metric)
            for method, rows in results.of(task, metric).items():
                xs = [row.step if far else steps.index(row.step) for row in rows]
                few = max(1, len(rows) // 16)
                (drawn[method],) = axes.plot(xs, [row.value for row in rows], **styles[method], markevery=few)
            if not far:
                axes.set_xticks(range(len(steps)), list(map(str, steps)))
            axes.set(title=task, ylabel=TITLES[metric], xlabel="tokens read" if far else "time step t")
            axes.set_yscale("log" if metric == "perplexity" else "linear")
            axes.grid(color="0.92")
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """By method. A window has the colour of the memory whose bytes it has, is dashed and hollow."""
    owners = list(dict.fromkeys(name.split("@")[-1] for name in results.methods if name not in _ENDS))
    styles = {}
    for name in results.methods:
        place = -1 if name in _ENDS else owners.index(name.split("@")[-1])
        color = _ENDS.get(name, COLORS[place % len(COLORS)])
        styles[name] = {
            "color": color,
            "marker": "osD^vP*X"[place % 8],
            "markersize": 4,
            "markerfacecolor": "white" if "@" in name else color,
            "linestyle": "-" if "@" not in name else ":" if ":" in name.split("@")[0] else "--",
        }
    return styles
