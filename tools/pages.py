"""The pages that are made from the program itself: every command with its options, and every method.

python tools/pages.py         writes docs/command-line.md and docs/methods.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from ccm.cli import app
from ccm.errors import ConfigError
from ccm.files.adapter_folder import read_config, shipped_adapters
from ccm.methods.catalogue import ASKS, ELSEWHERE, FAMILIES, SLOTS, Entry, catalogue, plain

DOCS = Path(__file__).parents[1] / "docs"
MADE = "This page is made by `python tools/pages.py`"

_COMMANDS = f"""\
# Command line

{MADE} from the parser of the command `ccm`, and a test compares the two.

Bad input gives one line that says what was got, what was expected and what to do. The exit code is then 2. It is 1
where a check failed, such as the recovered share that a recipe requires. It is 130 after Ctrl-C."""

_METHODS = f"""\
# Methods

{MADE} from the docstrings of `ccm.methods`, and a test compares the two.

A method says how a conversation is kept. On the command line it is `--memory NAME:option=value,option=value`. In
Python it is `ccm.open_method` or `ccm.Session.open(model, memory=…)`. [Choose a memory](choose.md) says which one is
for what. [Extend](extending.md) shows how to add one."""

#: Options of every method, explained once.
_SHARED = ("sink", "window", "segment")
_TYPES = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text)


def pages() -> dict[str, str]:
    """Both pages by their file names."""
    return {"command-line.md": _joined(command_line()), "methods.md": _joined(methods())}


def _joined(parts: Iterator[str]) -> str:
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------- commands


def command_line() -> Iterator[str]:
    """A part for every command, in the order of ``ccm --help``."""
    yield _COMMANDS
    for words, command in _commands("ccm", get_command(app)):
        yield f"## {words}"
        yield _prose(command.help)
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        usage = " ".join([words, *(_metavar(p) for p in arguments), "[options]" if options else ""])
        yield f"```text\n{usage.strip()}\n```"
        rows = [(f"`{_metavar(p)}`", _help(p), "") for p in arguments]
        rows += [(_names(p), _help(p), _default(p)) for p in options]
        yield _table(("option", "what it does", "default"), rows)
        if command.epilog:
            yield f"Example:\n\n```sh\n{command.epilog.removeprefix('Example: ')}\n```"


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in command.commands.items():
        yield from _commands(f"{words} {name}", inner)


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name += "…" if parameter.nargs == -1 else ""
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _names(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    value = "" if parameter.is_flag else parameter.metavar or _TYPES[parameter.type_descriptor.annotation]
    return f"{names} `{value}`" if value else names


def _help(parameter: Any) -> str:
    return _cell(parameter.help or "")


def _default(parameter: Any) -> str:
    value = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if value is None or value is False or value == () or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


# ---------------------------------------------------------------------- methods


def methods() -> Iterator[str]:
    """A part for every method, trained ones first."""
    yield _METHODS
    entries, _ = catalogue()
    yield "Every method has these options. A default of 0 is left out below."
    shared = {option.name: option.said for option in entries[0].options if option.name in _SHARED}
    yield _table(("option", "what it is"), [(f"`{name}`", _cell(shared[name])) for name in _SHARED])
    yield "What a method's slots are:"
    yield _table(("slots", "what they are"), list(SLOTS.items()))
    yield "What a method asks for, beside the keys and values that every method has:"
    yield _table(("it asks for", "that is"), list(ASKS.items()))
    for family in dict.fromkeys(entry.family for entry in entries):
        group = [entry for entry in entries if entry.family == family]
        if family == ELSEWHERE:
            raise ConfigError(f"methods in no family: {', '.join(entry.name for entry in group)}")
        yield f"## {family.title}"
        yield family.said
        yield _table(
            ("method", "what it keeps", "slots", "it asks for"),
            [(f"[`{e.name}`](#{_anchor(e)})", e.keeps, e.slots, ", ".join(e.asks)) for e in group],
        )
        for entry in group:
            yield from _method(entry, shared)
        if family == FAMILIES[0]:
            yield from _adapters()


def _title(entry: Entry) -> str:
    return ", ".join(entry.names)


def _anchor(entry: Entry) -> str:
    return re.sub(r"[^\w-]+", "-", _title(entry))


def _method(entry: Entry, shared: dict[str, str]) -> Iterator[str]:
    yield f"### {_title(entry)}"
    about = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", _prose(entry.about))
    yield about
    if entry.link and entry.link not in about:
        yield f"Paper: [{entry.paper}]({entry.link})."
    options = {option.name: option for option in entry.options}
    set_here = [f"`{name}` {value}" for name in _SHARED if (value := _value(options[name].default))]
    if set_here:
        yield f"Here {', '.join(set_here)}."
    rows = [
        (f"`{name}`", _cell(option.said), _value(option.default))
        for name, option in options.items()
        if option.said != shared.get(name) and name not in _SHARED
    ]
    if rows:
        yield _table(("option", "what it is", "default"), rows)


def _value(value: Any) -> str:
    if not value:
        return ""
    return "no limit" if isinstance(value, int) and value > 10**12 else f"`{value}`"


def _adapters() -> Iterator[str]:
    yield "### Shipped adapters"
    yield "They are for the embedded model, and each is a name for `--memory`."
    rows = []
    for name in shipped_adapters():
        config = read_config(name)
        rows.append(
            (f"`{name}`", config.kind, config.rule, str(config.slots), str(config.sink), str(config.window))
        )
    yield _table(("adapter", "kind", "rule", "slots a segment", "sink", "window"), rows)


# ---------------------------------------------------------------------- Markdown


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _prose(text: str | None) -> str:
    """A docstring or a help text, a line a paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in plain(text or "").split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(plain(text).split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
