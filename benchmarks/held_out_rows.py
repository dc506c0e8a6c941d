"""Held-out rows of thirteen sources and formats: what adapters and their rivals are judged by.

No adapter is trained on them. Of ``chitchat`` it is people that are held out, of ``books`` whole books; the other
sources are nowhere in the training data. A file of rows is all that a machine without the archives needs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import random
from collections.abc import Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from ccm.chat.turns import render
from ccm.data import load_chitchat
from ccm.data.books import load_books
from ccm.data.carriers import NEWSGROUPS, ORANGE
from ccm.data.conversation import Conversation, unit
from ccm.data.coqa import Story, load_coqa
from ccm.data.facts import TEST
from ccm.data.notes import Notes
from ccm.data.rows import held_out_rows
from ccm.data.squad import load_squad_shifts
from ccm.data.topical_chat import load_topical_chat
from ccm.errors import DataError
from ccm.training.rows import later
from ccm.training.targets import NONE, RECALL, TEXT, Row, marked, scored_from

FILE = Path(__file__).parent / "held_out_rows.json.xz"
VERSION = 1
TALKS, DOCUMENTS, LONG = 24, 16, 12  # rows of a source
TURNS, MANY = 10, 40
NAMES = ("Ana", "Ben", "Maria", "Tom", "Julia", "Sam", "Nadia", "Paul", "Kate", "Omar", "Lena", "Hugo")
#: A package of which no file is trained on.
CODE = "rich"

Rows = dict[str, list[Row]]


def build(tokenizer: Any) -> Rows:
    """All sources; what is missing of their archives is downloaded."""
    small_talk, topics, stories = load_chitchat("test"), load_topical_chat()["test"], load_coqa()
    books = load_books()["test"]
    prose = [books[name] for name in ("Moby-Dick", "Persuasion")]
    many = [talk for talk in load_chitchat("test", cap_per_user=None) if len(talk.turns) >= MANY]
    return {
        "chitchat": talks(small_talk, tokenizer),
        "chitchat, names": named(small_talk, tokenizer),
        "topical-chat": talks(topics, tokenizer),
        "topical-chat, names": named(topics, tokenizer),
        "coqa": [asked(story, tokenizer) for story in short(stories, tokenizer)],
        "coqa, Q and A": [quizzed(story, tokenizer) for story in short(stories, tokenizer)],
        "wikipedia, 24": stretches(articles(), tokenizer, 24, 480),
        "news, 64": stretches(posts(), tokenizer, 64, 640),
        "code, 32": stretches(modules(), tokenizer, 32, 512),
        "books, 32": stretches(places(prose), tokenizer, 32, 512),
        "books, 128": stretches(places(prose), tokenizer, 128, 768),
        "facts": told(tokenizer),
        "chitchat, forty turns": [
            scored_from(marked(row), MANY - TURNS) for row in held_out_rows(many, tokenizer, MANY)[:LONG]
        ],
    }


# ---------------------------------------------------------------------- conversations


def talks(conversations: Sequence[Conversation], tokenizer: Any) -> list[Row]:
    """In the chat template, one turn a segment."""
    return [later(marked(row)) for row in held_out_rows(conversations, tokenizer, TURNS)[:TALKS]]


def named(conversations: Sequence[Conversation], tokenizer: Any) -> list[Row]:
    """The same as plain text, each turn behind the speaker's name."""
    rows = []
    for number, talk in enumerate([c for c in conversations if len(c.turns) >= TURNS][:TALKS]):
        pair = random.Random(number).sample(NAMES, 2)
        turns = [
            said(tokenizer, f"{pair[k % 2]}:", " " + " ".join(turn.text.split())[:500])
            for k, turn in enumerate(talk.turns[:TURNS])
        ]
        rows.append(later(begun(joined(turns), tokenizer)))
    return rows


def said(tokenizer: Any, head: str, text: str, end: str = "\n") -> Row:
    """One segment of plain text, of which what is behind the head is scored."""
    before, ids = encode(tokenizer, head), encode(tokenizer, head + text + end)
    first = max(1, shared(before, ids))
    return Row((ids,), ((NONE,) * first + (TEXT,) * (len(ids) - first),))


def short(stories: Sequence[Story], tokenizer: Any, tokens: int = 320) -> list[Story]:
    """Stories that leave room for six questions."""
    able = (s for s in stories if len(s.questions) >= 6 and len(encode(tokenizer, s.text)) <= tokens)
    return [story for story, _ in zip(able, range(TALKS), strict=False)]


def asked(story: Story, tokenizer: Any) -> Row:
    """A story and questions in the chat template; questions and answers are scored."""
    pieces = [
        Row((ids,), ((NONE,) * len(ids),)) for ids in cut(render(tokenizer, "user", story.text, "").ids, 64)
    ]
    for question in story.questions[:6]:
        for role, text in (("user", question.text), ("assistant", question.answers[0])):
            turn = render(tokenizer, role, text)
            start, stop = turn.content
            roles = tuple(TEXT if max(1, start) <= t < stop else NONE for t in range(len(turn.ids)))
            pieces.append(Row((turn.ids,), (roles,)))
    return joined(pieces)


