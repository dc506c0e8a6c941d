"""``ccm eval``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError, UnknownNameError
from ..models.known import check, check_all, split_methods
from ..models.memory_option import Adapter, memory_name
from ..models.options import Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.placement import AUTO
from .options import can_hold, new_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.runner import Before, Evaluation
    from ..evaluation.suites import Plan, Suite

EPILOG = "Example: ccm eval quick --methods none,full,ccm-concat,streaming-llm@ccm-concat --limit 2"
#: Where a user's runs go; a checkout does not track it.
FOLDER = Path("ccm-eval")
SUITES = ("quick", "paper", "tuned", "streams", "hub")
#: Of others, read from their own files (docs/benchmarks.md).
BENCHMARKS = ("beam", "locomo", "longmemeval", "memory-agent-bench", "msc", "ruler", "scbench")


def _suite(name: str) -> str:
    """A suite's name, a benchmark's, or an own file that is there."""
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise DataError(f"{name} is not there: give a .jsonl file of conversations or labelled items")
    elif name not in (*SUITES, *BENCHMARKS):
        raise UnknownNameError("suite", name, [*SUITES, *BENCHMARKS, "a .jsonl file of your own"])
    return name


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
    data: str | None = None
    judge: tuple[str, str] | None = None
    lengths: tuple[int, ...] = ()

    def chosen(self) -> tuple[Suite, list[Plan]]:
        """The suite, and its tasks with their methods."""
        from ..evaluation.benchmarks.judge import Judge
        from ..evaluation.suites import benchmark_suite, get_suite, own_suite

        own = Path(self.suite)
        if own.suffix == ".jsonl":
            suite = own_suite(own, self.strict)
        elif self.suite in BENCHMARKS:
            judge = Judge(*self.judge) if self.judge else None
            suite = benchmark_suite(self.suite, self.data, judge, self.lengths)
        else:
            suite = get_suite(self.suite)
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
            metavar="SUITE",
            help=f"{', '.join(SUITES)}, a .jsonl file of your own; of others: {', '.join(BENCHMARKS)}.",
            callback=_suite,
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            callback=check_all,
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
            callback=check,
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
            callback=can_hold,
            help="Records; a run resumes from it. The summary goes to FOLDER.json.",
            show_default="ccm-eval/ and the suite's name",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Measure all of it here and now: take nothing over, and put FOLDER aside as FOLDER.old.",
        ),
    ] = False,
    show: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Print what N items of each task asked, and every answer."),
    ] = 0,
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
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="A benchmark's official files; hub downloads them (docs/benchmarks.md)."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A benchmark whose paper has a judge: OpenAI-compatible server of it; key in OPENAI_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The judge's name on that server.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="TOKENS,…", help="RULER: tokens of its texts.", show_default="1024,2048,4096"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Measure methods on tasks; Ctrl-C saves, the same command goes on."""
    loading = Loading(model, device, dtype, load_in, device_map)
    loading.check_names()
    named = tuple(split_methods(methods or ""))
    added = memory_name(memory, adapter)
    _check_benchmark(suite, data, judge, judge_model, lengths)
    _check_strict(suite, strict)
    judged = (judge, judge_model) if judge and judge_model else None
    options = Options(
        suite, named, _names(tasks), limit, loading, added, first_stage, threads, strict, data, judged,
        _numbers(lengths),
    )  # fmt: skip
    from ..evaluation.suites import parse_method
    from ..methods.default import checked
    from .progress import stages

    chosen, plans = options.chosen()
    for text in {text for plan in plans for text in plan.methods}:
        checked(parse_method(text))  # a wrong name shows before anything is loaded
    loading.check()
    folder = out or FOLDER / chosen.name
    console = new_console(as_json)
    for tally in (entry.task.tally for entry in plans):
        if tally:
            console.print(str(tally), highlight=False, soft_wrap=True, markup=False)
    for how in dict.fromkeys(entry.task.scored for entry in plans):
        if how:
            console.print(f"scored: {how}", highlight=False, soft_wrap=True, markup=False)
    with stages("Reading the tasks"):
        evaluation = prepare(options)
    result = _run(evaluation, options, folder, processes, console, fresh)
    if show:
        _show(evaluation, folder, show, console)
    if as_json:
        print(json.dumps(result))
    for method, reason in result["skipped"].items():
        console.print(f"left out: {method}: {reason}", highlight=False, soft_wrap=True, markup=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)
    for line in (
        f"results: {folder}.json",
        *([] if show else ["next: the same command with --show 1 prints what was asked and answered"]),
        f"next: ccm report {shlex.quote(f'{folder}.json')} makes a page of it, with a picture",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _check_benchmark(
    suite: str, data: str | None, judge: str | None, judge_model: str | None, lengths: str | None
) -> None:
    given = {"--data": data, "--judge": judge, "--judge-model": judge_model, "--lengths": lengths}
    if suite not in BENCHMARKS and (some := [name for name, value in given.items() if value is not None]):
        raise ConfigError(
            f"{some[0]} is for a benchmark of others, got suite {suite}: leave it out, or name one of "
            f"{', '.join(BENCHMARKS)}"
        )
    if (judge is None) != (judge_model is None):
        raise ConfigError("a judge needs both --judge URL and --judge-model NAME")


def _check_strict(suite: str, strict: bool) -> None:
    if strict and not suite.endswith(".jsonl"):
        raise ConfigError(f"--strict is for a .jsonl file of your own, got suite {suite}: leave it out")


def _numbers(text: str | None) -> tuple[int, ...]:
    names = _names(text)
    if not all(name.isdigit() for name in names):
        raise ConfigError(f"--lengths is {text!r}, expected numbers of tokens by commas, such as 1024,2048")
    return tuple(map(int, names))


def _run(
    evaluation: Evaluation,
    options: Options,
    folder: Path,
    processes: int | None,
    console: Console,
    fresh: bool,
) -> dict[str, Any]:
    """Measure, with a bar and with helpers."""
    import torch

    from ..evaluation.records import put_aside
    from ..evaluation.runner import SHIPPED
    from ..evaluation.workers import Workers, how_many
    from .measured import View

    if fresh:
        put_aside(folder)
    shipped = None if fresh else SHIPPED / evaluation.suite
    before = evaluation.take_over(folder, shipped)
    console.print(before_in_words(before, folder), highlight=False, soft_wrap=True, markup=False)

    left = evaluation.left(folder)
    count = (processes or how_many(evaluation.model, left)) if left else 1
    if count > 1:
        options = replace(options, threads=options.threads or max(1, torch.get_num_threads() // count))
        torch.set_num_threads(options.threads)

    with View(console, {plan.task.name for plan, _, _ in evaluation.work if plan.task.cited}) as view:
        try:
            with Workers(count - 1, prepare, options, folder):
                return evaluation.run(folder, view.on_progress, count, view.on_record)
        except KeyboardInterrupt:
            again = "without --fresh it goes on" if fresh else "the same command goes on"
            console.print(f"saved in {folder}; {again}", highlight=False, soft_wrap=True)
            raise


def before_in_words(before: Before, folder: Path) -> str:
    """What is not measured now, in one line."""
    left = before.wanted - before.shipped - before.earlier
    parts = [f"{before.wanted} measurements"]
    parts += [f"{before.shipped} taken over from the records of this library"] if before.shipped else []
    parts += [f"{before.earlier} of an earlier run in {folder}"] if before.earlier else []
    parts += [f"{left} to do" if left else "nothing is measured now"]
    return ", ".join(parts) + ("; --fresh measures all of them" if left < before.wanted else "")


def _show(evaluation: Evaluation, folder: Path, count: int, console: Console) -> None:
    from .measured import questions

    for task, item, records in evaluation.answered(folder, count):
        for line in questions(task, item, records, evaluation.tokenizer):
            console.print(line, soft_wrap=True)
