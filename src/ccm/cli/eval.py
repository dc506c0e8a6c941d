"""``ccm eval``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.loading import Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.memory_option import Adapter, memory_name
from ..models.placement import AUTO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.runner import Evaluation
    from ..evaluation.suites import Plan, Suite

EPILOG = "Example: ccm eval quick --methods none,full,ccm-concat,streaming-llm@ccm-concat --limit 2"


@dataclass(frozen=True)
class Options:
    """What is measured, as it was asked for; every process makes its evaluation from it."""

    suite: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    limit: int | None
    loading: Loading
    memory: str | None
    first_stage: str | None
    threads: int | None
    strict: bool = False

    def chosen(self) -> tuple[Suite, list[Plan]]:
        """The suite, and its tasks with their methods."""
        from ..errors import ConfigError
        from ..evaluation.suites import get_suite, own_suite

        own = Path(self.suite)
        suite = own_suite(own, self.strict) if own.suffix == ".jsonl" else get_suite(self.suite)
        if self.strict and own.suffix != ".jsonl":
            raise ConfigError(
                f"--strict is for a .jsonl file of your own, got suite {self.suite}: leave it out"
            )
        return suite, suite.plans(self.tasks, self.methods, self.limit, self.added())

    def added(self) -> tuple[str, ...]:
        """A memory, and a window of equal bytes."""
        return (self.memory, f"streaming-llm@{self.memory}") if self.memory else ()


def prepare(options: Options) -> Evaluation:
    """The evaluation, its model and adapters loaded."""
    import torch

    from ..evaluation.runner import Evaluation
    from ..files import adapter_folder, base_stage

    suite, plans = options.chosen()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = options.loading.load()
    if first_stage := options.first_stage or suite.first_stage:
        base_stage.attach(model, adapter_folder.first_stage(first_stage))
        base_stage.merge(model)
    return Evaluation(model, tokenizer, suite.name, plans, [*options.methods, *options.added()])


def evaluate(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE", help="quick, paper, tuned, streams, hub, or a .jsonl file of your own."
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="By commas: as --memory has one, or NAME@OTHER (as many KV entries as OTHER).",
            show_default="the suite's",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Some of the suite's tasks, by commas.", show_default="all")
    ] = None,
    model: ModelName = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:option=value,…",
            help="A memory of yours, such as an adapter's folder; it and a window of equal bytes join the methods.",
        ),
    ] = None,
    first_stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Tune the model, for every method, by the first stage of this adapter.",
            show_default="the suite's",
        ),
    ] = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task.", show_default="the suite's")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Records; a run resumes from it. The summary goes to FOLDER.json.",
            show_default="results/eval/ and the suite's name",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that share out the work.",
            show_default="one a core, as far as memory and work reach; one with an accelerator",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each process.", show_default="the cores, shared out"),
    ] = None,
    adapter: Adapter = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Your own file: end with an error if something is left out.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Measure methods on tasks; Ctrl-C saves, the same command goes on."""
    from rich.console import Console

    from ..evaluation.suites import parse_method, split_methods
    from ..methods.default import checked

    named = tuple(split_methods(methods or ""))
    loading = Loading(model, device, dtype, load_in, device_map)
    added = memory_name(memory, adapter)
    options = Options(suite, named, _names(tasks), limit, loading, added, first_stage, threads, strict)
    chosen, plans = options.chosen()
    for text in {text for plan in plans for text in plan.methods}:
        checked(parse_method(text))  # a wrong name shows before anything is loaded
    loading.check()
    folder = out or Path("results") / "eval" / chosen.name
    console = Console(stderr=as_json)
    for tally in (entry.task.tally for entry in plans):
        if tally:
            console.print(str(tally), highlight=False, soft_wrap=True, markup=False)
    with console.status("Reading the tasks"):
        evaluation = prepare(options)
    result = _run(evaluation, options, folder, processes, console)
    if as_json:
        print(json.dumps(result))
    else:
        console.print(_table(result))
    for method, reason in result["skipped"].items():
        console.print(f"left out: {method}: {reason}", highlight=False, soft_wrap=True, markup=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"results: {folder}.json", highlight=False, soft_wrap=True)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _run(
    evaluation: Evaluation, options: Options, folder: Path, processes: int | None, console: Console
) -> dict[str, Any]:
    """Measure, with a bar and with helpers."""
    import torch
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from ..evaluation.runner import Progress as Place
    from ..evaluation.workers import Workers, how_many

    count = processes or how_many(evaluation.model, evaluation.left(folder))
    if count > 1:
        options = replace(options, threads=options.threads or max(1, torch.get_num_threads() // count))
        torch.set_num_threads(options.threads)

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    if (folder / "records.jsonl").exists():
        console.print(f"{folder}: going on with what is measured there", highlight=False, soft_wrap=True)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def on_progress(place: Place) -> None:
            where = f"{place.task} · {place.method} · {place.item}"
            bar.update(task, completed=place.done, total=place.total, description=where)

        try:
            with Workers(count - 1, prepare, options, folder):
                return evaluation.run(folder, on_progress, count)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f"saved in {folder}; the same command goes on", highlight=False, soft_wrap=True)
            raise


def _table(result: dict[str, Any]) -> Table:
    """Every task at its last step; gains over other methods and earlier steps are for ``ccm report``."""
    from rich import box
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("method", "metric", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("value", "95 % CI", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    last: dict[str, int] = {}
    for row in result["rows"]:
        last[row["task"]] = max(last.get(row["task"], 0), row["step"])
    task = method = None
    for row in result["rows"]:
        if row["tag"] or row["step"] != last[row["task"]] or " " in row["metric"]:
            continue
        if row["task"] != task:
            task, method = row["task"], None
            table.add_section()
            table.add_row(f"{task}, step {row['step']}", style="bold cyan")
        first, method = row["method"] != method, row["method"]
        known = row["ci_low"] is not None and row["ci_high"] is not None
        table.add_row(
            f"  {method}" if first else "",
            row["metric"].replace("_", " "),
            f"{row['value']:.3f}",
            f"{row['ci_low']:.2f}, {row['ci_high']:.2f}" if known else "",
            decimal(round(row["kv_bytes"])) if first else "",
        )
    return table
