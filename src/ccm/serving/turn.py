"""One turn on its way from the engine to the store, and what comes out of it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from ..chat.answers import AnswerReader
from ..chat.messages import ToolCall
from ..errors import CCMError
from .engine import Engine, Event, Job, Result, StoppingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """How a request was understood, in numbers of messages.

    Attributes:
        matched: messages of the request that the memory held.
        appended: messages of the request that were taken in.
        rewound: messages that the memory held and no longer holds.
        rebuilt: messages that were read again. No version from their place is kept, or the memory was made anew.
        system: what became of the request's system text, see :class:`~ccm.serving.history.Plan`.
        ephemeral: whether nothing of the request was kept.
    """

    matched: int = 0
    appended: int = 0
    rewound: int = 0
    rebuilt: int = 0
    system: str | None = None
    ephemeral: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finished turn.

    Attributes:
        text: the answer.
        finish_reason: "stop", "length" or "tool_calls"; "stopped" if the client had gone before the end.
        prompt_tokens: tokens that the answer depends on.
        known_tokens: how many of these the memory held before the request.
        completion_tokens: tokens of the answer.
        reasoning: thoughts of the answer, apart from its text.
        tool_calls: calls of tools that the answer asks for.
        session, version, stats: of the conversation; None and 0 for a stateless answer.
        reasoning_tokens: how many of the completion tokens are thoughts.
        taken: how the request was understood; None for a stateless answer.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    known_tokens: int
    completion_tokens: int
    session: str | None = None
    version: int = 0
    stats: dict[str, int] | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int = 0
    taken: Taken | None = None


class Turn:
    """An answer on its way: an async iterator over pieces of text. When it ends, the turn is committed.

    Thoughts of the model are pieces of type :class:`~ccm.chat.messages.Thought`.

    Args:
        engine: writes the answer.
        job: what it is asked for.
        commit: stores the result.
        release: is called once the turn is over, whatever became of it.
        session, version: of the conversation once the turn is committed; None and 0 for a stateless answer.
        reader: tells thoughts and calls of tools from text; None leaves the text as it is.
        disconnect: what becomes of the turn if the client disconnects, see :class:`~ccm.serving.settings.Settings`.
        left: where the turn stands while it goes on without its client.

    Attributes:
        taken: how the request was understood.
        outcome: the finished turn, set at the end.

    Raises (while iterating):
        EngineError, ConfigError, StoppingError: no answer; nothing was committed.
        ConflictError, QuotaError, StorageError: the commit failed.
    """

    outcome: Outcome
    taken: Taken | None = None

    def __init__(
        self,
        engine: Engine,
        job: Job,
        commit: Callable[[Result], Awaitable[Outcome]],
        release: Callable[[], None],
        session: str | None = None,
        version: int = 0,
        reader: AnswerReader | None = None,
        disconnect: str = "drop",
        left: set[Turn] | None = None,
    ):
        self.session, self.version = session, version
        self._reader, self._pieces = reader, deque[str]()
        self._commit, self._release = commit, release
        self._disconnect, self._left = disconnect, set() if left is None else left
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self._ticket = engine.submit(job, listener)
        except BaseException:
            release()
            raise

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            if self._pieces:
                return self._pieces.popleft()
            if self._ended:
                raise StopAsyncIteration
            event = await self._events.get()
            if not isinstance(event, str):
                break
            self._pieces += self._reader.feed(event) if self._reader else [event]
        self._ended = True
        if isinstance(event, Exception):
            self._release()
            raise event
        # if the client disconnects here, the commit still completes; the conversation stays locked until then
        commit = asyncio.ensure_future(self._commit(event))
        commit.add_done_callback(lambda _: self._release())
        self.outcome = replace(await asyncio.shield(commit), taken=self.taken)
        self._pieces += self._reader.end() if self._reader else []
        return await anext(self)

    async def finish(self) -> Outcome:
        """Run to the end."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        return self.outcome

    async def aclose(self) -> None:
        """The client has disconnected. A turn that still runs is dropped, kept or finished, as was chosen."""
        if self._ended or self in self._left:
            return
        if self._disconnect == "drop":
            self._ended = True
            self._ticket.cancel()
            self._release()
            return
        if self._disconnect == "keep":
            self.hurry()
        self._left.add(self)
        self._alone = asyncio.ensure_future(self._end_alone())

    def cut(self) -> None:
        """End now. Nothing of the turn is kept, unless it is being committed; whoever waits for it hears why."""
        self._ticket.cancel()
        self._events.put_nowait(
            StoppingError("the server stopped during this turn, and nothing of it is kept: send it again", 10)
        )

    def hurry(self) -> None:
        """End the answer soon. What is written by then is kept."""
        self._ticket.finish()

    async def _end_alone(self) -> None:
        try:
            async for _ in self:
                pass
        except CCMError as error:
            log.warning("a turn whose client had gone was not kept: %s", error)
        finally:
            self._left.discard(self)
