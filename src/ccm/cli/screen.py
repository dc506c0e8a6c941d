"""What ``ccm chat`` shows beside the answers: who talks, what the memory holds, answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .. import __version__

if TYPE_CHECKING:
    from ..comparison import Compared, Way
    from ..methods.inside import Said
    from ..session import Session

EMBEDDED = (
    "This embedded model is very small (135 million parameters): it shows what a memory does, and knows little. "
    "Your own model: ccm chat --model FOLDER"
)
#: Parts of a memory, with their colours, and what is free.
_PARTS = {"pinned": "magenta", "sink": "yellow", "slots": "blue", "window": "green"}


def banner(model: str | None, memory: str | None) -> Text:
    """What stands on the screen before anything is loaded."""
    text = Text.assemble(
        (f"ccm {__version__}", "bold"),
        f" · model {model or 'SmolLM2-135M-Instruct'} · memory {memory or 'the best for it'}\n",
    )
    if model is None:
        text.append(EMBEDDED + "\n", "dim")
    return text.append("/help lists the commands · Ctrl-C stops an answer · Ctrl-D leaves", "dim")


def limit(session: Session) -> int | None:
    """Most entries of a session's memory; None: it grows with what is said."""
    own = session.method.limit
    return None if own is None else own + session.memory.rows[0].pinned


def most(session: Session) -> str:
    """The bytes that the memory has at most; empty if it grows with what is said."""
    from ..methods.accounting import most_nbytes

    nbytes = most_nbytes(session.memory, session.method)
    return "" if nbytes is None else decimal(nbytes)


def budget(session: Session) -> str:
    """Which memory it is, and how large it may become."""
    name = f"memory {session.method.text}"
    if (entries := limit(session)) is None:
        return f"{name}: grows with what is said"
    return f"{name}: at most {entries} entries, {most(session)}, however long you talk"


def bar(stats: Mapping[str, int], limit: int | None, width: int) -> list[tuple[str, str]]:
    """A memory as a bar of so many characters: (colour, text) of each part, and of what is free."""
    held = sum(stats[name] for name in _PARTS)
    whole = max(held, limit or 0, 1)
    pieces, shown, reached = [], 0, 0
    for name, colour in _PARTS.items():
        reached += stats[name]
        end = max(round(width * reached / whole), shown + (stats[name] > 0))
        pieces.append((colour, "█" * (end - shown)))
        shown = end
    return [*pieces, ("", "░" * (width - shown))]


def memory_bar(stats: Mapping[str, int], limit: int | None, width: int) -> Text:
    """The bar, and what its colours are."""
    legend = [(f" {stats[name]} {name}", colour) for name, colour in _PARTS.items() if stats[name]]
    free = (
        [(f" {limit - held} free", "dim")]
        if limit and (held := sum(stats[n] for n in _PARTS)) < limit
        else []
    )
    parts = [(text, colour) for colour, text in bar(stats, limit, width)]
    return Text.assemble(*parts, "\n", *legend, *free)


def turns(said: Sequence[Said], first: int = 0) -> Table:
    """Turns, each on a line or two."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column(style="cyan")
    table.add_column(ratio=1)
    for number, turn in enumerate(said, first + 1):
        table.add_row(str(number), turn.role, Text(" ".join((turn.text or "").split())))
    return table


def side_by_side(answers: Mapping[Way, Compared], titles: Mapping[Way, str]) -> Table:
    """Answers in columns, under what they were read from."""
    table = Table(padding=(0, 1), expand=True)
    for way, answer in answers.items():
        held = f"{decimal(answer.kv_bytes)} of keys and values" if answer.kv_bytes else "no keys and values"
        table.add_column(f"{titles[way]}\n[dim]{held}[/dim]", ratio=1)
    table.add_row(*(Text(answer.text + (" …" if answer.cut else "")) for answer in answers.values()))
    return table


def settings(chosen: Mapping[str, Any], own: Mapping[str, Any]) -> Table:
    """How answers are written: what was chosen, and the model's own for the rest."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, value in own.items():
        given = chosen.get(name)
        shown = value if given is None else given
        table.add_row(name, "none" if shown is None else f"{shown:g}", "" if given is None else "yours")
    return table
