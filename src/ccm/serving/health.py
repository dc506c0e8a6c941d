"""Whether a server can take turns, and what it clears away from time to time."""

from __future__ import annotations

import asyncio
import logging
import time

from ..errors import CCMError
from .engine import Engine
from .metrics import Metrics
from .running import Running
from .store import Store

log = logging.getLogger(__name__)

#: Seconds of silence after which the model's thread counts as hung; a step takes far less.
SILENCE = 60.0
#: Seconds for which a look at the store's health holds. Everybody may ask, and a look writes.
FRESH = 1.0


class Health:
    """The health of an engine and a store."""

    def __init__(self, engine: Engine, store: Store, running: Running, metrics: Metrics):
        self._engine, self._store, self._running, self._metrics = engine, store, running, metrics
        self._looking = asyncio.Lock()
        self._looked: tuple[float, bool] | None = None  # when at the store, and whether it was well

    async def ready(self) -> list[str]:
        """Why no turn should be sent here; empty if there is no reason."""
        reasons = ["the server is about to stop"] if self._running.stopping else []
        if (silent := self._engine.idle_seconds()) > SILENCE:
            reasons.append(f"the model's thread has been silent for {silent:.0f} s")
        if not await self._store_is_well():
            reasons.append("the store cannot be written; the log says why")
        return reasons

    async def _store_is_well(self) -> bool:
        async with self._looking:
            if self._looked is None or time.monotonic() - self._looked[0] > FRESH:
                try:
                    await asyncio.to_thread(self._store.check_health)
                    well = True
                except Exception as error:  # whatever it is, it is no health
                    log.warning("the store cannot be written: %s", error)
                    well = False
                self._looked = time.monotonic(), well
            return self._looked[1]

    async def tend(self, every: float = 600) -> None:
        """Remove expired conversations from time to time, until cancelled."""
        while True:
            try:
                self._metrics.expired.inc(await asyncio.to_thread(self._store.purge))
            except CCMError as error:  # the next round tries again
                log.warning("expired conversations were not removed: %s", error)
            await asyncio.sleep(every)
