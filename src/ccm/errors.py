"""Every error that the library raises on purpose derives from :class:`CCMError`.

A message says what was got, what was expected and what to do. The command line prints it in one line
and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class CCMError(Exception):
    """Base of all errors raised by ``ccm``."""


class ConfigError(CCMError, ValueError):
    """A setting, an argument or an input is not usable as given."""


class UnknownNameError(ConfigError):
    """A method, rule, task or adapter was asked for by a name that nobody registered."""

    def __init__(self, kind: str, got: str, known: list[str]):
        guess = f" (did you mean {near}?)" if (near := nearest(got, known)) else ""
        super().__init__(f"unknown {kind} {got!r}{guess}: expected one of {', '.join(sorted(known))}")


class UnsupportedModelError(CCMError):
    """The model family cannot carry a compressed memory (see ``ccm.core.families``)."""


class MismatchError(CCMError):
    """An adapter or a memory belongs to another model or adapter."""


class MemoryFileError(CCMError):
    """A memory or session file is missing, truncated, tampered with or holds NaN."""


class MissingPackageError(CCMError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


class DataError(CCMError):
    """A data set or a data file is missing or broken."""


class StorageError(CCMError, OSError):
    """Writing failed (no space, no permission); nothing half-written is left behind."""


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """For imports of packages that an extra brings.

    Args:
        what: what needs which package.
        extra: that brings it.

    Raises:
        MissingPackageError: it is not there.
    """
    try:
        yield
    except ImportError as error:
        install = f"pip install 'compressed-context-memory[{extra}]'"
        raise MissingPackageError(f"{what} ({error}): {install}") from error


def nearest(got: str, known: Sequence[str]) -> str:
    """The known name that was probably meant; empty if there is none like it."""
    return next(iter(get_close_matches(got, known, 1)), "")
