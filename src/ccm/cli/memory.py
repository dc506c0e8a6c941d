"""``ccm memory``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, new_console

app = typer.Typer(help="Look at memory and session files.")


@app.command(epilog="Example: ccm memory inspect chat.ccm --json")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A memory or a saved session.")],
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
