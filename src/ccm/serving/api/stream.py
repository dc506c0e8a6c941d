"""Answers as server-sent events, and answers that stop when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..turn import Outcome, Turn
from .errors import ApiError, describe
from .guard import Receive, Scope, Send

#: Seconds of silence after which a comment shows proxies that the stream is alive.
KEEP_ALIVE = 15.0


def event(data: Any, name: str | None = None) -> str:
    """One event; its data are JSON, or a text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


class EventStream(Response):
    """Sends events of a turn as they come; closes the turn when the client goes away, or at the end.

    An error of the generator becomes an event in OpenAI's shape, and the end: the status was sent long ago.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], turn: Turn):
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.turn = events, turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        try:
            await _first(sending, _gone(receive))
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending
            await self.events.aclose()
            await self.turn.aclose()  # by itself: a generator that has not begun closes nothing

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while True:
            following = asyncio.ensure_future(anext(self.events, None))
            try:
                while not (await asyncio.wait({following}, timeout=KEEP_ALIVE))[0]:
                    await self._chunk(send, ": still here\n\n")
                text = await following
            except asyncio.CancelledError:
                following.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await following
                raise
            except Exception as error:  # whatever it is, the client hears of it
                text = None
                await self._chunk(send, event(describe(error)[1], "error"))
            if text is None:
                break
            await self._chunk(send, text)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _chunk(send: Send, text: str) -> None:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def unless_gone(request: Request, turn: Turn) -> Outcome:
    """The outcome of a turn, which is cancelled if the client goes away first."""
    running = asyncio.ensure_future(turn.finish())
    try:
        await _first(running, _gone(request.receive))
    except BaseException:
        running.cancel()
        raise
    if not running.done():
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        raise ApiError(499, "the client has gone")
    return running.result()


async def _first(work: asyncio.Future[Any], gone: Coroutine[Any, Any, None]) -> None:
    """Wait for the work or for the client to go, whichever comes first."""
    watching = asyncio.ensure_future(gone)
    try:
        await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
