"""Ctrl-C and SIGTERM ask a run to stop after the step at hand, so that its state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class StopRequest:
    """While open, the first SIGINT or SIGTERM is noted; a second one interrupts at once.

    Attributes:
        signal: number of the signal that came, 0 if none.
        idle: whether the run waits for something and has begun nothing; then the first signal interrupts at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.idle = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def idling(self, stream: Iterator[T]) -> Iterator[T]:
        """The endless stream; whoever waits for its next item is idle."""
        while True:
            self.idle = True
            item = next(stream)
            self.idle = False
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal, number
        if again or self.idle:
            raise_for(number)


def raise_for(number: int) -> None:
    """End as people expect of this signal: KeyboardInterrupt (exit code 130), or exit code 143."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
