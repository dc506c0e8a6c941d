"""``ccm leaderboard``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, MissingPackageError, StorageError, UnknownNameError
from ..files.atomic import write_atomically
from ..models.known import check_all, split_methods
from ..models.options import Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.placement import AUTO
from .eval import FOLDER, before_in_words
from .options import AsJson, can_hold

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.leaderboard import Board, Table
    from ..evaluation.runner import Evaluation

EPILOG = "Example: ccm leaderboard --methods snapkv,attention-matching --tasks facts --limit 2"


@dataclass(frozen=True)
class Options:
    """What is compared, as it was asked for; every process makes its evaluation from it."""

    loading: Loading
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    entries: int | None
    limit: int | None
    threads: int | None


def prepare(options: Options) -> Evaluation:
    """The evaluation, its model and adapters loaded."""
    return _prepared(options)[0]


def _prepared(options: Options) -> tuple[Evaluation, Board]:
    import torch

    from ..evaluation.leaderboard import board
    from ..evaluation.runner import Evaluation
    from ..evaluation.summary import LEADERBOARD

    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = options.loading.load()
    made = board(model, tokenizer, options.methods, options.tasks, options.entries, options.limit)
    return Evaluation(model, tokenizer, LEADERBOARD, made.plans), made


def leaderboard(
    methods: Annotated[
        str | None,
        typer.Option(
            callback=check_all,
            help="By commas, as --memory has one; without options it gets the size of the budget.",
            show_default="all that are registered, and the shipped adapters",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="By commas: conversation, facts, questions.", show_default="all"),
    ] = None,
    entries: Annotated[
        int | None,
        typer.Option(
            min=8, help="Entries that a question may read.", show_default="4 for each segment before it"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task.", show_default="5 or 6")
    ] = None,
    model: ModelName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            callback=can_hold,
            help="Records; a run resumes from it. Figures go to FOLDER.json.",
        ),
    ] = FOLDER / "leaderboard",
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md", help="The page; its picture goes beside it.", show_default="FOLDER.md"
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure all of it anew, and put FOLDER aside as FOLDER.old.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share out the work.", show_default="one a core"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each process.", show_default="the cores, shared out"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare memories at equal bytes, a table a task; Ctrl-C saves, the same command goes on."""
    loading = Loading(model, device, dtype, load_in, device_map)
    loading.check_names()
    chosen = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    named = tuple(split_methods(methods or ""))
    if wrong := [name for name in named if "@" in name]:
        raise ConfigError(f"method {wrong[0]}: all have the same bytes here, leave what follows @ out")
    if page is not None and page.suffix != ".md":
        raise ConfigError(f"--page is {page}: expected a file that ends with .md")
    from ..evaluation.leaderboard import TASKS
    from ..methods.default import checked
    from .options import new_console
    from .progress import stages

    for name in chosen:
        if name not in TASKS:
            raise UnknownNameError("task of the leaderboard", name, list(TASKS))
    for name in named:
        checked(name)  # a wrong name shows before anything is loaded
    loading.check()
    options = Options(loading, named, chosen, entries, limit, threads)
    console = new_console(as_json)
    with stages("Loading memories and tasks"):
        evaluation, made = _prepared(options)
    tables, stored = _measured(evaluation, made, options, out, console, fresh, processes)
    text = json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out.with_name(out.name + ".json"), text.encode())
    lines = [f"results: {out}.json", *_pages(stored, tables, page or out.with_name(out.name + ".md"))]
    if as_json:
        print(json.dumps(stored))
    for each in tables:
        console.print(_shown(each))
    for name, why in stored["left_out"].items():
        lines.append(f"left out: {name}: {why}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _measured(
    evaluation: Evaluation,
    made: Board,
    options: Options,
    folder: Path,
    console: Console,
    fresh: bool,
    processes: int | None,
) -> tuple[list[Table], dict[str, Any]]:
    """Measure with a bar and with helpers; the tables, and what is stored of them."""
    from ..core.reader import Reader
    from ..evaluation.leaderboard import as_json, table
    from ..evaluation.records import put_aside
    from ..evaluation.runner import machine, revision

    if fresh:
        put_aside(folder)
    before = evaluation.take_over(folder)
    console.print(before_in_words(before, folder), highlight=False, soft_wrap=True, markup=False)
    count, records = _run(evaluation, options, folder, processes, console)
    settings = evaluation.settings()
    of_task: dict[str, list[dict[str, Any]]] = {}
    for plan in made.plans:
        keys = [(plan.task.name, spec) for spec in plan.methods]
        of_task[plan.task.name] = [r for r in records if (r["task"], r["method"]) in keys]
    more = f" --model {options.loading.model}" if options.loading.model else ""
    per_entry = Reader(evaluation.model).kv_bytes_per_token()
    tables = [
        table(made, plan, per_entry, of_task[plan.task.name], model=settings["model"]["name"], more=more)
        for plan in made.plans
    ]
    about = {
        "model": settings["model"],
        "versions": settings["versions"],
        "revision": revision(),
        "machine": machine(evaluation.model, count),
        "seconds": round(sum(r.get("seconds", 0.0) for own in of_task.values() for r in own), 1),
        "left_out": {**made.left_out, **evaluation.skipped},
    }
    return tables, as_json(tables, about)


