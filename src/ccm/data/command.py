"""``ccm data``: which sources there are, and what their rows look like."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from .rows import ConversationRow

app = typer.Typer(help="Training data: which sources there are, and what their rows look like.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command("list", epilog="Example: ccm data list --json")
def list_command(as_json: AsJson = False) -> None:
    """List the sources with their licences; nothing is downloaded."""
    from rich.console import Console
    from rich.table import Table

    from .sources import list_sources, source_class

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
    table = Table("source", "what it is", "licence", "origin", "download", "here", box=None, padding=(0, 1))
    for row in found:
        size = f"{row['download_mb']:.0f} MB" if row["download_mb"] else ""
        here = {True: "yes", False: "no", None: ""}[row["downloaded"]]
        what = f"{row['title']}: {row['size']}" if row["size"] else row["title"]
        table.add_row(row["name"], what, row["licence"], row["origin"].replace(", ", "\n"), size, here)
    Console().print(table)


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
    from .conversation import check_split
    from .sources import get_source, source_class

    check_split(split)
    source_class(source)  # a wrong name shows before a model is loaded
    options = _options(option or []) | ({"strict": True} if strict else {})
    from ..models import load_model

    _, tokenizer = load_model(None)
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
