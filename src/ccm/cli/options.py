"""What several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MemoryFileError, StorageError
from ..files.kind import format_of

if TYPE_CHECKING:
    from rich.console import Console


def memory_file(path: Path | None) -> Path | None:
    """A memory file that is there and says that it is one; the rest is looked at when it is read.

    Raises:
        MemoryFileError: it is not there, cannot be read, or is another kind of file.
    """
    if path is None:
        return None
    made = "/save in ccm chat, or session.save, writes one"
    if not path.is_file():
        raise MemoryFileError(f"no memory file at {path}: {made}")
    try:
        known = format_of(path).startswith("ccm-memory/")
    except OSError as error:
        raise MemoryFileError(f"{path} cannot be read: {error.strerror or error}") from error
    if not known:
        raise MemoryFileError(
            f"{path}: this is no usable stored memory: it is cut off, or another kind of file; {made}"
        )
    return path


def can_write(path: Path | None) -> Path | None:
    """A file that can be written, as far as its folder tells; what takes minutes should not end with this.

    Raises:
        StorageError: there is no such folder, nothing may be written into it, or the name is that of a folder.
    """
    if path is None:
        return None
    folder = path.parent
    if not folder.is_dir():
        raise StorageError(
            f"cannot write {path}: there is no folder {folder}; make it, or give another place"
        )
    if path.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder; give the name of a file in it")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write {path}: you may not write to {folder}; give another place")
    return path


def can_hold(folder: Path | None) -> Path | None:
    """A folder that files can be written into, or that can be made, as far as what is there tells.

    Raises:
        StorageError: a file is in its place or in that of a folder above it, or nothing may be written there.
    """
    if folder is None:
        return None
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise StorageError(f"cannot write to {folder}: {there} is a file; give another folder")
    if not os.access(there, os.W_OK):
        raise StorageError(f"cannot write to {folder}: you may not write to {there}; give another folder")
    return folder


#: Columns where nobody looks at them.
_WIDE = 200

#: A saved memory or session, which is there.
MemoryFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A memory or a saved session.", callback=memory_file)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]


def new_console(as_json: bool = False) -> Console:
    """Where a command speaks: stdout, or stderr if stdout is for one JSON object.

    In a file or a pipe tables are as wide as they need to be, unless COLUMNS says how wide it is to be.
    """
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console
