"""Pictures of a memory: for a notebook, and as a file."""

from __future__ import annotations

import os
from html import escape

from ..errors import StorageError, needing
from .inside import Inside, Line
from .parts import PINNED

#: One colour for each kind of entry, the same in every picture.
COLOURS = {PINNED: "#a4527a", "sink": "#9a7b2f", "slots": "#2f6296", "window": "#5b8f6b", "prompt": "#8a8f98"}


def place(line: Line) -> str:
    """Which entries these are, in words."""
    first, last = line.entries
    if line.kind == "prompt":
        return "the answer itself"
    return f"{line.kind} {first}" if last - first == 1 else f"{line.kind} {first}–{last - 1}"


def meaning(inside: Inside, line: Line) -> str:
    """Which turns these entries stand for, and how."""
    if line.kind == "prompt":
        return "its place, and what is written of it"
    return ", ".join(filter(None, (speaker(inside, line), line.how)))


def speaker(inside: Inside, line: Line) -> str:
    """Which turns these are."""
    first, last = line.turns
    if line.kind in ("prompt", PINNED):
        return ""
    if first == last:
        return "earlier text"
    return f"turns {first + 1}–{last}" if last - first > 1 else f"turn {last}, {inside.turns[first].role}"


def words(inside: Inside, line: Line, width: int = 60) -> str:
    """The beginning of what was said, where a line is one turn; or of what is pinned."""
    if line.kind == PINNED:
        return shorter(" · ".join(inside.pins), width)
    first, last = line.turns
    return shorter(inside.turns[first].text or "", width) if last - first == 1 else ""


def shorter(text: str, width: int) -> str:
    """The beginning of a text, on one line, without control characters."""
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return text if len(text) <= width else text[: width - 1] + "…"


def described(inside: Inside, line: Line, width: int = 60) -> str:
    """Meaning and words in one."""
    return ": ".join(filter(None, (meaning(inside, line), words(inside, line, width))))


def shades(inside: Inside) -> list[list[float]]:
    """How dark each share of attention is drawn, 0 to 1, by line and layer group.

    The darkest of a layer group is the largest share of slots and window: the sink collects what no other wants.
    """
    lines = inside.lines()
    held = [line.read for line in lines if line.kind in ("slots", "window")]
    tops = [max(column) or 1.0 for column in zip(*held, strict=True)] or [1.0] * len(inside.layers)
    return [[min(1.0, share / top) for share, top in zip(line.read, tops, strict=True)] for line in lines]


def picture(inside: Inside, title: str) -> str:
    """HTML of a memory: a bar whose pieces are its entries, by what they stand for, and a line for each."""
    lines = inside.lines()
    total = sum(line.entries[1] - line.entries[0] for line in lines) or 1
    bar, rows = [], []
    for line in lines:
        width = 100 * (line.entries[1] - line.entries[0]) / total
        what = escape(f"{place(line)}: {described(inside, line)}", quote=True)
        colour = COLOURS[line.kind]
        bar.append(
            f'<span title="{what}" style="flex:{width:.3f};background:{colour};margin-right:1px;min-width:2px">'
            "</span>"
        )
        cell = '<td style="text-align:left;padding:0 .8em 0 0;white-space:nowrap">'
        rows.append(
            f'<tr>{cell}<span style="color:{colour}">■</span> {escape(place(line))}</td>'
            f'<td style="text-align:left">{escape(described(inside, line))}</td></tr>'
        )
    return (
        f'<div style="max-width:60em;font:13px/1.5 sans-serif"><div>{escape(title)}</div>'
        f'<div style="display:flex;height:14px;margin:.3em 0;border-radius:3px;overflow:hidden">{"".join(bar)}</div>'
        f'<details><summary>what each entry stands for</summary><table style="font-size:inherit">{"".join(rows)}'
        "</table></details></div>"
    )


def save_figure(inside: Inside, path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG: a line for each stretch of the memory, and how much of each layer group's attention it had.

    Raises:
        MissingPackageError: without matplotlib.
        StorageError: it cannot be written.
    """
    with needing("pictures need matplotlib", "plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    lines = inside.lines()
    figure = Figure(figsize=(11, 1.2 + 0.24 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, *rest = figure.subplots(
        1, 2 if inside.read else 1, squeeze=False, width_ratios=[3, 2] if inside.read else [1]
    )[0]
    places = range(len(lines))
    bars.barh(
        places,
        [line.entries[1] - line.entries[0] for line in lines],
        left=[line.entries[0] for line in lines],
        color=[COLOURS[line.kind] for line in lines],
    )
    bars.set_yticks(places, [described(inside, line, 36) for line in lines], fontsize=8)
    bars.set_xlabel("entries of the memory")
    bars.invert_yaxis()
    bars.set_ylim(len(lines) - 0.5, -0.5)
    bars.set_title(title, fontsize=9, loc="left")
    for heat in rest:
        dark = shades(inside)
        heat.imshow(dark, aspect="auto", cmap="Blues", vmin=0, vmax=1.3)
        for y, line in enumerate(lines):
            for x, share in enumerate(line.read):
                colour = "white" if dark[y][x] > 0.7 else "black"
                heat.text(x, y, f"{100 * share:.1f}", ha="center", va="center", fontsize=7, color=colour)
        heat.set_yticks([])
        heat.set_xticks(range(len(inside.layers)), [f"{a + 1}–{b}" for a, b in inside.layers], fontsize=8)
        heat.set_xlabel("layers")
        heat.set_title(
            f"per cent of the attention of “{shorter(inside.answer or '', 40)}”", fontsize=9, loc="left"
        )
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
