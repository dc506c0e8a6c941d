"""``ccm plan``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.memory_option import Adapter, MemoryName, Sink, Slots, Window, memory_name
from ..models.options import Device, Dtype, LoadIn, Loading, ModelName
from ..models.placement import AUTO
from ..serving.options import check_store
from .options import new_console

if TYPE_CHECKING:
    from ..planning.plan import Figure, Plan

EPILOG = "Example: ccm plan --users 1000 --turns 200 --gpu-memory 80"


def plan(
    users: Annotated[int, typer.Option(min=1, help="Conversations.")],
    turns: Annotated[int, typer.Option(min=1, help="Turns of each; every second one is an answer.")],
    tokens_per_turn: Annotated[
        int | None, typer.Option(min=1, help="With what the chat template adds.", show_default="64")
    ] = None,
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="GB", help="Of one GPU, in 10^9 bytes.", show_default="that of the first GPU here"
        ),
    ] = None,
    pace: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Between two answers of one user.", show_default="60"),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=check_store,
            help="Measure this store, in a session that is deleted again.",
            show_default="a temporary SQLite file",
        ),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time folding, prefill and commits on this machine.")] = True,
    adapter: Adapter = None,
    slots: Slots = None,
    sink: Sink = None,
    window: Window = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Plan for a number of users: KV bytes, GPUs, prefill and store; each figure says where it comes from."""
    Loading(model, device, dtype, load_in).check_names()
    named = memory_name(memory, adapter, slots=slots, sink=sink, window=window)
    from ..planning.plan import Load
    from ..planning.plan import plan as make_plan
    from .progress import stages

    load = Load(users, turns, tokens_per_turn, pace)
    with stages("Planning", tells=True) as tell:
        made = make_plan(
            load,
            model=model,
            device=device,
            dtype=dtype,
            load_in=load_in,
            memory=named,
            gpu_memory=None if gpu_memory is None else int(gpu_memory * 1e9),
            store=store,
            measured=measure,
            tell=tell,
        )
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(made)))
    else:
        show(made)


def show(made: Plan) -> None:
    """Print the figures of a plan, and where each comes from."""
    from rich.table import Table
    from rich.text import Text

    console = new_console()
    console.print(Text(f"{made.model}; {made.memory}"), soft_wrap=True)
    for title, figures in made.sections.items():
        table = Table(title, "", "", box=None, padding=(0, 2, 0, 0))
        table.columns[1].justify = "right"
        for figure in figures:
            origin = f"{figure.origin}: {figure.note}" if figure.note else figure.origin
            table.add_row(Text(figure.text), Text(_amount(figure)), Text(origin))
        console.print()
        console.print(table)


def _amount(figure: Figure) -> str:
    value, unit = figure.value, figure.unit
    if unit in ("bytes", "bytes/s"):
        for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if value >= size:
                return f"{value / size:,.2f} {name}{unit[5:]}"
        return f"{value:,.0f} {unit}"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms"
    if unit in ("s", "1/s"):
        return f"{value:,.3g} {unit}"
    if unit == "h":
        return f"{value:.3g} h" if value >= 1 else f"{60 * value:.2g} min"
    return f"{value:.3g}" if unit == "x" else f"{value:,.0f}"
