"""``ccm report``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import StorageError
from ..files.atomic import write_atomically

EPILOG = "Example: ccm report results/eval --out docs"


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]...", help="Result files, or folders of them.", show_default="results"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results.md and results/ go.")] = Path(
        "docs"
    ),
) -> None:
    """Write a summary, and a page for every suite, from what ccm eval and the benchmarks stored."""
    from rich.console import Console

    from ..evaluation.report import benchmarks
    from ..evaluation.report.load import load
    from ..evaluation.report.pages import FOLDER, PAGE, build

    paths = paths or [Path("results")]
    results = load(paths)
    files = build(results, benchmarks.load([path for path in paths if path.is_dir()]))
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {out}: {error.strerror or error}") from error
    for name, content in files.items():
        write_atomically(out / name, content)
    suites = ", ".join(result.suite for result in results)
    line = f"{out / PAGE}; a page and a picture in {out / FOLDER} of each suite: {suites}"
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