def quizzed(story: Story, tokenizer: Any) -> Row:
    """The same as plain text, a question and its answer a segment."""
    pieces = [Row((ids,), ((NONE,) * len(ids),)) for ids in cut(encode(tokenizer, story.text + "\n\n"), 64)]
    for question in story.questions[:6]:
        pieces.append(said(tokenizer, "Q:", f" {question.text}\nA: {question.answers[0]}"))
    return begun(joined(pieces), tokenizer)


def told(tokenizer: Any) -> list[Row]:
    """Facts of kinds that were never trained on, and questions; only what was told is scored."""
    rows = Notes(tokenizer, messages=len(TEST), changed=0.0, asked=0.75).held_out("test", TALKS)
    return [
        Row(row.segments, tuple(tuple(r if r == RECALL else NONE for r in roles) for roles in row.roles))
        for row in map(marked, rows)
    ]


# ---------------------------------------------------------------------- documents


def stretches(texts: Sequence[str], tokenizer: Any, segment: int, tokens: int) -> list[Row]:
    """The begin of every text that is long enough, in segments of equal length."""
    rows = []
    for text in texts:
        ids = encode(tokenizer, text[: 8 * tokens])[:tokens]
        if len(ids) == tokens:
            pieces = [Row((part,), ((NONE, *(TEXT,) * (len(part) - 1)),)) for part in cut(ids, segment)]
            rows.append(later(begun(joined(pieces), tokenizer)))
        if len(rows) == DOCUMENTS:
            return rows
    raise DataError(f"got {len(rows)} texts of {tokens} tokens, expected {DOCUMENTS}")


def articles() -> list[str]:
    """Paragraphs of a Wikipedia article, one article after another."""
    found: dict[str, list[str]] = {}
    for paragraph in load_squad_shifts()["wikipedia"]:
        found.setdefault(paragraph.article, []).append(paragraph.text)
    return ["\n\n".join(found[name]) for name in sorted(found, key=unit)]


def posts() -> list[str]:
    """Messages of news groups, the part for tests."""
    with (ORANGE.fetch() / NEWSGROUPS[1]).open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, delimiter="\t")
    place = header.index("Text")
    return sorted((line[place] for line in lines[2:] if len(line) > place), key=unit)


def modules() -> list[str]:
    """Python files of one package, but for its tables of characters and colours."""
    files = [file for file in metadata.files(CODE) or () if file.suffix == ".py"]
    files = [file for file in files if not any(part.startswith("_") for part in file.parts)]
    texts = {str(file): file.read_text("utf-8") for file in files}
    return [texts[name] for name in sorted(texts, key=unit)]


def places(books: Sequence[str], apart: int = 40_000) -> list[str]:
    """What begins at a word every so many characters, the books in turn."""
    starts = [book[at:] for at in range(apart, min(map(len, books)), apart) for book in books]
    return [text[text.find(" ") + 1 :] for text in starts]


# ---------------------------------------------------------------------- small things


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def begun(row: Row, tokenizer: Any) -> Row:
    """Plain text behind the tokens that the model expects in front of every text, if there are any (BOS)."""
    bos = tuple(tokenizer.encode("a"))[: -len(encode(tokenizer, "a"))]
    first, *segments = row.segments
    roles = (NONE,) * len(bos) + row.roles[0]
    return Row(((*bos, *first), *segments), (roles, *row.roles[1:]))


def cut(ids: Sequence[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at : at + length]) for at in range(0, len(ids), length)]


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def joined(parts: Any) -> Row:
    return sum(parts, Row((), ()))


# ---------------------------------------------------------------------- files


def save(rows: Rows, path: Path, base: str) -> None:
    """Write rows as compressed JSON; roles as (role, count) pairs."""
    sources = {
        name: [
            {
                "segments": row.segments,
                "roles": [[(role, len(list(run))) for role, run in groupby(roles)] for roles in row.roles],
            }
            for row in part
        ]
        for name, part in rows.items()
    }
    content = {"version": VERSION, "model": base, "sources": sources}
    path.write_bytes(lzma.compress(json.dumps(content, separators=(",", ":")).encode()))


def load(path: Path) -> Rows:
    """Read a file of rows.

    Raises:
        DataError: it is missing, damaged, or of another version.
    """
    try:
        content = json.loads(lzma.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); make it with `held_out.py rows`") from error
    if content.get("version") != VERSION:
        raise DataError(f"{path}: got version {content.get('version')}, expected {VERSION}; make it again")
    return {
        name: [
            Row(
                tuple(map(tuple, row["segments"])),
                tuple(tuple(role for role, n in runs for _ in range(n)) for runs in row["roles"]),
            )
            for row in part
        ]
        for name, part in content["sources"].items()
    }


def key_of(rows: Sequence[Row]) -> str:
    """A short hash of what is read and what of it is scored."""
    text = json.dumps([(row.segments, row.roles) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
