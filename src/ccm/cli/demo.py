"""``ccm demo``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingPackageError
from ..models.known import check_all, split_methods
from ..models.memory_option import MemoryName
from ..models.options import Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.placement import AUTO
from .options import AsJson, can_write, new_console

EPILOG = "Example: ccm demo --conversations 4 --methods window,ccm-merge --json"


def demo(
    conversations: Annotated[int, typer.Option(min=1, help="Held-out conversations to play.")] = 8,
    turns: Annotated[int, typer.Option(min=5, help="Turns of each; from the fifth on they are scored.")] = 10,
    methods: Annotated[
        str | None,
        typer.Option(
            callback=check_all,
            help="Memories by commas, as --memory has one; none and full always play.",
            show_default="window, the adapters for the model, and attention-matching",
        ),
    ] = None,
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    plot: Annotated[
        Path, typer.Option(metavar="PATH", callback=can_write, help="Where the picture goes.")
    ] = Path("ccm-demo.png"),
    as_json: AsJson = False,
) -> None:
    """Play held-out conversations turn by turn through every method at once, and compare them."""
    loading = Loading(model, device, dtype, load_in, device_map)
    loading.check_names()
    from ..evaluation.demo import demo as play_demo
    from ..evaluation.plot import plot as save_plot
    from ..methods.default import checked
    from .progress import moves, say

    console = new_console(as_json)
    names = split_methods(methods or "")
    if memory:
        names = [*(names or ["window"]), memory]
    for name in names:
        checked(name)  # a wrong name shows before anything is loaded
    language_model, tokenizer = loading.load()
    told = {} if moves(console) else {"tell": say}
    result = play_demo(language_model, tokenizer, console, conversations, turns, names, **told)
    try:
        save_plot(result, plot)
        console.print(f"plot: {plot}", soft_wrap=True, highlight=False)
    except MissingPackageError as error:
        console.print(f"no plot: {error}", soft_wrap=True, highlight=False, markup=False)
    if as_json:
        print(json.dumps(result))
