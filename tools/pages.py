"""The pages that are made from the program itself: every command with its options, and every method.

python tools/pages.py         writes docs/command-line.md and docs/methods.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from typer.main import get_command

from ccm.cli import app
from ccm.errors import ConfigError
from ccm.files.adapter_folder import read_config, shipped_adapters
from ccm.methods import Method
from ccm.methods.base import METHODS

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

#: Title, what the group has in common, and what the modules of its methods begin with.
_GROUPS = (
    (
        "Trained memories",
        "An adapter makes the slots. It belongs to one model, and `ccm train` makes one for yours.",
        ("compressed", "baselines"),
    ),
    (
        "Entries that are made",
        "These need no training. Slots are fitted, merged or averaged from what they stand for.",
        ("attention_matching", "synthesis"),
    ),
    (
        "Entries that are chosen",
        "These need no training. A part of the keys and values stays as it is.",
        ("selection",),
    ),
    (
        "Entries that are looked up",
        "These need no training. Everything is kept, and the prompt says what is read.",
        ("retrieve", "recall"),
    ),
    (
        "Text in place of entries",
        "These need no training. What leaves the window stays as words.",
        ("summary", "text"),
    ),
    (
        "Yardsticks",
        "No context and full context are the ends of the scale on which `ccm eval` puts all others.",
        ("references",),
    ),
)


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
    described = _attributes(Method.__doc__ or "")
    yield "Every method has these options. A default of 0 is left out below."
    yield _table(("option", "what it is"), [(f"`{name}`", _cell(described[name])) for name in _SHARED])
    known: dict[type[Method], list[str]] = {}
    for name, method in METHODS.items():
        known.setdefault(method, []).append(name)
    for title, said, modules in _GROUPS:
        yield f"## {title}"
        yield said
        for method in [m for m in sorted(known, key=lambda m: known[m]) if _module(m) in modules]:
            yield from _method(method, known.pop(method))
        if title == "Trained memories":
            yield from _adapters()
    if known:
        raise ConfigError(f"methods in no group of the page: {', '.join(map(str, known.values()))}")


def _module(method: type[Method]) -> str:
    """The file or folder of ``ccm.methods`` that the method stands in."""
    return method.__module__.split(".")[2]


def _method(method: type[Method], names: list[str]) -> Iterator[str]:
    yield f"### {', '.join(names)}"
    yield _prose(re.split(r"\n\s*(?:Attributes|Args):\n", inspect.getdoc(method) or "")[0])
    shared = _attributes(Method.__doc__ or "")
    described = {k: v for cls in reversed(method.__mro__) for k, v in _attributes(cls.__doc__ or "").items()}
    options = {entry.name: entry for entry in fields(method) if entry.init}
    set_here = [f"`{name}` {value}" for name in _SHARED if (value := _value(options[name]))]
    if set_here:
        yield f"Here {', '.join(set_here)}."
    rows = [
        (f"`{name}`", _cell(described[name]), _value(entry))
        for name, entry in options.items()
        if described.get(name, "") != shared.get(name) and name not in _SHARED
    ]
    if rows:
        yield _table(("option", "what it is", "default"), rows)


def _value(entry: Field[Any]) -> str:
    value = entry.default_factory() if callable(entry.default_factory) else entry.default
    if not value:
        return ""
    return "no limit" if isinstance(value, int) and value > 10**12 else f"`{value}`"


def _attributes(doc: str) -> dict[str, str]:
    """What a docstring says of each attribute."""
    section = re.search(r"\n( *)Attributes:\n((?:\1 +.*\n?|\n)*)", doc)
    if section is None:
        return {}
    entry = r"^ {4,8}(\w+(?:, \w+)*): ((?:.|\n)*?)(?=^ {4,8}\w+(?:, \w+)*: |\Z)"
    found = re.findall(entry, section.group(2), re.MULTILINE)
    return {name: " ".join(said.split()) for names, said in found for name in names.split(", ")}


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
    return "\n\n".join(" ".join(part.split()) for part in _plain(text or "").split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(_plain(text).split()).replace("|", "\\|")


def _plain(text: str) -> str:
    """Without the marks of Sphinx."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


if __name__ == "__main__":
    main()
