"""``ccm bench``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.sizes import NAMES
from ..errors import ConfigError, UnknownNameError
from ..files.atomic import write_atomically
from ..models.options import DecodeIn, Device, Dtype, ModelName
from ..models.placement import AUTO, check_names
from .options import can_write

EPILOG = "Example: ccm bench --quick"


def bench(
    model: ModelName = None,
    llama: Annotated[
        str, typer.Option(metavar="FILE", help="GGUF file of the same model.", show_default="embedded")
    ] = "default",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 1,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    decode_in: DecodeIn = AUTO,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{', '.join(NAMES)}; may be given again.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PYTHON", help="Contender in another environment, by its Python; may be given again."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter: some minutes.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=can_write,
            help="Where the JSON goes, as it comes; the page is made by ccm report.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a memory beside what one would do without it: per turn, many at once, bytes, share of the limit."""
    pythons = dict(_environment(text) for text in env or ())
    for name in (*(only or ()), *pythons):
        if name not in NAMES:
            raise UnknownNameError("contender", name, list(NAMES))
    for file in (model, llama):
        check_names(file, dtype, device, decode_in=decode_in)
    from rich.console import Console
    from rich.markdown import Markdown

    from ..bench.page import tables
    from ..bench.run import bench as run
    from .progress import stages

    def keep(result: Mapping[str, Any]) -> None:
        if out is not None:
            write_atomically(out, _text(result).encode())

    with stages("ccm bench", tells=True) as tell:
        result = run(model, llama, threads, quick, device, dtype, decode_in, only or (), pythons, tell, keep)
    if as_json:
        typer.echo(_text(result), nl=False)
    else:
        Console().print(Markdown("\n\n".join(tables(result))))


def _text(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1) + "\n"


def _environment(text: str) -> tuple[str, str]:
    """A contender and the interpreter of its environment."""
    name, given, python = text.partition("=")
    if not given:
        raise ConfigError(f"--env is {text!r}: expected NAME=PYTHON, as in vllm=.venv-vllm/bin/python")
    if not Path(python).is_file():
        raise ConfigError(f"--env {name}: no file {python!r}: expected the Python of an environment")
    return name, python
