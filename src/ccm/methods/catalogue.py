"""What there is to choose from: every method by family, in the words of its own docstring.

``ccm methods`` and docs/methods.md show the same entries. A method from elsewhere is among them once it is
registered.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import CCMError
from .base import METHODS, Method
from .spec import list_methods, method_class

#: What the slots of a method are (:attr:`ccm.methods.base.Method.made`), in a sentence each.
SLOTS = {
    "folded": "written by an adapter that was trained for it",
    "learned": "found by gradient descent for this one text",
    "fitted": "chosen keys with values solved for, so that attention gives what it gave",
    "merged": "chosen entries, each the mean of itself and of the similar ones that had to go",
    "pooled": "means of several entries",
    "filtered": "the slow changes of many entries, in fewer",
    "chosen": "some of the entries as they were computed, the others let go",
    "kept": "the entries as they were computed",
    "coded": "those of another memory in fewer bits",
    "written": "a text that the model writes itself, read anew",
    "retold": "fewer tokens of the old text, read anew by the model",
}


@dataclass(frozen=True)
class Family:
    """Methods that are of one kind.

    Attributes:
        title: of the group.
        said: what its methods have in common.
        modules: files and folders of ``ccm.methods`` that they stand in.
    """

    title: str
    said: str
    modules: tuple[str, ...] = ()


FAMILIES = (
    Family(
        "Trained memories",
        "An adapter makes the slots. It belongs to one model, and `ccm train` makes one for yours.",
        ("compressed", "baselines", "hybrid"),
    ),
    Family(
        "Entries that are made",
        "These need no training. Slots are computed anew from the entries that they stand for: fitted, merged, "
        "averaged, filtered or learned for their text.",
        ("synthesis",),
    ),
    Family(
        "Entries that are chosen",
        "These need no training. A part of the keys and values stays as it is.",
        ("selection",),
    ),
    Family(
        "Entries that are looked up",
        "These need no training. Everything is kept, and the prompt says what is read.",
        ("recall",),
    ),
    Family(
        "Fewer bits",
        "These pack the slots of any other memory, trained or not.",
        ("bits",),
    ),
    Family(
        "Text in place of entries",
        "These need no training. What leaves the window stays as words.",
        ("text",),
    ),
    Family(
        "Yardsticks",
        "No context and full context are the ends of the scale on which `ccm eval` puts all others.",
        ("references",),
    ),
)
#: Of methods that are no part of this library, and of folders that no family names.
ELSEWHERE = Family("Methods from elsewhere", "Registered by an installed package or a file of your own.")


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
        name: as it is written.
        said: what it is.
        default: of the method.
    """

    name: str
    said: str
    default: Any


@dataclass(frozen=True)
class Entry:
    """A method as people choose it.

    Attributes:
        names: its name, then further ones for the same thing.
        family: see :data:`FAMILIES`.
        keeps: what it keeps, in a few words.
        slots: what its slots are, a key of :data:`SLOTS`.
        trained: whether it needs an adapter that was trained for the model.
        asks: what it needs beside keys and values, keys of :data:`ASKS`.
        about: the whole of its docstring, without its options.
        paper: who described it; "" if there is none.
        link: to the paper; "" if none is known.
        options: all of them, those of every method (sink, window, segment) included.
    """

    names: tuple[str, ...]
    family: Family
    keeps: str
    slots: str
    trained: bool
    asks: tuple[str, ...]
    about: str
    paper: str
    link: str
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


#: What each of :attr:`Entry.asks` means.
ASKS = {
    "adapter": "training, once for each model",
    "gradient": "steps of training in every fold, which take seconds to minutes",
    "queries": "what the newest text asks of old text",
    "words": "the text itself, beside keys and values",
    "writing": "the text, and a chat model that writes: seconds each time",
}


def catalogue() -> tuple[list[Entry], dict[str, str]]:
    """Every registered method once, by family and name.

    Returns:
        the entries, and of installed methods that cannot be imported the reason, by their names.
    """
    names: dict[type[Method], list[str]] = {}
    broken = {}
    for name in list_methods():
        try:
            names.setdefault(method_class(name), []).append(name)
        except CCMError as error:
            broken[name] = str(error)
    return sorted(map(entry, names), key=lambda e: (_place(e.family), e.name)), broken


def _place(family: Family) -> int:
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)


def entry(method: type[Method]) -> Entry:
    """What is said of one method."""
    doc = re.split(r"\n\s*(?:Attributes|Args):\n", inspect.getdoc(method) or "")[0].strip()
    paper, link = _cited(doc) or _cited(inspect.getdoc(sys.modules[method.__module__]) or "") or ("", "")
    known = (name for name, of in METHODS.items() if of is method and name != method.name)
    return Entry(
        names=(method.name, *known),
        family=_family(method),
        keeps=_keeps(doc),
        slots=method.made,
        trained="adapter" in method.asks,
        asks=method.asks or (("queries",) if method.queries else ()),
        about=doc,
        paper=paper,
        link=link,
        options=tuple(_options(method)),
    )


def _family(method: type[Method]) -> Family:
    house, _, place = method.__module__.partition(".methods.")
    if house != __package__.partition(".")[0]:
        return ELSEWHERE
    return next((f for f in FAMILIES if place.partition(".")[0] in f.modules), ELSEWHERE)


def _keeps(doc: str) -> str:
    """The first sentence, without the paper and the full stop."""
    first = re.sub(r"\s*\([^()]*\d{4}[^()]*\)", "", plain(" ".join(doc.split("\n\n")[0].split())))
    return re.split(r"\.(?:$| (?=[A-Z]))", first)[0]


#: Zhang et al., NeurIPS 2023, arXiv 2306.14048
_PAPER = re.compile(
    r"(?:\b[A-Z][\w-]+(?: [A-Z][\w-]+)*, )?"  # its name
    r"\b[A-Z][\w-]+(?: et al\.| and [A-Z][\w ]+|),? "
    r"(?:[A-Z][\w ]+ )?\d{4}(?:, arXiv [\d.]+\d)?"
)
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def _cited(doc: str) -> tuple[str, str] | None:
    """The first paper that a text names, and a link to it."""
    text = " ".join(doc.split())
    number, found = _ARXIV.search(text), _PAPER.search(text)
    if not (number or found):
        return None
    link = f"https://arxiv.org/abs/{number[1]}" if number else ""
    return (found or number)[0], link  # type: ignore[index]  # one of the two is there


def _options(method: type[Method]) -> Iterable[Option]:
    described = {k: v for cls in reversed(method.__mro__) for k, v in attributes(cls.__doc__ or "").items()}
    for name, default in method.defaults().items():
        yield Option(name, plain(described.get(name, "")), default)


def attributes(doc: str) -> dict[str, str]:
    """What a docstring says of each attribute."""
    section = re.search(r"\n( *)Attributes:\n((?:\1 +.*\n?|\n)*)", doc)
    if section is None:
        return {}
    pattern = r"^ {4,8}(\w+(?:, \w+)*): ((?:.|\n)*?)(?=^ {4,8}\w+(?:, \w+)*: |\Z)"
    found = re.findall(pattern, section.group(2), re.MULTILINE)
    return {name: " ".join(said.split()) for names, said in found for name in names.split(", ")}


def plain(text: str) -> str:
    """A docstring without the marks of Sphinx."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")
