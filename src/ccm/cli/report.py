"""``ccm report``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
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

    from ..bench import page as bench
    from ..evaluation.report import benchmarks
    from ..evaluation.report.load import load
    from ..evaluation.report.pages import FOLDER, PAGE, build

    paths = paths or [Path("results")]
    results = load(paths)
    folders = [path for path in paths if path.is_dir()]
    files = build(results, benchmarks.load(folders))
    for path in (folder / "bench.json" for folder in folders):
        if path.is_file():
            measured = json.loads(path.read_text(encoding="utf-8"))
            files |= {bench.PAGE: bench.page(measured).encode(), bench.PICTURE: bench.picture(measured)}
    try:
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {out}: {error.strerror or error}") from error
    for name, content in files.items():
        write_atomically(out / name, content)
    suites = ", ".join(result.suite for result in results)
    line = f"{out / PAGE}; a page and a picture in {out / FOLDER} of each suite: {suites}"
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
