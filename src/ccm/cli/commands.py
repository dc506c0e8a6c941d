"""The command line. Heavy imports wait until a command needs them, so that help is quick."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import CCMError, ConfigError, MissingPackageError
from ..methods.memory_option import Adapter, MemoryName, Sink, Slots, Window, memory_name
from ..models.placement import AUTO, Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from .data import app as data_app
from .eval import EPILOG as _EVAL_EPILOG
from .eval import evaluate
from .plan import EPILOG as _PLAN_EPILOG
from .plan import plan
from .report import EPILOG as _REPORT_EPILOG
from .report import report
from .serve import EPILOG as _SERVE_EPILOG
from .serve import KEY_EPILOG as _KEY_EPILOG
from .serve import key, serve
from .train import EPILOG as _TRAIN_EPILOG
from .train import train

if TYPE_CHECKING:
    from rich.console import Console

    from ..session import Session

# click itself is vendored by newer releases of typer
_ClickError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Compressed Context Memory: a language model's endless context in a memory that stays small.",
    epilog="Begin with: ccm demo",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
memory_app = typer.Typer(help="Look at memory and session files.")
app.add_typer(memory_app, name="memory")
app.add_typer(data_app, name="data")

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 (a check failed), 2 (bad input) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in (
        "bitsandbytes",
        "torchao",
        "torch.utils._pytree",
    ):  # on being imported, of what they do without
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return app(args=arguments or ["--help"], prog_name="ccm", standalone_mode=False) or 0
    except CCMError as error:
        return _fail(str(error))
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return _fail(error.format_message() + hint)
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _console(as_json: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=as_json)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ccm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------------- chat


@app.command(epilog="Example: ccm chat --model ./my-model --memory streaming-llm:window=512")
def chat(
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    load: Annotated[Path | None, typer.Option(metavar="FILE", help="Continue a saved session.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message at the start.")] = None,
    adapter: Adapter = None,
    slots: Slots = None,
    sink: Sink = None,
    window: Window = None,
) -> None:
    """Talk with a model whose memory does not grow with the conversation; /help inside lists the commands."""
    named = memory_name(memory, adapter, slots=slots, sink=sink, window=window)
    loading = Loading(model, device, dtype, load_in, device_map)
    loading.check()
    from ..methods.default import checked, open_method, saved_memory
    from ..session import Session
    from .repl import Repl

    spec = checked(named)
    if load and (system or spec.options):
        raise ConfigError(
            f"--load {load} brings its own past and sizes: leave --system out, and the options of the memory"
        )
    if load and named is None:
        spec = saved_memory(load)
    console = _console()
    language_model, tokenizer = loading.load()
    method = open_method(spec, language_model, tokenizer)

    def begin() -> Session:
        session = Session(method, tokenizer)
        if system:
            session.append(system, role="system")
        return session

    session = Session.load(load, method, tokenizer) if load else begin()
    Repl(session, begin, console).run()


# ---------------------------------------------------------------------- demo


@app.command(epilog="Example: ccm demo --conversations 4 --methods window,ccm-merge --json")
def demo(
    conversations: Annotated[int, typer.Option(help="Held-out conversations to play.")] = 8,
    turns: Annotated[int, typer.Option(help="Turns of each; from the fifth on they are scored.")] = 10,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Memories by commas, as --memory has one; none and full always play.",
            show_default="window, and the best for the model",
        ),
    ] = None,
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    plot: Annotated[Path, typer.Option(metavar="PATH", help="Where the picture goes.")] = Path(
        "ccm-demo.png"
    ),
    as_json: AsJson = False,
) -> None:
    """Play held-out conversations turn by turn through every method at once, and compare them."""
    from ..evaluation.demo import choose_players
    from ..evaluation.demo import demo as play_demo
    from ..evaluation.plot import plot as save_plot
    from ..evaluation.suites import split_methods

    console = _console(as_json)
    names = split_methods(methods or "")
    if memory:
        names = [*(names or ["window"]), memory]
    choose_players(names)  # a wrong name shows before anything is loaded
    language_model, tokenizer = Loading(model, device, dtype, load_in, device_map).load()
    result = play_demo(language_model, tokenizer, console, conversations, turns, names)
    try:
        save_plot(result, plot)
        console.print(f"plot: {plot}", soft_wrap=True, highlight=False)
    except MissingPackageError as error:
        console.print(f"no plot: {error}", soft_wrap=True, highlight=False, markup=False)
    if as_json:
        print(json.dumps(result))


# ---------------------------------------------------------------------- train

app.command(epilog=_TRAIN_EPILOG)(train)


# ---------------------------------------------------------------------- eval, report

app.command("eval", epilog=_EVAL_EPILOG)(evaluate)
app.command(epilog=_REPORT_EPILOG)(report)
app.command(epilog=_SERVE_EPILOG)(serve)
app.command(epilog=_KEY_EPILOG)(key)
app.command(epilog=_PLAN_EPILOG)(plan)


# ---------------------------------------------------------------------- memory, doctor


@memory_app.command(epilog="Example: ccm memory inspect chat.ccm --json")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A memory or a saved session.")],
    as_json: AsJson = False,
) -> None:
    """Show what a memory file holds, and that it is intact."""
    from rich.table import Table

    from ..core.memory import Memory
    from ..files.fingerprint import made_by
    from ..methods.accounting import describe

    memory, metadata = Memory.load(file)
    rows = describe(memory)
    session = json.loads(metadata["session"]) if "session" in metadata else None
    if as_json:
        result = {"file": str(file), "format": metadata["format"], "fingerprint": memory.fingerprint}
        print(json.dumps({**result, "nbytes": memory.nbytes, "rows": rows, "session": session}))
        return
    console = _console()
    kind = f"session of {session['turns']} turns, budget {session['budget']}" if session else "memory"
    console.print(
        f"{file}: {kind}\nmade by {made_by(memory.fingerprint)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    table = Table(box=None, show_header=False, padding=(0, 1))  # side by side they are wider than a screen
    for name in rows[0]:
        table.add_row(name.replace("_", " "), *(f"{row[name]:,}" for row in rows))
    console.print(table)


@app.command(epilog="Example: ccm doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, what would work, and the command that mends what is missing."""
    from rich.table import Table
    from rich.text import Text

    from .checks import checks

    found = checks()
    broken = [check for check in found if check.required and not check.ok]
    if as_json:
        print(json.dumps({"ok": not broken, "checks": [asdict(check) for check in found]}))
    else:
        table = Table("", "check", "found", "what to do", box=None, padding=(0, 1))
        for check in found:
            mark = ("✓", "green") if check.ok else ("✗", "red") if check.required else ("–", "yellow")
            table.add_row(Text(*mark), check.name, Text(check.found), Text(check.fix))
        console = _console()
        console.print(table)
        console.print(f"{len(broken)} required checks failed" if broken else "ready")
    if broken:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(main())
