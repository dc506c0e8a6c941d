"""``ccm train``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError, StorageError
from ..models.options import Device, DeviceMap, LoadIn, Loading
from ..models.placement import AUTO, DEFAULT_MODEL, check_names
from .options import can_hold, can_write

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..training.config import TrainConfig
    from ..training.trainer import Trainer

EPILOG = "Example: ccm train recipes/cpu-minutes.yaml compressor.slots=8 --out runs/first"


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE.yaml", help="The run (docs/training.md); with --init the model."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="In place of the recipe's; nested keys by dots."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Checkpoints, log and adapter; a run resumes from it. With --init the recipe.",
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
    init: Annotated[
        bool,
        typer.Option("--init", help="Write a recipe for MODEL (a folder or hub id) that fits this machine."),
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure a few steps; say tokens, hours and memory, and stop.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print every setting of the run and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says; Ctrl-C saves, the same command goes on."""
    Loading(None, device, dtype, load_in, device_map).check_names()
    from ..training.recipe import dump, load_recipe

    if dtype == "float16":
        raise ConfigError("--dtype float16: gradients leave its range; train in bfloat16 or float32")
    chosen = [] if dtype == AUTO else [f"bf16={str(dtype == 'bfloat16').lower()}"]
    chosen += [f"minutes={minutes}"] if minutes is not None else []
    if init:
        if overrides or extend or estimate or show or minutes is not None:
            raise ConfigError("--init takes a model and writes a recipe: leave the rest to the runs of it")
        _init(
            recipe,
            out,
            Loading(None, device, dtype, load_in, device_map),
            as_json,
        )
        return
    if recipe is None:
        raise ConfigError("expected a recipe; `ccm train --init MODEL` writes one")
    can_hold(out)
    config = load_recipe(recipe, [*(overrides or ()), *chosen])
    kind = dtype if dtype != AUTO else "bfloat16" if config.bf16 else None
    if show:
        print(dump(config), end="")
        return
    _check_files(config)
    from rich.console import Console

    # of several processes one speaks
    console = Console(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")
    loading = Loading(config.model, device, dtype, load_in, device_map)
    where = _device(loading, config)
    folder = out or Path("runs") / Path(recipe).stem
    if estimate:
        _estimate(loading, config, kind, where, folder, as_json)
        return
    from ..models.load import load_model
    from ..training.trainer import Trainer

    with _alone(folder):
        # plain weights of several processes are sharded or copied from the CPU
        first = None if device_map or (_several() and not load_in) else where
        model, tokenizer = load_model(config.model, kind, first, load_in=load_in, device_map=device_map)
        trainer = Trainer(model, tokenizer, config, folder, extend, where)
        try:
            result = _run(trainer, console)
            if trainer.processes.main:
                _finish(trainer, result, console, as_json)
        finally:
            trainer.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; of the processes of one run the first does.

    Raises:
        ConfigError: another run has it.
        StorageError: nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{folder} is being trained by another process: wait for its end, or give another --out"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder.parent}: {error.strerror or error}; give another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _init(model: str | None, out: Path | None, loading: Loading, as_json: bool) -> None:
    if loading.device_map:
        raise ConfigError("--init fits a run to one device: leave --device-map out, and give it to the run")
    check_names(model)
    path = out or Path(f"{Path(model or DEFAULT_MODEL).resolve().name.removesuffix('.gguf')}.yaml")
    can_write(path)
    if path.exists():
        raise ConfigError(f"{path} is there already: give another name with --out, or delete it")
    from ..training.starter import Machine, write_recipe

    bf16 = None if loading.dtype == AUTO else loading.dtype == "bfloat16"
    machine = Machine.here(loading.check().device)
    fit = write_recipe(path, model, machine, bf16, loading.load_in)
    if as_json:
        from dataclasses import asdict

        print(json.dumps({"recipe": str(path), **asdict(fit)}))
    else:
        named = model or f"the embedded {DEFAULT_MODEL}, as no model is named"
        room = f"{machine.name} with {machine.memory / 1e9:.0f} GB free"
        print(f"for {named}, on {room}: {fit.tokens:,} tokens a pass")
        print(f"{path} is written; next: ccm train {quote(str(path))}{fit.options} --estimate")


def _check_files(config: TrainConfig) -> None:
    """Raises DataError if a file or folder that the recipe names is not there, before a model is loaded."""
    named = {f"data.{name}.path": (options or {}).get("path") for name, options in config.data.items()}
    for key, path in named.items() if config.packed is None else [("packed", config.packed)]:
        if isinstance(path, str) and not Path(path).expanduser().exists():
            raise DataError(f"{key}: {path} is not there; give a file or a folder that is")


def _estimate(
    loading: Loading,
    config: TrainConfig,
    kind: str | None,
    where: torch.device,
    out: Path,
    as_json: bool,
) -> None:
    import time
    from dataclasses import asdict

    from ..models.load import load_model
    from ..training.estimate import check_weights, estimate
    from .plan import show
    from .progress import stages

    if _several():
        raise ConfigError("--estimate measures one process: start it without torchrun")
    check_weights(loading, kind)
    started = time.monotonic()
    first = None if loading.device_map else where
    model, tokenizer = load_model(
        config.model, kind, first, load_in=loading.load_in, device_map=loading.device_map
    )
    with stages("Measuring a few steps"):
        made = estimate(model, tokenizer, config, out, where, started)
    if as_json:
        print(json.dumps(asdict(made)))
    else:
        show(made)


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
        from ..training.publish import push_to_hub

        push_to_hub(trainer.adapter, config.push_to_hub)
        console.print(f"uploaded to {config.push_to_hub}", highlight=False)
    console.print(f"adapter: {trainer.adapter}", soft_wrap=True, highlight=False)
    for line in _next(config, trainer.adapter):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
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


def _next(config: TrainConfig, adapter: Path) -> list[str]:
    """What a user does with a trained adapter."""
    model, memory = f" --model {quote(config.model)}" if config.model else "", quote(str(adapter))
    if config.stage != "memory":
        return [f"next: train the memory on it, with base_adapter: {adapter} in its recipe"]
    return [
        f"next: ccm eval chats.jsonl{model} --memory {memory} measures it on conversations of your own",
        f"next: ccm chat{model} --memory {memory}",
    ]


def _run(trainer: Trainer, console: Console) -> dict[str, Any]:
    """Train with a progress bar; returns the last report."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from ..training.checkpoint import last_report
    from .progress import Tenths, moves

    if trainer.step:
        done = "finished already" if trainer.progress >= 1.0 else "resuming"
        hint = "; --extend trains on" if trainer.progress >= 1.0 else ""
        console.print(
            f"{trainer.folder}: {done}, at step {trainer.step}{hint}", highlight=False, soft_wrap=True
        )
    count = sum(parameter.numel() for parameter in trainer.parameters)
    console.print(f"{count:,} trained parameters", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tell = Tenths(console)
    with Progress(*columns, console=console, disable=not moves(console)) as bar:
        task = bar.add_task(f"step {trainer.step}", total=1.0)
        bar.update(task, completed=trainer.progress)

        def on_report(report: dict[str, Any]) -> None:
            line = (
                f"step {report['step']} · loss {report['loss']:.3f} · recall {report['recall']:.3f} · "
                f"{report['tokens_per_second']:.0f} tokens/s"
            )
            bar.update(task, completed=trainer.progress, description=line)
            tell(trainer.progress, line)
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
