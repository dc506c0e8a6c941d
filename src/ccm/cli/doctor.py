"""``ccm doctor``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from .options import AsJson, new_console

if TYPE_CHECKING:
    from .checks import Check

EPILOG = "Example: ccm doctor --json"


def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, what would work, and the command that mends what is missing."""
    from rich.table import Table
    from rich.text import Text

    from .checks import checks

    found = checks()
    broken = [check for check in found if check.required and not check.ok]
    if as_json:
        print(json.dumps({"ok": not broken, "checks": [asdict(check) for check in found]}))
    else:
        table = Table("", "check", "found", box=None, padding=(0, 1))
        for check in found:
            mark = ("✓", "green") if check.ok else ("✗", "red") if check.required else ("–", "yellow")
            table.add_row(Text(*mark), Text(check.name, no_wrap=True), Text(check.found))
        console = new_console()
        console.print(table)
        for check in found:  # never cut: this is what is copied
            if not check.ok:
                console.print(f" {check.name}: {check.fix}", soft_wrap=True, highlight=False, markup=False)
        console.print(_next(found), soft_wrap=True, highlight=False, markup=False)
    if broken:
        raise typer.Exit(1)


def _next(found: Sequence[Check]) -> str:
    """What a user does now."""
    broken = [check for check in found if check.required and not check.ok]
    if broken:
        many = f"{len(broken)} required checks" if len(broken) > 1 else "1 required check"
        return f"{many} failed; next: {broken[0].fix}, then ccm doctor again"
    return "ready; next: ccm chat talks with the embedded model, ccm demo shows what its memory is worth"
