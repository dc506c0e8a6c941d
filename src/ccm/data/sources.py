"""What all training data has in common, and the registry.

A *source* turns one data set into rows: training rows by chance, held-out rows always the same::

    source = get_source("icl", tokenizer, demonstrations=(4, 8))
    row = source.draw(random.Random(0))            # the train split only
    rows = source.held_out("test", limit=40)

To add one, put a class with :func:`register_source` into a file of this folder and import it in ``__init__``.
It then has a name in recipes, in ``ccm data list`` and in the tests.
"""

from __future__ import annotations

import inspect
import random
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

from ..errors import ConfigError, UnknownNameError
from .archives import Archive
from .logs import Tally
from .rows import ConversationRow

SOURCES: dict[str, type[Source]] = {}
_S = TypeVar("_S", bound="type[Source]")

HeldOut = Literal["validation", "test"]


class Source(ABC):
    """One data set as rows. Every row ends with something to be predicted.

    Attributes:
        name: in recipes and on the command line.
        title: what it is, in a few words.
        size: how much there is, all splits together; "" if that is not known beforehand.
        licence: of the data; ``upstream, …`` where the package that carries it does not print one: such data is
            loaded when it is used and never copied into this library.
        origin: package and version, hub name, or what the user gives.
        hub: name on the model hub, of sources that are loaded from there.
        archives: packages that are downloaded when the source is first used.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    size: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    origin: ClassVar[str] = ""
    hub: ClassVar[str | None] = None
    archives: ClassVar[tuple[Archive, ...]] = ()

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @abstractmethod
    def draw(self, rng: random.Random) -> ConversationRow:
        """One row of the train split; the same for the same state of ``rng``."""

    @abstractmethod
    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        """At most ``limit`` rows of a held-out split, always the same. A smaller ``limit`` gives the first of them.

        Raises:
            UnknownNameError: no such split.
            DataError: the data set has nothing in it.
        """

    @property
    def tally(self) -> Tally | None:
        """What was read of a user's own files; None for all other data."""
        return None

    @classmethod
    def downloaded(cls) -> bool | None:
        """Whether everything that has to be downloaded is here; None if nothing has to be."""
        return all(archive.locate() for archive in cls.archives) if cls.archives else None


def register_source(source: _S) -> _S:
    """Class decorator: make a source known under its ``name``."""
    SOURCES[source.name] = source
    return source


def list_sources() -> list[str]:
    """Names that :func:`get_source` knows."""
    return sorted(SOURCES)


def source_class(name: str) -> type[Source]:
    """The class registered under ``name``; nothing is downloaded.

    Raises:
        UnknownNameError: no such source.
    """
    if name not in SOURCES:
        raise UnknownNameError("source", name, list_sources())
    return SOURCES[name]


def get_source(name: str, tokenizer: Any, **options: Any) -> Source:
    """The source registered under ``name``, downloaded if needed.

    Raises:
        UnknownNameError: no such source.
        ConfigError: an option that the source does not have, or a value that it cannot use.
        DataError: the data cannot be fetched or read.
    """
    cls = source_class(name)
    known = option_names(cls)
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(
            f"source {name} has no option {unknown[0]!r}: expected {', '.join(known) or 'none'}"
        )
    try:
        inspect.signature(cls).bind(tokenizer, **options)  # says what is missing without the names of classes
        return cls(tokenizer, **options)
    except TypeError as error:
        raise ConfigError(f"source {name}: {error}") from error


def option_names(cls: type[Source]) -> list[str]:
    """Names of the options of a source, those of its base classes included."""
    names: list[str] = []
    for part in cls.__mro__:
        if "__init__" in vars(part) and part is not object:
            parameters = list(inspect.signature(vars(part)["__init__"]).parameters.values())[2:]
            names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in names]
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names


def numbers(option: str, value: Any, least: int) -> tuple[int, ...]:
    """A setting that is one whole number or several to draw from, checked, as a tuple.

    Raises:
        ConfigError: something else, none at all, or a number below ``least``.
    """
    given = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not given or any(type(n) is not int or n < least for n in given):
        raise ConfigError(f"{option} is {value!r}: expected whole numbers of at least {least}")
    return given


def number(option: str, value: Any, least: int) -> int:
    """A setting that is one whole number, checked.

    Raises:
        ConfigError: something else, or less than ``least``.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{option} is {value!r}: expected a whole number of at least {least}")
    return value


def share(option: str, value: Any) -> float:
    """A setting between 0 and 1, checked.

    Raises:
        ConfigError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{option} is {value!r}: expected a number from 0 to 1")
    return float(value)
