"""What several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]


def new_console(as_json: bool = False) -> Console:
    """Where a command speaks: stdout, or stderr if stdout is for one JSON object."""
    from rich.console import Console

    return Console(stderr=as_json)
