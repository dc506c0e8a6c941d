"""``ccm report``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import StorageError
from ...storage.atomic import write_atomically

EPILOG = "Example: ccm report results/eval --out docs"


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...", help="Result files, or folders of them.", show_default="results/eval"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results.md and figures/ go.")] = Path(
        "docs"
    ),
) -> None:
    """Write the page of results, with tables and figures, from what ccm eval stored."""
    from rich.console import Console

    from .load import load
    from .page import FIGURES, PAGE, build

    results = load(paths or [Path("results/eval")])
    page, figures = build(results)
    folder = out / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}") from error
    for name, content in figures.items():
        write_atomically(folder / name, content)
    write_atomically(out / PAGE, page.encode())
    suites = ", ".join(result.suite for result in results)
    line = f"{out / PAGE}: suites {suites}; {len(figures)} figures in {folder}"
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
