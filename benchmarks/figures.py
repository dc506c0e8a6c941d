"""The pictures of README and documentation, from what is stored in ``results``.

python benchmarks/figures.py       writes docs/figures/*.svg

The four methods have one colour each in all of them: memory, equal window, full context, no context.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccm.core.rule import Concat
from ccm.core.segments import lay_out
from ccm.core.visibility import parallel_mask

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"

#: Okabe and Ito (2008): they stay apart for colour-blind readers.
MEMORY, WINDOW, FULL, NONE = "#0072B2", "#E69F00", "#444444", "#9a9a9a"
INK, PALE = "#333333", "#f2f2f2"


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FIGURES / f"{name}.svg").write_text(text)


def pictures() -> dict[str, str]:
    """Every picture as SVG, by its name; the same results give the same bytes."""
    return {
        "recall": recall(_stored("reach")),
        "growth": growth(_stored("growth"), _stored("serving/first_token")),
        "mask": mask(),
        "fold": fold(),
    }


def _stored(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


# ---------------------------------------------------------------------- measured


#: The memory whose reach is drawn.
WORDS = "slots-and-words, slots of ccm-concat"


def recall(reach: dict[str, Any]) -> str:
    """How often a fact is named, by how many turns ago it was told."""
    lines = {
        WORDS: ("memory (slots and words)", MEMORY),
        f"window of the same bytes as {WORDS}": ("window of the same bytes", WINDOW),
        "full": ("full context", FULL),
    }
    figure, axes = _figure(6.4, 3.6)
    for method, (label, colour) in lines.items():
        rows = [row for row in reach["rows"] if row["method"] == method]
        places = range(len(rows))
        values = [row["accuracy"] for row in rows]
        low, high = zip(*(row["accuracy_ci"] for row in rows), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.10, linewidth=0)
        label += f", {reach['methods'][method]['kv_bytes'] / 1e6:.0f} MB"
        axes.plot(places, values, color=colour, marker="o", markersize=4, linewidth=2, label=label)
    axes.axhline(reach["chance"], color=NONE, linewidth=1, linestyle=":")
    axes.text(0, reach["chance"] - 0.02, "guessing", color=NONE, fontsize=9, va="top")
    axes.set_xticks(places, [str(row["distance"]) for row in rows])
    axes.set(
        xlabel="turns ago that the fact was told", ylabel="facts named, of eight choices", ylim=(0, 1.04)
    )
    axes.set_title(
        "The memory names old facts that the full context no longer finds", fontsize=11, loc="left"
    )
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.13))
    return _svg(figure)


def growth(sizes: dict[str, Any], first: dict[str, Any]) -> str:
    """Bytes over 1,000 turns, and seconds to the first token over 100."""
    import matplotlib.ticker

    bounded = next(row for row in sizes["rows"] if row["session"].startswith("bounded"))
    turns = bounded["turns"]
    figure, (left, right) = _figure(8.6, 3.4, columns=2)
    whole = bounded["full_context_nbytes"] / 1e6
    left.plot([1, turns], [whole / turns, whole], color=FULL, linewidth=2)
    held = [bounded["nbytes_after_100"] / 1e6, bounded["nbytes_after_all"] / 1e6]
    left.plot([100, turns], held, color=MEMORY, linewidth=2, marker="o", markersize=4)
    left.set(xscale="log", yscale="log", xlabel="turns of one conversation", ylabel="MB of keys and values")
    left.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    left.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:,.0f}"))
    left.set_ylim(0.5, 4000)
    left.text(
        turns, whole * 1.25, f"full context, {whole:,.0f} MB", color=FULL, ha="right", va="bottom", fontsize=9
    )
    left.text(
        turns, held[1] * 1.3, f"memory, {held[1]:.1f} MB", color=MEMORY, ha="right", va="bottom", fontsize=9
    )
    left.set_title("The memory stops growing", fontsize=11, loc="left")

    seconds = {name: row["median"] for name, row in first["seconds"].items()}
    names = ["turn 2", "turn 10", "turn 100", "turn 100,\nall read again"]
    values = [seconds[name] for name in ("early", "settled", "late", "stateless")]
    bars = right.bar(names, values, color=[MEMORY] * 3 + [FULL], width=0.6)
    right.bar_label(bars, [f"{value:.2f} s" for value in values], fontsize=9, padding=2)
    right.set(ylabel="seconds to the first token", ylim=(0, max(values) * 1.15))
    right.grid(False, axis="x")
    right.set_title("A late turn answers as soon as an early one", fontsize=11, loc="left")
    return _svg(figure)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "ccm",
            "svg.fonttype": "path",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": NONE,
            "axes.labelcolor": INK,
            "text.color": INK,
            "axes.grid": True,
            "grid.color": "0.92",
            "axes.axisbelow": True,
        }
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(1, columns)


def _svg(figure: Any) -> str:
    import io

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


# ---------------------------------------------------------------------- drawn


def mask() -> str:
    """Who sees whom in one parallel pass: three segments of three tokens, two COMP tokens each, rule concat."""
    rule, slots = Concat(), 2
    layout = lay_out([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], slots=slots, rule=rule)
    seen = parallel_mask(layout, rule)[0, 0]
    comp, segment = layout.comp[0].tolist(), layout.segment[0].tolist()
    names = [f"C{c + 1}" if c >= 0 else f"c{s + 1}" for c, s in zip(comp, segment, strict=True)]
    states = seen.shape[1] - len(names)
    columns = [f"h{k // slots + 1}" for k in range(states)] + names
    cell, left, top, gap = 26, 118, 92, 14
    parts = [_text(14, 26, "Who sees whom in one parallel pass", size=16, weight=600)]
    parts += [
        _text(
            14,
            46,
            "Rows ask, columns are asked. Text sees slots of the past and itself, never old text.",
            NONE,
        )
    ]

    def x(column: int) -> int:
        return left + column * cell + (gap if column >= states else 0)

    for k, name in enumerate(columns):
        colour = MEMORY if k < states or name[0] == "C" else INK
        parts.append(_text(x(k) + cell / 2, top - 8, name, colour, anchor="middle", size=11))
    parts.append(_text(x(0), top - 26, "slots", MEMORY, size=12))
    parts.append(_text(x(states), top - 26, "the row: text c, COMP tokens C", INK, size=12))
    for q in range(len(names)):
        is_comp = comp[q] >= 0
        what = f"COMP {comp[q] + 1} of turn {segment[q] + 1}" if is_comp else f"text of turn {segment[q] + 1}"
        y = top + q * cell
        parts.append(
            _text(left - 8, y + cell * 0.68, what, MEMORY if is_comp else INK, anchor="end", size=11)
        )
        for k in range(len(columns)):
            on = bool(seen[q, k])
            colour = "#ffffff" if not on else MEMORY if k < states or columns[k][0] == "C" else "#a9b8c2"
            parts.append(_box(x(k) + 1, y + 1, cell - 2, cell - 2, colour, "#dddddd"))
    height = top + len(names) * cell + 34
    parts.append(
        _text(
            14,
            height - 12,
            "h1 and h2 are the slots that turns 1 and 2 have become.",
            NONE,
        )
    )
    return _drawing(x(len(columns)) + 16, height, parts)


def fold() -> str:
    """How a turn becomes slots: text is read, COMP tokens read it, and their keys and values stay."""
    parts = [_text(14, 28, "A turn becomes slots", size=16, weight=600)]
    steps = (
        ("1  The turn is read behind the memory.", ("memory", "turn", "")),
        ("2  COMP tokens read the memory and the turn.", ("memory", "turn", "comp")),
        ("3  Their keys and values are the new slots. The turn's own are let go.", ("longer", "", "")),
    )
    for row, (title, (held, turn, comp)) in enumerate(steps):
        y = 64 + row * 92
        parts.append(_text(14, y, title, INK, size=13))
        place = 14
        count = 8 if held == "longer" else 4
        for k in range(count):
            parts.append(
                _box(place, y + 12, 22, 34, MEMORY if k < 4 or held == "longer" else PALE, "#ffffff")
            )
            place += 24
        place += 10
        if turn:
            for word in ("My", "dog", "is", "called", "Biscuit", "."):
                wide = 16 + 8 * len(word)
                parts.append(_box(place, y + 12, wide, 34, "#d9dfe3", "#ffffff"))
                parts.append(_text(place + wide / 2, y + 34, word, INK, anchor="middle", size=12))
                place += wide + 2
            place += 10
        if comp:
            for k in range(4):
                parts.append(_box(place, y + 12, 34, 34, "#ffffff", MEMORY))
                parts.append(_text(place + 17, y + 34, f"C{k + 1}", MEMORY, anchor="middle", size=12))
                place += 36
        if held == "longer":
            parts.append(_brace(14 + 4 * 24, 14 + 8 * 24 - 2, y + 50))
            parts.append(
                _text(place, y + 34, "four slots more, whatever the length of the turn", NONE, size=12)
            )
    return _drawing(640, 330, parts)


def _drawing(width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="system-ui, sans-serif">'
    )
    return "\n".join([head, _box(0, 0, width, height, "#ffffff", "none"), *parts, "</svg>"]) + "\n"


def _box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{line}"/>'


def _brace(start: float, stop: float, y: float) -> str:
    """A brace under what is new."""
    return f'<path d="M{start:g} {y:g}v5h{stop - start:g}v-5" fill="none" stroke="{MEMORY}"/>'


def _text(
    x: float, y: float, said: str, colour: str = INK, anchor: str = "start", size: int = 12, weight: int = 400
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{said}</text>'
    )


if __name__ == "__main__":
    sys.exit(main())
