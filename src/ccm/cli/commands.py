"""The command line. Heavy imports wait until a command needs them, so that help is quick."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import CCMError
from . import bench, chat, data, demo, doctor, eval, leaderboard, memory, methods, plan, report, serve, train

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


app.command(epilog=chat.EPILOG)(chat.chat)
app.command(epilog=demo.EPILOG)(demo.demo)
app.command(epilog=methods.EPILOG)(methods.methods)
app.command(epilog=train.EPILOG)(train.train)
app.command("eval", epilog=eval.EPILOG)(eval.evaluate)
app.command(epilog=leaderboard.EPILOG)(leaderboard.leaderboard)
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=serve.EPILOG)(serve.serve)
app.command(epilog=serve.KEY_EPILOG)(serve.key)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.add_typer(memory.app, name="memory")
app.add_typer(data.app, name="data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 (a check failed), 2 (bad input) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdin, sys.stdout):  # a letter that cannot be read or shown is no reason to end
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in (
        "bitsandbytes",
        "torchao",
        "torch.utils._pytree",
    ):  # on being imported, of what they do without
        logging.getLogger(name).setLevel(logging.ERROR)
    # PEFT asks models for it by a name that transformers gives up
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
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


if __name__ == "__main__":
    sys.exit(main())
