"""Which turns run: one at a time in a conversation, and no new ones once the server is about to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from .engine import StoppingError
from .store import ConflictError
from .turn import Turn

#: Seconds between two looks at whether all turns have ended.
_PAUSE = 0.02


class BusyError(ConflictError):
    """Another turn of this conversation is running."""


class Running:
    """The turns of one server.

    Attributes:
        turns: how many run.
        locked: conversations, by tenant and id, in which a turn runs.
        begun: turns that somebody holds; some have ended.
        left: turns that go on without their clients.
        stopping: no new turns are taken.
    """

    def __init__(self) -> None:
        self.turns = 0
        self.locked: set[tuple[str, str]] = set()
        self.begun: WeakSet[Turn] = WeakSet()
        self.left: set[Turn] = set()
        self.stopping = False

    def check(self) -> None:
        """Raises StoppingError if no new turns are taken."""
        if self.stopping:
            raise StoppingError("the server is about to stop: send this to another one, or later", 10)

    def count(self) -> Callable[[], None]:
        """One more turn runs, until the returned function is called."""
        self.turns += 1

        def end() -> None:
            self.turns -= 1

        return _once(end)

    def lock(self, tenant: str, session: str) -> Callable[[], None]:
        """Lock a conversation, until the returned function is called. A second turn is refused, it does not wait.

        Raises:
            BusyError: it is locked.
        """
        key = tenant, session
        if key in self.locked:
            raise BusyError(
                "another turn of this conversation is running: wait for its end, or fork the conversation", 0
            )
        self.locked.add(key)
        return _once(lambda: self.locked.discard(key))

    @contextmanager
    def alone(self, tenant: str, session: str) -> Iterator[None]:
        """Hold the lock of a conversation for a block."""
        unlock = self.lock(tenant, session)
        try:
            yield
        finally:
            unlock()

    def stop_taking(self) -> None:
        """Take no new turns."""
        self.stopping = True

    def cut(self) -> None:
        """End what still runs for a client, who hears why; nothing of it is kept."""
        for turn in set(self.begun) - self.left:
            turn.cut()

    async def drain(self) -> None:
        """Take no new turns, and wait for those that run. Those without a client end at once."""
        self.stop_taking()
        while self.turns:
            for turn in self.left:
                turn.hurry()
            await asyncio.sleep(_PAUSE)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """A function of which the first call alone counts."""
    left = [function]

    def call() -> None:
        if left:
            left.pop()()

    return call
