"""README and documentation: their blocks of code, and the commands in them."""

from __future__ import annotations

import contextlib
import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (README, *sorted(DOCS.rglob("*.md")))
}
#: Drawings, output and code of other programs, which nothing here can run: bibtex, nginx's settings.
NOT_RUN = {"text", "bibtex", "nginx"}


@dataclass(frozen=True)
class Block:
    """A fenced block: the page that it stands on, its language, and what is in it."""

    page: str
    language: str
    code: str


BLOCKS = [
    Block(page, language, code)
    for page, text in PAGES.items()
    for language, code in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
]


def blocks(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def commands() -> list[tuple[str, list[str]]]:
    """Every line that starts a program, as words, with the page that it stands on."""
    found = []
    for block in blocks("sh", "console"):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            with contextlib.suppress(ValueError):  # a quoted text that goes over several lines
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"\w+=\S*", words[0]):
                    del words[0]
                if words:
                    found.append((block.page, words))
    return found


def of_ccm() -> list[tuple[str, list[str]]]:
    """Those of ccm, by its own name or as a module, without that name."""
    found = []
    for page, words in commands():
        if words[0] == "ccm":
            found.append((page, words[1:]))
        elif (
            at := next((i for i, pair in enumerate(pairwise(words)) if pair == ("-m", "ccm")), None)
        ) is not None:
            found.append((page, words[at + 2 :]))
    return found
