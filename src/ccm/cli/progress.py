"""What goes on, for whoever waits: it moves on a terminal, and is plain lines on stderr elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

Tell = Callable[[str], None]


def moves(console: Console) -> bool:
    """Whether somebody sees a spinner or a bar move there."""
    return console.is_terminal and not console.is_dumb_terminal


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stages(first: str, *, tells: bool = False) -> Iterator[Tell]:
    """While a block runs, say what it is doing; the function that it gets says what comes next.

    Args:
        first: what it does at first.
        tells: the block says by itself what it does, so ``first`` is for a spinner alone.
    """
    console = Console(stderr=True)
    if not moves(console):
        if not tells:
            say(first)
        yield say
        return
    with console.status(Text(first)) as status:
        yield lambda text: status.update(Text(text))


class Tenths:
    """A line for every tenth of something long, where nobody sees its bar move.

    Args:
        console: of the bar.
    """

    def __init__(self, console: Console):
        self._silent = moves(console) or console.quiet
        self._said = 0

    def __call__(self, share: float, text: str) -> None:
        """Tell how much is done, between 0 and 1, and what of it."""
        if not self._silent and int(10 * share) > self._said:
            self._said = int(10 * share)
            say(f"{share:.0%}: {text}")
