"""What several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MemoryFileError

if TYPE_CHECKING:
    from rich.console import Console


def _there(path: Path) -> Path:
    if not path.is_file():
        raise MemoryFileError(f"no memory file at {path}: /save in ccm chat, or session.save, writes one")
    return path


#: A saved memory or session, which is there.
MemoryFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A memory or a saved session.", callback=_there)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]


def new_console(as_json: bool = False) -> Console:
    """Where a command speaks: stdout, or stderr if stdout is for one JSON object."""
    from rich.console import Console

    return Console(stderr=as_json)
