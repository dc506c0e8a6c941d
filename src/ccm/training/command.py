"""``ccm train``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

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
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with a finished run for as long again.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print every setting of the run and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says; Ctrl-C saves, the same command goes on."""
    from .recipe import dump, load_recipe

    config = load_recipe(recipe, overrides or ())
    if show:
        print(dump(config), end="")
        return
    from rich.console import Console

    # of several processes one speaks
    console = Console(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")
    import torch

    from ..models import load_model
    from .trainer import Trainer

    model, tokenizer = load_model(config.model, dtype=torch.bfloat16 if config.bf16 else None)
    trainer = Trainer(model, tokenizer, config, out or Path("runs") / recipe.stem, extend)
    try:
        result = _run(trainer, console)
        if trainer.processes.main:
            _finish(trainer, result, console, as_json)
    finally:
        trainer.close()


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
