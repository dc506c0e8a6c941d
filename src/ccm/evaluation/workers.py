"""Other processes that measure into the same folder, each on cores of its own.

One conversation at a time leaves most cores of a machine idle: its matrices are small. So items are shared out. The
processes know of each other through the folder alone (``ccm.evaluation.records``); one that dies only costs the
item that it had in hand, which another then measures.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .runner import Evaluation, Progress

#: Work that is worth the start of one more process, in tokens, and how many are started unasked at most.
_WORTH, _MOST = 8192, 8
#: Copies of the weights that must fit into the free memory for each process: its own, and room to work.
_COPIES = 3
#: Seconds that a stopped process may take to save the item in hand.
_TO_SAVE = 30


def how_many(model: PreTrainedModel, tokens: int) -> int:
    """As many processes as the cores, the free memory and the work suggest; one with an accelerator.

    Args:
        model: that each of them loads.
        tokens: work that is left.
    """
    if model.device.type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = int(psutil.virtual_memory().available // (_COPIES * model.get_memory_footprint()))
    return max(1, min(cores, room, tokens // _WORTH, _MOST))


class Workers:
    """Processes that run while this context is open.

    Args:
        count: how many.
        prepare: makes an evaluation; a function of a module, for it runs in the new process.
        options: what it is given.
        folder: of the records.
    """

    def __init__(self, count: int, prepare: Callable[[Any], Evaluation], options: Any, folder: Path):
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._begun: list[Event] = [context.Event() for _ in range(count)]
        self.processes: list[BaseProcess] = [
            context.Process(target=_work, args=(prepare, options, folder, begun), daemon=True)
            for begun in self._begun
        ]

    def __enter__(self) -> Workers:
        with (
            _deaf()
        ):  # they inherit it: Ctrl-C on the terminal would break off their imports with a traceback
            for process in self.processes:
                process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """All work is done, or this process was stopped: the others save their items in hand and end."""
        for process, begun in zip(self.processes, self._begun, strict=True):
            if not begun.is_set():
                process.kill()
            elif process.pid is not None and process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
        for process in self.processes:
            process.join(_TO_SAVE)
            process.kill()


@contextmanager
def _deaf() -> Iterator[None]:
    """Without SIGINT. Python allows it in the main thread alone; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(prepare: Callable[[Any], Evaluation], options: Any, folder: Path, begun: Event) -> None:
    """A process's life: silent, since what is wrong here is wrong in the process that started it too."""
    signal.signal(signal.SIGINT, _once)
    begun.set()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    with suppress(KeyboardInterrupt):
        prepare(options).measure(folder, _while_needed)


def _once(number: int, frame: FrameType | None) -> None:
    """The terminal interrupts all of its processes, and then the first one interrupts the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _while_needed(progress: Progress) -> None:
    """A killed process takes its helpers with it."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise KeyboardInterrupt