def _run(
    evaluation: Evaluation, options: Options, folder: Path, processes: int | None, console: Console
) -> tuple[int, list[dict[str, Any]]]:
    """How many processes measured, and all records of the folder."""
    import torch

    from ..evaluation.workers import Workers, how_many
    from .measured import Bar

    left = evaluation.left(folder)
    count = (processes or how_many(evaluation.model, left)) if left else 1
    if count > 1:
        options = replace(options, threads=options.threads or max(1, torch.get_num_threads() // count))
        torch.set_num_threads(options.threads)
    with Bar(console) as view:
        try:
            with Workers(count - 1, prepare, options, folder):
                return count, evaluation.measure(folder, view.on_progress, view.on_record).all()
        except KeyboardInterrupt:
            console.print(f"saved in {folder}; the same command goes on", highlight=False, soft_wrap=True)
            raise


def _pages(stored: dict[str, Any], tables: list[Table], page: Path) -> Iterator[str]:
    """Write page and picture; what was written, a line each."""
    from ..evaluation.report import leaderboard as report

    picture = page.with_suffix(".png")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {page.parent}: {error.strerror or error}") from error
    write_atomically(page, report.page(stored, tables, picture.name).encode())
    yield f"page: {page}"
    try:
        write_atomically(picture, report.draw(tables))
        yield f"picture: {picture}"
    except MissingPackageError as error:
        yield f"no picture: {error}"


def _shown(each: Table) -> Any:
    """A task on a terminal."""
    from rich import box
    from rich.console import Group
    from rich.filesize import decimal
    from rich.table import Table as Rows
    from rich.text import Text

    from ..evaluation.leaderboard import ENDS
    from ..evaluation.report.leaderboard import said, share

    rows = Rows(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    rows.add_column("method", overflow="fold")  # long names give way, figures do not
    for name in ("share", "95 % CI", "KV bytes", "fold", "first\ntoken"):
        rows.add_column(name, justify="right", no_wrap=True)
    for row in each.rows:
        value, ends = share(each, row)
        rows.add_row(
            Text(row.method + (" *" if row.best else "")),
            value,
            ends,
            decimal(row.kv_bytes) + ("" if row.within or row.method in ENDS else " (more)"),
            f"{1e3 * row.fold_seconds:,.0f} ms",
            f"{row.first_token:.2f}×",
            style="bold" if row.best else None,
        )
    return Group(Text(f"\n{each.task}", style="bold cyan"), Text(said(each)), rows)
