"""``ccm data``: which sources there are, what their rows look like, and rows drawn ahead of time."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .options import new_console

if TYPE_CHECKING:
    from ..data.rows import ConversationRow

app = typer.Typer(
    help="Training data: which sources there are, what their rows look like, and rows drawn ahead of time."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command("list", epilog="Example: ccm data list --json")
def list_command(as_json: AsJson = False) -> None:
    """List the sources with their licences; nothing is downloaded."""
    from rich.table import Table
    from rich.text import Text

    from ..data.sources import list_sources, source_class

    found: list[dict[str, Any]] = []
    for name in list_sources():
        source = source_class(name)
        found.append(
            {
                "name": name,
                "title": source.title,
                "size": source.size,
                "licence": source.licence,
                "origin": f"hub {source.hub}" if source.hub else source.origin,
                "download_mb": sum(archive.megabytes for archive in source.archives) or None,
                "downloaded": source.downloaded(),
            }
        )
    if as_json:
        print(json.dumps({"sources": found}))
        return
    table = Table("source", "download", "what it is", box=None, padding=(0, 1, 0, 0))
    for row in found:
        size = f"{row['download_mb']:.0f} MB" if row["download_mb"] else ""
        what = f"{row['title']}: {row['size']}" if row["size"] else row["title"]
        about = Text(f"{what}\n").append(f"licence: {row['licence']}\nfrom: {row['origin']}\n", style="dim")
        table.add_row(row["name"], f"{size}, here" if size and row["downloaded"] else size, about)
    new_console().print(table)


@app.command(epilog="Example: ccm data show jsonl --option path=chats.jsonl --split validation --limit 2")
def show(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A name of `ccm data list`.")],
    split: Annotated[str, typer.Option(help="train (drawn by chance), validation or test.")] = "train",
    limit: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 3,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the source; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows that are drawn.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Your own files: end with an error if something is left out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print rows as text, one segment a line; what is scored stands in ⟦ ⟧, planted facts in ⟦ ⟧ of their own."""
    from ..data.conversation import check_split
    from ..data.sources import get_source, source_class

    check_split(split)
    source_class(source)  # a wrong name shows before a model is loaded
    options = _options(option or []) | ({"strict": True} if strict else {})
    from ..models.load import load_tokenizer
    from ..models.placement import DEFAULT_MODEL

    tokenizer = load_tokenizer(DEFAULT_MODEL)
    chosen = get_source(source, tokenizer, **options)
    if split == "train":
        rng = random.Random(seed)
        rows = [chosen.draw(rng) for _ in range(limit)]
    else:
        rows = chosen.held_out("test" if split == "test" else "validation", limit)
    tally = chosen.tally
    if as_json:
        read = {"read": tally.counts()} if tally else {}
        told = [_record(r, tokenizer) for r in rows]
        print(json.dumps({"source": source, "split": split, **read, "rows": told}))
        return
    _print(rows, tokenizer)
    if tally:
        typer.echo(tally)


@app.command(epilog="Example: ccm data pack recipes/one-gpu.yaml --tokens 20M --out broad.rows")
def pack(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The run (docs/training.md).")],
    tokens: Annotated[str, typer.Option(metavar="NUMBER", help="Of all rows: 20M, 1.5M, 500k or 20000.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the rows go; FILE.part holds what is there.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="In place of the recipe's; nested keys by dots."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=0, help="That draw rows; 0 draws in this one.", show_default="one a core, at most 4"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the rows of a recipe into a file that `packed=FILE` trains from; after Ctrl-C the same command goes on."""
    wanted = _count(tokens)
    from ..training import load_recipe

    config = load_recipe(recipe, overrides or ())
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from ..models.load import load_tokenizer
    from ..models.placement import DEFAULT_MODEL
    from ..training.packing import pack as draw
    from .progress import Tenths, moves

    console = Console(stderr=as_json)
    tokenizer = load_tokenizer(config.model or DEFAULT_MODEL)
    several = min(4, os.cpu_count() or 1) if processes is None else processes
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tell = Tenths(console)
    with Progress(*columns, console=console, disable=not moves(console)) as bar:
        task = bar.add_task("drawing rows", total=wanted)
        first: list[tuple[float, int]] = []  # what is there when it is told for the first time took no time

        def on_progress(done: int) -> None:
            first[:] = first or [(time.monotonic(), done)]
            seconds, drawn = time.monotonic() - first[0][0], done - first[0][1]
            rate = f" · {drawn / seconds:,.0f} tokens/s" if drawn else ""
            bar.update(task, completed=done, description=f"{done:,} tokens{rate}")
            tell(done / wanted, f"{done:,} tokens{rate}")

        try:
            file = draw(config, tokenizer, wanted, out, several, on_progress)
        except KeyboardInterrupt:
            console.print(
                f"{out}.part holds the rows so far; the same command goes on", highlight=False, soft_wrap=True
            )
            raise
    held_out = dict(zip(file.sources, file.header["held_out"], strict=True))
    megabytes = round(file.path.stat().st_size / 1e6, 1)
    if as_json:
        made = {"file": str(out), "rows": len(file), "tokens": file.tokens, "held_out": held_out}
        print(json.dumps({**made, "megabytes": megabytes, "fingerprint": file.fingerprint}))
        return
    console.print(
        f"{out}: {len(file):,} rows · {file.tokens:,} tokens · {sum(held_out.values())} held out · {megabytes} MB",
        highlight=False,
        soft_wrap=True,
    )


def _count(text: str) -> int:
    """A number of tokens: 20M, 1.5M, 500k, 20000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text.strip())
    count = round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]) if match else 0
    if count < 1:
        raise ConfigError(f"--tokens: got {text!r}, expected a number such as 20M, 1.5M, 500k or 20000")
    return count


def _options(given: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in given:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--option: got {pair!r}, expected KEY=VALUE, such as path=chats.jsonl")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--option: {pair!r} is not a YAML value ({error})") from error
    return options


def _record(row: ConversationRow, tokenizer: Any) -> dict[str, Any]:
    segments = []
    for ids, (start, stop) in zip(row.segments, row.content, strict=True):
        scored = tokenizer.decode(ids[start:stop])
        segments.append({"text": tokenizer.decode(ids), "tokens": len(ids), "scored": scored})
    recall = [tokenizer.decode(row.segments[i][start:stop]) for i, start, stop in row.recall]
    return {"from": row.conversation, "tokens": row.tokens, "segments": segments, "recall": recall}


def _print(rows: list[ConversationRow], tokenizer: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for row in rows:
        console.rule(f"{row.conversation} · {len(row.segments)} segments · {row.tokens} tokens", align="left")
        for i, (ids, (start, stop)) in enumerate(zip(row.segments, row.content, strict=True)):
            marks = ["dim"] * start + ["green"] * (stop - start) + ["dim"] * (len(ids) - stop)
            for _, first, last in (mark for mark in row.recall if mark[0] == i):
                marks[first:last] = ["bold red"] * (last - first)
            line = Text(f"{i + 1:>3}  ", style="cyan")
            at = 0
            for k in range(1, len(ids) + 1):  # pieces of one style together, so that no character is torn
                if k == len(ids) or marks[k] != marks[at]:
                    piece = tokenizer.decode(ids[at:k]).replace("\n", "⏎")
                    line.append(piece if marks[at] == "dim" else f"⟦{piece}⟧", style=marks[at])
                    at = k
            console.print(line, soft_wrap=True)
