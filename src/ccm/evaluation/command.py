"""``ccm eval``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .runner import Evaluation

DTYPES = ("float32", "bfloat16", "float16")
EPILOG = "Example: ccm eval quick --methods none,full,ccm-concat,streaming-llm@ccm-concat --limit 2"


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
            help="By commas: NAME, NAME:option=value, NAME@OTHER (as many KV entries as OTHER), or an adapter.",
            show_default="the suite's",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Some of the suite's tasks, by commas.", show_default="all")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a causal language model.", show_default="embedded"),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="An adapter's folder or hub id; it and a window of equal bytes join the methods.",
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
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Of the weights: float32, bfloat16 or float16.",
            show_default="the checkpoint's",
        ),
    ] = None,
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
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Measure methods on tasks; Ctrl-C saves, the same command goes on."""
    from rich.console import Console

    from .suites import get_suite, own_suite, parse_method, split_methods

    own = Path(suite)
    chosen = own_suite(own) if own.suffix == ".jsonl" else get_suite(suite)
    named = split_methods(methods or "")
    added = [adapter, f"streaming-llm@{adapter}"] if adapter else []
    plans = chosen.plans(_names(tasks), named, limit, added)
    for text in {text for plan in plans for text in plan.methods}:
        parse_method(text).method()  # a wrong name shows before anything is loaded
    folder = out or Path("results") / "eval" / chosen.name
    console = Console(stderr=as_json)
    import torch

    from ..errors import UnknownNameError
    from ..models import load_model
    from .runner import Evaluation

    if dtype not in (None, *DTYPES):
        raise UnknownNameError("type of weights", dtype, list(DTYPES))
    if threads:
        torch.set_num_threads(threads)
    language_model, tokenizer = load_model(model, getattr(torch, dtype) if dtype else None)
    if first_stage := first_stage or chosen.first_stage:
        from ..storage import adapter_folder, base_stage

        base_stage.attach(language_model, adapter_folder.first_stage(first_stage))
        base_stage.merge(language_model)
    with console.status("Reading the tasks"):
        evaluation = Evaluation(language_model, tokenizer, chosen.name, plans, [*named, *added])
    result = _run(evaluation, folder, console)
    if as_json:
        print(json.dumps(result))
    else:
        console.print(_table(result))
    for method, reason in result["skipped"].items():
        console.print(f"left out: {method}: {reason}", highlight=False, soft_wrap=True, markup=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"results: {folder}.json", highlight=False, soft_wrap=True)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _run(evaluation: Evaluation, folder: Path, console: Console) -> dict[str, Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from .runner import Progress as Place

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    if (folder / "records.jsonl").exists():
        console.print(f"{folder}: going on with what is measured there", highlight=False, soft_wrap=True)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def on_progress(place: Place) -> None:
            where = f"{place.task} · {place.method} · {place.item}"
            bar.update(task, completed=place.done, total=place.total, description=where)

        try:
            return evaluation.run(folder, on_progress)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f"saved in {folder}; the same command goes on", highlight=False, soft_wrap=True)
            raise


def _table(result: dict[str, Any]) -> Table:
    """Every task at its last step."""
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
        if row["tag"] or row["step"] != last[row["task"]]:
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
