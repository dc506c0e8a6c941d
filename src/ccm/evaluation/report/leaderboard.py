"""The leaderboard as a page and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import needing
from ..leaderboard import ENDS, Row, Table
from .figures import COLORS
from .tables import markdown, number, size

_HEAD = """\
# Leaderboard

Every memory at equal bytes, on the same questions. This page is made by `ccm leaderboard`; nothing on it is typed by
hand. `ccm methods` says what each memory is, and `ccm methods NAME` all of one.

- **Share** is the recovered share with its 95 % interval, by bootstrap over items: 0 is no memory, 1 is full context.
  Few items leave wide intervals: where two of them overlap, the order says little.
- **KV** is what a question reads, in keys and values, measured; of `packed` what it holds, which a question reads
  unpacked. A memory that needs more than the budget stands below the others, with **more**.
- **Fold** is the time to take in a segment. **First** is the time to the first token, over that of full context in
  the same run.
- **\\*** marks the Pareto frontier: nothing with as few bytes is as good. It begins at no memory."""


def page(stored: Mapping[str, Any], tables: Sequence[Table], picture: str) -> str:
    """The page.

    Args:
        stored: all that ``leaderboard.json`` holds.
        tables: of it.
        picture: name of the picture beside the page.
    """
    machine = stored["machine"]
    count = len({row.method.partition(":")[0] for each in tables for row in each.rows})
    parts = [
        _HEAD,
        f"{count} memories, model {stored['model']['name']} ({stored['model']['dtype']}), "
        f"{round(stored['seconds'] / 60)} minutes of one process in {machine['processes']} at once, on "
        f"{machine['cores']} cores ({machine['device']}). A row is measured by "
        "`ccm leaderboard --tasks TASK --methods METHOD`, with the method as it stands in the row.",
        f"![What each memory keeps, by its bytes]({picture})",
    ]
    for each in tables:
        parts += [f"## {each.task}", said(each), markdown(_COLUMNS, [_cells(each, row) for row in each.rows])]
    if left_out := stored["left_out"]:
        parts += ["## Left out", "\n".join(f"- `{name}`: {why}." for name, why in sorted(left_out.items()))]
    return "\n\n".join(parts) + "\n"


_COLUMNS = ("method", "share", "KV", "fold", "first", "model, commit")


def said(each: Table) -> str:
    """What there is to keep, on how many items, and for how many bytes."""
    ends = f"{number(each.low)} to {number(each.high)}" if each.n > 1 else "no interval"
    worth = f"{number(each.worth)} nats a scored token ({ends})"
    return (
        f"{each.title}. n = {each.n}, {each.queries} questions each. Budget: {each.entries} entries, "
        f"{size(each.kv_bytes)}. "
        + (
            f"Full context is worth {worth}."
            if each.kept
            else f"Nothing to keep: full context is worth {worth}."
        )
    )


def share(each: Table, row: Row) -> tuple[str, str]:
    """The recovered share and its interval; of the ends of the scale by definition."""
    if not each.kept:
        return ("" if row.method in ENDS else "nothing to keep"), ""
    if row.method in ENDS:
        return str(ENDS.index(row.method)), ""
    if row.share is None:
        return "", ""
    known = row.low is not None and row.high is not None
    return number(row.share), f"{number(row.low)} to {number(row.high)}" if known else ""  # type: ignore[arg-type]


def commit(row: Row) -> str:
    """In seven letters each; "+" says that files differed from it."""
    each = (name[:7] + "+" * name.endswith("+") for name in row.commit.split(", "))
    return " ".join(filter(None, each)) or "no commit"


def _cells(each: Table, row: Row) -> list[str]:
    value, ends = share(each, row)
    star = "\\*" if row.best else ""
    return [
        f"`{row.method}`{star}",
        f"{value} <sub>{ends}</sub>" if ends else value,
        size(row.kv_bytes) + ("" if row.within or row.method in ENDS else " **more**"),
        f"{1e3 * row.fold_seconds:,.0f} ms",
        f"{row.first_token:.2f}×",
        f"{row.model}, {commit(row)}",
    ]


# ---------------------------------------------------------------------- picture


def draw(tables: Sequence[Table]) -> bytes:
    """What each memory gains over none against its bytes, a panel a task; the Pareto frontier is a line.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needing("figures need matplotlib", "plot"):
        import matplotlib
        from matplotlib.figure import Figure
    # in the order of their names, so that a family keeps its colour from run to run
    families = sorted({row.family for each in tables for row in each.rows if row.method not in ENDS})
    drawn: dict[str, Any] = {}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.2 * len(tables) + 0.5, 4.4), layout="constrained")
        for place, each in enumerate(tables, 1):
            axes = figure.add_subplot(1, len(tables), place)
            for family in families:
                some = [row for row in each.rows if row.family == family and row.method not in ENDS]
                color = COLORS[families.index(family) % len(COLORS)]
                drawn[family] = axes.scatter(*_points(some), s=22, alpha=0.75, color=color)
            ends = [row for row in each.rows if row.method in ENDS]
            axes.scatter(*_points(ends), s=30, color="black")
            best = sorted((row for row in each.rows if row.best), key=lambda row: row.kv_bytes)
            axes.step(*_points(best), where="post", color="0.4", lw=1)
            for row in {row.method: row for row in (*best, *ends)}.values():
                name = {"none": "no memory", "full": "full context"}.get(
                    row.method, row.method.partition(":")[0]
                )
                right = row.method == "full"
                axes.annotate(
                    name, (row.kv_bytes / 1e6, row.gain), (-5 if right else 5, 4), textcoords="offset points",
                    fontsize=7.5, ha="right" if right else "left",
                )  # fmt: skip
            axes.axvline(each.kv_bytes / 1e6, color="0.85", lw=1, zorder=0)
            worth = "" if each.kept else ": nothing to keep"
            axes.set(title=f"{each.task}{worth}, n = {each.n}", xlabel="KV (MB)", xlim=(-0.1, None))
            axes.set_ylabel("nats a token over no memory" if place == 1 else "")
            axes.axhline(0, color="0.85", lw=1, zorder=0)
        figure.legend(
            drawn.values(),
            drawn.keys(),
            loc="outside lower center",
            ncols=min(3, 1 + len(tables)),
            frameon=False,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Megabytes and nats."""
    return [row.kv_bytes / 1e6 for row in rows], [row.gain for row in rows]
