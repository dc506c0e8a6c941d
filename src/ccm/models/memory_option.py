"""``--memory``: how a command is told which memory it has. The options that it took the place of still work."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .known import check

MemoryName = Annotated[
    str | None,
    typer.Option(
        "--memory",
        callback=check,
        metavar="NAME:option=value,…",
        help="How conversations are kept: a method, an adapter (shipped name, folder, hub id), or ./FILE.py.",
        show_default="the best for the model",
    ),
]
#: Hidden, for a release.
Adapter = Annotated[str | None, typer.Option("--adapter", hidden=True, callback=check)]
Slots = Annotated[int | None, typer.Option("--slots", hidden=True)]
Sink = Annotated[int | None, typer.Option("--sink", hidden=True)]
Window = Annotated[int | None, typer.Option("--window", hidden=True)]


def memory_name(memory: str | None, adapter: str | None, **sizes: int | None) -> str | None:
    """The memory that is asked for, as it is written; None if nobody says.

    Raises:
        ConfigError: it is asked for in both ways.
    """
    old = {"adapter": adapter, **sizes}
    given = [f"--{name}" for name, value in old.items() if value is not None]
    if memory is not None and given:
        raise ConfigError(
            f"--memory {memory} says all of it: leave {', '.join(given)} out, and write NAME:option=value"
        )
    if not given:
        return memory
    pairs = [f"{name}={value}" for name, value in sizes.items() if value is not None]
    return (adapter or "default") + (":" + ",".join(pairs) if pairs else "")
