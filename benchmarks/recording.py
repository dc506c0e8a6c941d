"""A recording of ``ccm chat``: a real run on a terminal of its own, as an asciinema file and as a moving picture.

    python benchmarks/recording.py                    results/chat.cast and docs/figures/chat.svg
    python benchmarks/recording.py --only-draw        the picture anew, from the recording that is there

Waiting is cut short: what takes longer than a twentieth of a second takes that, but for the pauses of a viewer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "helpers"))
from terminal import Terminal  # noqa: E402

CAST, PICTURE = ROOT / "results" / "chat.cast", ROOT / "docs" / "figures" / "chat.svg"
SIZE = (88, 26)
#: What is typed, and how many seconds a viewer has to read what comes.
SCRIPT = (
    ("My dog is called Biscuit.", 1.2),
    ("I am allergic to peanuts.", 1.2),
    ("/compare What is my dog called?", 3.0),
    ("/memory", 3.0),
)
#: Seconds: what is more is a pause of the viewer's; the longest gap as recorded, and as shown; between two keys.
PAUSE, GAP, STEP, KEY = 0.3, 0.1, 0.05, 0.03
_CODE, _SPINNER = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\s"), re.compile("[\u2800-\u28ff]")
#: Browsers draw several blanks as one, but for this kind.
_BLANK = "\u00a0"
_COLOURS = {
    "default": "#d6dae1",
    "black": "#1b1f27",
    "red": "#e06c75",
    "green": "#7fb98b",
    "brown": "#c9a24b",
    "yellow": "#c9a24b",
    "blue": "#6ea3d8",
    "magenta": "#c08bd0",
    "cyan": "#63b8c4",
    "white": "#d6dae1",
    "brightblack": "#8a919e",
}
_BACK = "#16191f"
_WIDE, _HIGH, _EDGE = 8.0, 17.0, 14.0


def record() -> Iterator[tuple[float, str]]:
    """Pieces of output, each with its second in the recording."""
    command = [sys.executable, "-m", "ccm", "chat", "--seed", "0", "--max-tokens", "40"]
    terminal = Terminal(command, SIZE)
    at, heard, before = 0.0, 0, 0.0

    def news() -> Iterator[tuple[float, str]]:
        nonlocal at, heard, before
        for second, text in terminal.shown[heard:]:
            at += min(second - before, GAP)
            before = second
            yield at, text
        heard = len(terminal.shown)

    terminal.until("main>")
    terminal.until("at most")  # the model is there
    for count, (line, pause) in enumerate(SCRIPT, 1):
        yield from news()
        at += pause / 2 if count == 1 else 0
        for key in line:
            terminal.type(key)
            terminal.read(0.5)
            yield from news()
            at += KEY
        terminal.type("\r")
        terminal.until(lambda text, n=count: text.count("main>") > n)
        for _ in range(20):  # the line below the question comes a little later
            terminal.read(0.1)
        yield from news()
        at += pause
    terminal.type("\x04")
    terminal.end()


def shorter(pieces: Iterable[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """The same with less waiting: what only moves the cursor takes no time, and what only turns a spinner little."""
    at = before = 0.0
    for second, text in pieces:
        gap, before = second - before, second
        seen = _CODE.sub("", text).strip()
        if gap > PAUSE:
            at += gap
        elif seen:
            at += 0.005 if _SPINNER.search(seen) else min(gap, STEP)
        yield at, text


def write_cast(file: Path) -> None:
    """The recording in asciinema's format, version 2."""
    header = {"version": 2, "width": SIZE[0], "height": SIZE[1], "title": "ccm chat", "idle_time_limit": 3}
    lines = [json.dumps(header), *(json.dumps([round(at, 3), "o", text]) for at, text in shorter(record()))]
    file.write_text("\n".join(lines) + "\n")


def draw(cast: Path, file: Path) -> None:
    """The recording as one SVG that moves: a text for every line of the screen, shown while it stands there."""
    header, *events = map(json.loads, cast.read_text().splitlines())
    columns, rows = header["width"], header["height"]
    screen = pyte.Screen(columns, rows)
    stream = pyte.Stream(screen)
    spans: list[tuple[int, float, float, str]] = []
    shown: list[tuple[str, float]] = [("", 0.0)] * rows
    end = events[-1][0] + SCRIPT[-1][1]
    for at, _, text in events:
        # faint text is grey: the screen does not know faint
        stream.feed(re.sub(r"\x1b\[2m", "\x1b[90m", re.sub(r"\x1b\[2;", "\x1b[90;", text)))
        for y in range(rows):
            line = _line(screen, y)
            before, since = shown[y]
            if line != before:
                spans.append((y, since, at, before))
                shown[y] = (line, at)
    spans += [(y, since, end, line) for y, (line, since) in enumerate(shown)]
    width, height = columns * _WIDE + 2 * _EDGE, rows * _HIGH + 2 * _EDGE
    body = "".join(_span(span, end) for span in spans if span[3] and span[2] - span[1] > 0.02)
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" '
        f'font-size="13"><title>ccm chat</title>'
        f'<rect width="100%" height="100%" rx="8" fill="{_BACK}"/>{body}</svg>\n'
    )


def _line(screen: pyte.Screen, y: int) -> str:
    """One line of the screen as SVG, without its place; empty for a blank one."""
    cells = [screen.buffer[y][x] for x in range(screen.columns)]
    drawn, x = "", 0
    for (colour, bold), group in groupby(cells, lambda cell: (cell.fg, cell.bold)):
        run = "".join(cell.data for cell in group)
        if text := run.strip():
            left = x + len(run) - len(run.lstrip())
            fill = _COLOURS.get(colour, f"#{colour}" if len(colour) == 6 else _COLOURS["default"])
            weight = ' font-weight="bold"' if bold else ""
            drawn += (
                f'<tspan x="{_EDGE + left * _WIDE:g}" textLength="{len(text) * _WIDE:g}" fill="{fill}"{weight}>'
                f"{escape(text).replace(' ', _BLANK)}</tspan>"
            )
        x += len(run)
    return drawn


def _span(span: tuple[int, float, float, str], end: float) -> str:
    y, start, stop, line = span
    times = [0.0, start / end, min(1.0, stop / end)]
    values = ["hidden", "visible", "hidden"]
    if start == 0:
        times, values = times[1:], values[1:]
    if stop >= end:
        times, values = times[:-1], values[:-1]
    moving = (
        f'<animate attributeName="visibility" dur="{end:.2f}s" repeatCount="indefinite" calcMode="discrete" '
        f'values="{";".join(values)}" keyTimes="{";".join(f"{t:.4f}" for t in times)}"/>'
    )
    still = "" if stop >= end else ' visibility="hidden"'
    return f'<text y="{_EDGE + (y + 0.78) * _HIGH:g}"{still}>{line}{moving}</text>'


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only-draw", action="store_true")
    if not arguments.parse_args().only_draw:
        write_cast(CAST)
    draw(CAST, PICTURE)
