"""``ccm methods``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, UnknownNameError
from ..models.known import check
from .options import AsJson, new_console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..methods.catalogue import Entry, Family
    from ..methods.spec import Spec

EPILOG = "Example: ccm methods snapkv"
#: Exchanges after which bytes are told, and tokens of each turn.
_TURNS, _TOKENS = (10, 100, 1000), 32


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            callback=check,
            help="One memory, as --memory has it: its paper, options, an example, its bytes.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="WORD", help="Only families with this word in their title.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods that a memory can have, by family; NAME says all of one."""
    if name and family:
        raise ConfigError(f"got {name} and --family {family}: leave one of them out")
    from ..methods.catalogue import catalogue

    if name:
        _one(name, as_json)
        return
    entries, broken = catalogue()
    chosen = [entry for entry in entries if (family or "").lower() in entry.family.title.lower()]
    if not chosen:
        titles = dict.fromkeys(entry.family.title for entry in entries)
        raise UnknownNameError("family", str(family), list(titles))
    if as_json:
        print(json.dumps([_plain(entry) for entry in chosen]))
        return
    _list(chosen, broken)


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        **asdict(entry),
        "names": list(entry.names),
        "family": entry.family.title,
        "options": {option.name: {"default": option.default, "is": option.said} for option in entry.options},
    }


def _list(entries: list[Entry], broken: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..files.adapter_folder import shipped_adapters
    from ..methods.catalogue import ASKS, SLOTS

    console = new_console()
    by_family: dict[Family, list[Entry]] = {}
    for entry in entries:
        by_family.setdefault(entry.family, []).append(entry)
    for family, group in by_family.items():
        console.print(Text(f"\n{family.title}", style="bold cyan"))
        console.print(Text(family.said.replace("`", "")))
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, min_width=max(len(entry.name) for entry in entries))
        keeps = max(len(entry.keeps) for entry in entries)
        table.add_column(min_width=min(36, keeps, max(12, console.width - 44)))
        table.add_column(no_wrap=True, min_width=max(len(word) for word in SLOTS), style="dim")
        table.add_column(no_wrap=True, style="dim")
        for entry in group:
            table.add_row(
                Text(entry.name, style="bold"),
                Text(entry.keeps),
                _slots(entry),
                Text(", ".join(entry.asks)),
            )
        console.print(table)
        if any(entry.trained for entry in group):
            console.print(Text(f"Shipped adapters: {', '.join(shipped_adapters())}"))
    words = {word: said for word, said in SLOTS.items() if word in map(_slots, entries)}
    needed = {word: said for word, said in ASKS.items() if any(word in entry.asks for entry in entries)}
    for title, of in (("what slots are", words), ("what a method asks for", needed)):
        console.print(Text(f"\n{title}", style="bold cyan"))
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        for word, said in of.items():
            table.add_row(word, Text(said))
        console.print(table)
    for name, why in broken.items():
        console.print(Text(f"left out: {name}: {why}"))
    console.print("\nnext: ccm methods NAME, then ccm chat --memory NAME; ccm leaderboard compares them")


def _slots(entry: Entry) -> str:
    return "" if entry.name == "none" else entry.slots


# ---------------------------------------------------------------------- one


def _one(name: str, as_json: bool) -> None:
    from ..methods.catalogue import SLOTS
    from ..methods.catalogue import entry as entry_of
    from ..methods.default import checked
    from ..models.known import written

    if written(name)[0] == "default":
        raise ConfigError(
            "default stands for the best memory for a model: give the name of one, such as ccm-chat"
        )
    spec = checked(name)
    entry, held = entry_of(type(spec.method())), dict(_bytes(spec))
    command = f"ccm chat --memory {_example(spec, entry)}"
    if as_json:
        print(json.dumps({**_plain(entry), "memory": spec.text, "example": command, "bytes": held}))
        return
    from rich.table import Table
    from rich.text import Text

    from ..models.placement import DEFAULT_MODEL

    console = new_console()
    also = f" (also {', '.join(entry.names[1:])})" if entry.names[1:] else ""
    head = spec.name if spec.name in entry.names else f"{spec.name}, an adapter of {entry.name}"
    console.print(Text(f"{head}{also}", style="bold cyan"))
    console.print(Text("\n\n".join(" ".join(part.split()) for part in _words(entry.about).split("\n\n"))))
    of_adapter = {o.name for o in entry.options if entry.trained and o.default is None} - {"segment"}
    facts = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    facts.add_row("family", entry.family.title)
    if said := SLOTS.get(_slots(entry), ""):
        facts.add_row("slots", Text(f"{entry.slots}: {said}"))
    facts.add_row("training", "an adapter for the model (ccm train)" if entry.trained else "none")
    facts.add_row("asks for", Text(_asked(entry)))
    if entry.paper:
        facts.add_row("paper", Text(f"{entry.paper} {entry.link}".strip()))
    facts.add_row("example", Text(command))
    console.print()
    console.print(facts)
    console.print()
    options = Table("option", "default", "what it is", box=None, padding=(0, 2, 0, 0))
    for option in entry.options:
        default = "the adapter's" if option.name in of_adapter else _shown(option.default)
        options.add_row(option.name, Text(default), Text(option.said.replace("`", "")))
    console.print(options)
    console.print(Text(f"\nbytes held on {DEFAULT_MODEL}, in exchanges of two turns of {_TOKENS} tokens"))
    for count, said in held.items():
        console.print(Text(f"  {count:>15}  {said}"))
    console.print("for another model: ccm plan --model MODEL --memory NAME --users 1 --turns 100")


def _words(text: str) -> str:
    from ..methods.catalogue import plain

    return plain(text).replace("`", "")


def _asked(entry: Entry) -> str:
    from ..methods.catalogue import ASKS

    return "; ".join(f"{word} ({ASKS[word]})" for word in entry.asks) or "nothing but keys and values"


def _shown(default: Any) -> str:
    if isinstance(default, int) and default > 10**12:
        return "no limit"
    return "" if default in (None, "", {}) else str(default)


def _example(spec: Spec, entry: Entry) -> str:
    """The memory with its size written out, where it has one."""
    if spec.options or spec.name in ("none", "full"):
        return spec.text
    sizes = [o for o in entry.options if o.name in ("tokens", "slots", "max_tokens") and o.default]
    return spec.text + (f":{sizes[0].name}={2 * sizes[0].default}" if sizes else "")


def _bytes(spec: Spec) -> Iterator[tuple[str, str]]:
    """After so many exchanges: what is held, or why nobody knows. The shape of the model is enough."""
    from rich.filesize import decimal

    from ..models.load import default_model_ready, load_config, random_model
    from ..planning.sizes import Shape, after, planned

    if not default_model_ready():
        yield "not known", "the model is not here yet; ccm demo fetches it"
        return
    config = load_config()
    model, shape = random_model(config, "meta"), Shape.of(config)
    for turns in _TURNS:
        try:
            held = after(2 * turns, _TOKENS, planned(spec, model))
        except ConfigError:
            yield "not known", "counts alone do not tell; ccm leaderboard measures it"
            return
        yield f"{turns:,} exchanges", f"{decimal(held.nbytes(shape))} ({held.length:,} entries)"
