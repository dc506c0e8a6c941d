"""``ccm report``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, StorageError
from ..files.atomic import write_atomically
from .eval import FOLDER as MEASURED

EPILOG = "Example: ccm report ccm-eval/quick.json --out my-report"
#: Where pages go; a checkout does not track it.
PAGES = Path("ccm-report")
_ROOT = Path(__file__).parents[3]
#: The folder of a checkout that holds the project's own pages, and the only results that they are made of.
OWN_PAGES, OWN_RESULTS = _ROOT / "docs", _ROOT / "results"


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...", help="Result files, or folders of them.", show_default=str(MEASURED)
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results.md and results/ go.")] = PAGES,
) -> None:
    """Write a summary, and a page for every suite, from what ccm eval and the benchmarks stored."""
    from rich.console import Console

    from ..bench import page as bench
    from ..evaluation.report import benchmarks
    from ..evaluation.report.load import load
    from ..evaluation.report.pages import FOLDER, PAGE, build

    paths = paths or [MEASURED]
    own = out.resolve() == OWN_PAGES and (OWN_PAGES / PAGE).exists()
    if own and [path.resolve() for path in paths] != [OWN_RESULTS]:
        raise ConfigError(
            f"{out} holds the project's own pages, which are made of {OWN_RESULTS.name}/ alone: give --out another "
            "folder"
        )
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
