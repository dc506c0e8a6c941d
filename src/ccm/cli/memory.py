"""``ccm memory``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.memory_option import MemoryName
from ..models.options import Device, Dtype, Loading, ModelName
from ..models.placement import AUTO
from .options import AsJson, MemoryFile, can_write, new_console

if TYPE_CHECKING:
    from rich.table import Table

    from ..methods.inside import Inside

app = typer.Typer(help="Look at memory and session files.")


@app.command(epilog="Example: ccm memory inspect chat.ccm --json")
def inspect(
    file: MemoryFile,
    as_json: AsJson = False,
) -> None:
    """Show what a memory file holds, and that it is intact."""
    from rich.table import Table

    from ..core.memory import Memory
    from ..files.fingerprint import made_by
    from ..methods.accounting import describe

    memory, metadata = Memory.load(file)
    rows = describe(memory)
    session = json.loads(metadata["session"]) if "session" in metadata else None
    if as_json:
        result = {"file": str(file), "format": metadata["format"], "fingerprint": memory.fingerprint}
        print(json.dumps({**result, "nbytes": memory.nbytes, "rows": rows, "session": session}))
        return
    console = new_console()
    kind = f"session of {session['turns']} turns, budget {session['budget']}" if session else "memory"
    console.print(
        f"{file}: {kind}\nmade by {made_by(memory.fingerprint)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    table = Table(box=None, show_header=False, padding=(0, 1))  # side by side they are wider than a screen
    for name in rows[0]:
        table.add_row(name.replace("_", " "), *(f"{row[name]:,}" for row in rows))
    console.print(table)


@app.command(epilog="Example: ccm memory show chat.ccm --ask 'What is my cat called?' --png memory.png")
def show(
    file: MemoryFile,
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Ask this, and show which entries the answer read; nothing is kept."
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=can_write, help="Draw it into this file.")
    ] = None,
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    as_json: AsJson = False,
) -> None:
    """Draw which turns each slot of a saved session stands for, and which of them an answer reads."""
    loading = Loading(model, device, dtype)
    loading.check()
    from ..methods.default import checked, saved_memory
    from ..methods.picture import save_figure, shorter

    spec = saved_memory(file) if memory is None else checked(memory)
    if ask is None:
        inside = _saved(file, spec.method())
    else:
        from ..methods.default import open_method
        from ..session import Session

        language_model, tokenizer = loading.load()
        session = Session.load(file, open_method(spec, language_model, tokenizer), tokenizer)
        inside = session.ask(ask, do_sample=False, repetition_penalty=1.1, max_new_tokens=64)
    if png:
        save_figure(inside, png, f"{file.name}: {spec.text}")
    if as_json:
        print(json.dumps({"file": str(file), "memory": spec.text, "asked": ask, **inside.as_dict()}))
        return
    console = new_console()
    console.print(f"{file}: {spec.text}, {len(inside.turns)} turns", highlight=False, markup=False)
    console.print(inside_table(inside))
    if inside.answer is not None:
        shares = "figures: per cent of the answer's attention, by layers"
        text = f"asked: {ask}\nanswer: {shorter(inside.answer, 1000)}\n{shares}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if not inside.turns:
        console.print("this file was saved before turns were kept: nobody knows which is where", style="dim")


def _saved(file: Path, method: Any) -> Inside:
    """A saved session taken apart, without its model."""
    from ..core.memory import Memory
    from ..errors import MemoryFileError
    from ..methods.inside import look, saved, saved_pins

    kept, metadata = Memory.load(file)
    try:
        state = json.loads(metadata["session"])
        turns, pins = saved(state), saved_pins(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MemoryFileError(f"{file} holds a memory but no session ({error})") from error
    return look(method, kept.rows[0], turns, pins=pins)


#: How dark a cell of the heat map is.
_SHADES = " ░▒▓█"


def inside_table(inside: Inside) -> Table:
    """A line for each stretch of the memory: what it is, what it stands for, and how much of the answer's attention
    each layer group paid to it."""
    from rich.table import Table
    from rich.text import Text

    from ..methods.picture import COLOURS, place, shades, speaker, words

    table = Table(box=None, padding=(0, 1), expand=True)
    for name in ("entries", "as", "of", "tokens"):
        table.add_column(name, no_wrap=True, justify="right" if name == "tokens" else "left")
    for start, stop in inside.layers:
        table.add_column(f"{start + 1}–{stop}", no_wrap=True, justify="right")
    table.add_column("what was said", no_wrap=True, overflow="ellipsis", ratio=1)
    for line, dark in zip(inside.lines(), shades(inside), strict=True):
        read = zip(line.read, dark, strict=True)
        cells = (f"{_SHADES[math.ceil(4 * shade)] * 2}{100 * share:5.1f}" for share, shade in read)
        what = Text.assemble(("■ ", COLOURS[line.kind]), place(line))
        said = Text(words(inside, line, 400))
        table.add_row(what, line.how, speaker(inside, line), str(line.tokens or ""), *cells, said)
    return table
