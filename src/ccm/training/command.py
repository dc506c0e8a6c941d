"""``ccm train``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..placement import AUTO, Device, DeviceMap, LoadIn, Loading

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .config import TrainConfig
    from .trainer import Trainer

EPILOG = "Example: ccm train recipes/cpu-minutes.yaml compressor.slots=8 --out runs/first"


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The run (docs/training.md).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="In place of the recipe's; nested keys by dots."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Checkpoints, log and adapter; a run resumes from it.",
            show_default="runs/ and the recipe's name",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="Stop after so many minutes of training; the learning rate follows the clock.",
            show_default="the recipe's",
        ),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with a finished run for as long again.")
    ] = False,
    device: Device = AUTO,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Of the frozen weights: float32 or bfloat16.",
            show_default="the recipe's",
        ),
    ] = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    show: Annotated[bool, typer.Option("--show", help="Print every setting of the run and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says; Ctrl-C saves, the same command goes on."""
    from .recipe import dump, load_recipe

    if dtype == "float16":
        raise ConfigError("--dtype float16: gradients leave its range; train in bfloat16 or float32")
    chosen = [] if dtype == AUTO else [f"bf16={str(dtype == 'bfloat16').lower()}"]
    chosen += [f"minutes={minutes}"] if minutes is not None else []
    config = load_recipe(recipe, [*(overrides or ()), *chosen])
    kind = dtype if dtype != AUTO else "bfloat16" if config.bf16 else None
    if show:
        print(dump(config), end="")
        return
    from rich.console import Console

    # of several processes one speaks
    console = Console(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")
    where = _device(Loading(config.model, device, dtype, load_in, device_map), config)
    from ..models import load_model
    from .trainer import Trainer

    # plain weights of several processes are sharded or copied from the CPU
    first = None if device_map or (_several() and not load_in) else where
    model, tokenizer = load_model(config.model, kind, first, load_in=load_in, device_map=device_map)
    trainer = Trainer(model, tokenizer, config, out or Path("runs") / recipe.stem, extend, where)
    try:
        result = _run(trainer, console)
        if trainer.processes.main:
            _finish(trainer, result, console, as_json)
    finally:
        trainer.close()


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _device(loading: Loading, config: TrainConfig) -> torch.device:
    """Of this process, one of several perhaps.

    Raises:
        ConfigError: it is not there, or options exclude each other.
    """
    import torch

    device = loading.check().device
    if not _several():
        return device
    if loading.device_map or ":" in loading.device:
        raise ConfigError(
            "several processes take one device each: leave --device-map and the number of --device out"
        )
    if loading.load_in and config.parallel == "fsdp2":
        raise ConfigError("parallel: fsdp2 shards plain weights only; with --load-in give parallel=ddp")
    return device if device.type == "cpu" else torch.device(device.type, int(os.environ["LOCAL_RANK"]))


def _finish(trainer: Trainer, result: dict[str, Any], console: Console, as_json: bool) -> None:
    from dataclasses import asdict

    config = trainer.config
    if config.push_to_hub:
        from .publish import push_to_hub

        push_to_hub(trainer.adapter, config.push_to_hub)
        console.print(f"uploaded to {config.push_to_hub}", highlight=False)
    console.print(f"adapter: {trainer.adapter}", soft_wrap=True, highlight=False)
    if as_json:
        best = {"best": {trainer.stage.best_by: trainer.best}, "adapter": str(trainer.adapter)}
        print(json.dumps({**result, **best, "config": asdict(config)}))
    below = [
        f"{name} is {result[name]}, the recipe requires {least}"
        for name, least in config.require.items()
        if result[name] < least
    ]
    if below:
        print(f"failed: {'; '.join(below)}", file=sys.stderr)
        raise typer.Exit(1)


def _run(trainer: Trainer, console: Console) -> dict[str, Any]:
    """Train with a progress bar; returns the last report."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from .checkpoint import last_report

    if trainer.step:
        done = "finished already" if trainer.progress >= 1.0 else "resuming"
        hint = "; --extend trains on" if trainer.progress >= 1.0 else ""
        console.print(
            f"{trainer.folder}: {done}, at step {trainer.step}{hint}", highlight=False, soft_wrap=True
        )
    count = sum(parameter.numel() for parameter in trainer.parameters)
    console.print(f"{count:,} trained parameters", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"step {trainer.step}", total=1.0)
        bar.update(task, completed=trainer.progress)

        def on_report(report: dict[str, Any]) -> None:
            line = (
                f"step {report['step']} · loss {report['loss']:.3f} · recall {report['recall']:.3f} · "
                f"{report['tokens_per_second']:.0f} tokens/s"
            )
            bar.update(task, completed=trainer.progress, description=line)
            if "perplexity" in report:
                figures = ("perplexity", *trainer.stage.figures)
                quality = " · ".join(f"{name.replace('_', ' ')} {report[name]:.3f}" for name in figures)
                bar.console.print(f"{line} · {quality}", highlight=False, soft_wrap=True)

        try:
            return trainer.run(on_report) or last_report(trainer.folder)
        except (KeyboardInterrupt, SystemExit):
            console.print(
                f"saved in {trainer.folder} at step {trainer.saved}; the same command goes on",
                highlight=False,
                soft_wrap=True,
            )
            raise
