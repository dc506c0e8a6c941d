"""Items that other processes make ahead of time, each over a pipe of its own.

Nothing else is shared: a process that is killed leaves no lock behind, and whoever waits at the other end of its pipe
hears of it at once.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from ..errors import CCMError, ConfigError, DataError

T = TypeVar("T")


class Ahead(Generic[T]):
    """Items in the order of their numbers; a process begins its next one when one of its own is taken.

    Args:
        make: makes an item from its number; it travels to the processes.
        processes: how many.
        first: number of the first item.

    Attributes:
        close: ends the processes at once; it may be called more than once.
    """

    def __init__(self, make: Callable[[int], T], processes: int, first: int):
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        workers: list[tuple[BaseProcess, Connection]] = []
        self.close = weakref.finalize(self, _end, workers)
        atexit.register(self.close)  # before multiprocessing, which would wait for processes that are deaf
        self._numbers = count(first)
        for _ in range(processes):
            ours, theirs = context.Pipe()
            workers.append((context.Process(target=_work, args=(make, theirs), daemon=True), ours))
            workers[-1][0].start()
            theirs.close()
            ours.send(next(self._numbers))
        self._turns = cycle(workers)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        process, line = next(self._turns)
        try:
            item = line.recv()
            line.send(next(self._numbers))
        except (EOFError, OSError) as error:
            process.join(5)
            raise DataError(
                f"a process that draws rows ended by itself (exit code {process.exitcode}, -9 is often a lack of "
                "memory): what it wrote is above; fewer data_workers need less memory, 0 has none"
            ) from error
        if isinstance(item, _Failure):
            kind = ConfigError if item.config else DataError
            raise kind(item.message) from RuntimeError(item.trace)
        return item


@dataclass(frozen=True)
class _Failure:
    """What went wrong in another process, in words: not every error can travel."""

    message: str
    config: bool
    trace: str


def _work(make: Callable[[int], object], line: Connection) -> None:
    """A process's life, until the other end of its line is closed.

    Terminals and schedulers stop all processes: the run at hand still takes rows then, and ends the others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        while True:
            number = line.recv()
            try:
                item = make(number)
            except Exception as error:
                words = str(error) if isinstance(error, CCMError) else f"{type(error).__name__}: {error}"
                item = _Failure(words, isinstance(error, ConfigError), traceback.format_exc())
            line.send(item)


def _end(workers: list[tuple[BaseProcess, Connection]]) -> None:
    for process, line in workers:
        line.close()
        if process.pid is not None:
            process.kill()
    for process, _ in workers:
        if process.pid is not None:
            process.join()
