"""The life of conversations: created, shown, forked, exported, imported, rebuilt, deleted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..chat.messages import Message
from ..core.memory import Memory
from ..errors import ConfigError, MemoryFileError
from ..methods.inside import Inside, Said, look, saved_pins
from ..methods.saved import metadata_of
from . import resends, transcript
from .engine import Engine, EngineError, Job, Result
from .records import Records, State, new_id
from .rendering import render
from .running import Running
from .store import Info, NotFoundError
from .transcript import Entry
from .turn import Outcome, Turn


@dataclass(frozen=True)
class View:
    """A conversation from outside.

    Attributes:
        session: its id.
        version: the newest version.
        created, updated, expires: seconds since the epoch; None: it does not expire.
        stored_nbytes: bytes in the store.
        metadata: the caller's own.
        pins: what is pinned, as far as texts are kept.
        stats: the number of turns beside the counters of :func:`ccm.methods.accounting.counters`.
        precision: type of the stored memory.
        error: relative error of the stored keys and values, by the precision.
        adapter, fingerprint: of model and adapter that made the memory.
    """

    session: str
    version: int
    created: float
    updated: float
    expires: float | None
    stored_nbytes: int
    metadata: dict[str, str]
    pins: list[str]
    stats: dict[str, int]
    precision: str
    error: dict[str, float]
    adapter: str
    fingerprint: str


class Conversations:
    """Many tenants' conversations, without answers.

    Every method raises what the store raises: NotFoundError, ConflictError, QuotaError, StorageError,
    MemoryFileError; MismatchError for a memory of another model or adapter.

    Args:
        records: where they are kept.
        engine: that takes in messages.
        running: the turns of this server.
    """

    def __init__(self, records: Records, engine: Engine, running: Running):
        self.records, self.engine, self.running = records, engine, running
        self.store, self.settings = records.store, records.settings

    async def create(
        self,
        tenant: str,
        session: str | None = None,
        *,
        metadata: dict[str, str] | None = None,
        messages: Sequence[Message] = (),
    ) -> View:
        """Begin a conversation, and take in messages if there are any."""
        state = replace(self.records.new(session or new_id("conv")), metadata=metadata or {})
        await self.records.create(tenant, state)
        if messages:
            return await self.append(tenant, state.session, messages)
        return await self.view(tenant, state.session)

    async def view(self, tenant: str, session: str) -> View:
        """A conversation from outside."""
        info, newest = await asyncio.gather(
            asyncio.to_thread(self.store.info, tenant, session),
            asyncio.to_thread(self.store.latest, tenant, session),
        )
        kept = newest.metadata if newest else {}
        return View(
            session=session,
            version=newest.version if newest else 0,
            created=info.created,
            updated=info.updated,
            expires=info.expires,
            stored_nbytes=info.nbytes,
            metadata=dict(kept.get("user", {})),
            pins=list(kept.get("pins", ())),
            stats=dict(kept.get("stats") or self.records.stats(self.records.method.empty())),
            precision=kept.get("dtype", self.settings.precision),
            error=dict(kept.get("error") or {"keys": 0.0, "values": 0.0}),
            adapter=kept.get("adapter", self.settings.adapter),
            fingerprint=kept.get("fingerprint", self.records.method.fingerprint()),
        )

    async def timeline(self, tenant: str, session: str) -> list[Entry]:
        """The turns of a conversation, oldest first."""
        view = await self.view(tenant, session)
        entries = await asyncio.to_thread(self.store.transcript, tenant, session, view.version)
        return transcript.timeline(entries, view.stats["tokens_folded"])

    async def sessions(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Info]:
        """One page of a tenant's conversations, ordered by id."""
        return await asyncio.to_thread(self.store.sessions, tenant, after, limit)

    async def labels(
        self, tenant: str, after: str | None = None, limit: int = 100
    ) -> dict[str, dict[str, str]]:
        """The caller's metadata of the conversations on that page of :meth:`sessions`, by id."""
        kept = await asyncio.to_thread(self.store.labels, tenant, after, limit)
        return {session: dict(label.get("user", {})) for session, label in kept.items()}

    async def inside(self, tenant: str, session: str) -> Inside:
        """Which turns each entry of the memory stands for."""
        state = await self.records.load(tenant, session)
        entries = transcript.current(await self.records.entries(tenant, state))
        method = self.records.method
        (row,) = method.recall(state.memory).rows
        return look(method, row, _turns(entries), pins=state.pins)

    async def reading(self, tenant: str, session: str) -> Inside:
        """Which entries the newest answer read: the memory from before it, and one pass of the model over both.

        Raises:
            ConfigError: there is no answer, it says nothing, or its text was not kept.
            ConflictError: no version from before it is kept, and the texts to make one anew are not there.
            OverloadedError: too many turns are waiting.
        """
        self.running.check()
        state = await self.records.load(tenant, session)
        entries = await self.records.entries(tenant, state)
        known = transcript.current(entries)
        answers = [i for i, entry in enumerate(known) if entry["role"] == "assistant"]
        answer = transcript.said(known[answers[-1]]) if answers else None
        if answer is None:
            raise ConfigError("there is no answer here whose text was kept: ask something first")
        template, method = self.records.dialogues.template, self.records.method
        ids = tuple(await asyncio.to_thread(template.encode, answer.content))
        if not ids:
            raise ConfigError("the newest answer says nothing: ask something else")
        base, again = await resends.rewound(self.records, tenant, state, entries, answers[-1])
        rendering = await asyncio.to_thread(render, self.records, base, again, True)
        results: list[Result] = []

        async def done(result: Result) -> Outcome:
            results.append(result)
            return Outcome("", "stop", 0, 0, 0)

        job = Job(base.memory, rendering.segments, rendering.head, answer=ids)
        await Turn(self.engine, job, done, self.running.count()).finish()
        found = results[0].reading
        if found is None:
            raise EngineError("the engine was told to stop before the answer was read: ask again")
        return look(method, found.row, _turns(known[: answers[-1]]), found, answer.content, state.pins)

    async def update(self, tenant: str, session: str, metadata: dict[str, str]) -> View:
        """Put the caller's metadata in place of the old."""
        with self.running.alone(tenant, session):
            newest = await asyncio.to_thread(self.store.latest, tenant, session)
            if newest is None:  # made by another program: there is no version to keep metadata with
                raise NotFoundError(f"session {session!r} has no memory yet: append something first")
            changed = replace(newest, metadata={**newest.metadata, "user": metadata})
            await asyncio.to_thread(self.store.commit, tenant, session, newest.version, changed)
        return await self.view(tenant, session)

    async def delete(self, tenant: str, session: str) -> None:
        """Forget a conversation, for good."""
        with self.running.alone(tenant, session):
            await asyncio.to_thread(self.store.delete, tenant, session)

    async def append(self, tenant: str, session: str, messages: Sequence[Message]) -> View:
        """Take in messages without an answer.

        Raises:
            BusyError: a turn of this conversation is running.
        """
        self.running.check()
        with self.running.alone(tenant, session):
            state = await self.records.load(tenant, session)
            await self._take_in(tenant, replace(state, told=True), messages)
        return await self.view(tenant, session)

    async def pin(self, tenant: str, session: str, text: str) -> View:
        """Keep a text in front of everything, word for word and for good (``Method.pin``).

        Raises:
            ConfigError: empty text, or one that does not fit the model's context beside the memory.
            BusyError: a turn of this conversation is running.
        """
        self.running.check()
        with self.running.alone(tenant, session):
            state = await self.records.load(tenant, session)
            ids = await asyncio.to_thread(self.records.dialogues.alone, text)

            async def commit(result: Result) -> Outcome:
                after = replace(state, pins=(*state.pins, text))
                await self.records.commit(tenant, after, result.memory, state.dialogue, (), ())
                return Outcome("", "stop", 0, 0, 0)

            job = Job(state.memory, pins=(ids,))
            await Turn(self.engine, job, commit, self.running.count()).finish()
        return await self.view(tenant, session)

    async def fork(
        self, tenant: str, session: str, new: str | None = None, version: int | None = None
    ) -> View:
        """An independent copy of the newest version, or of another one that is still kept."""
        made = await asyncio.to_thread(self.store.fork, tenant, session, new, version)
        return await self.view(tenant, made)

    async def export(self, tenant: str, session: str) -> bytes:
        """The conversation as a session file (``Session.load``)."""
        state = await self.records.load(tenant, session)
        entries = transcript.current(await self.records.entries(tenant, state))
        metadata = metadata_of(self.records.method, state.turns, state.dialogue, _turns(entries), state.pins)
        return await asyncio.to_thread(state.memory.dumps, metadata)

    async def load(self, tenant: str, data: bytes, session: str | None = None) -> View:
        """A new conversation from a session file. The file has no texts, so the conversation has none either.

        Raises:
            MemoryFileError: damaged, of another format, or shapes that are not the model's.
            MismatchError: made by another model or adapter.
        """
        memory, metadata = await asyncio.to_thread(Memory.loads, data)
        try:
            kept = json.loads(metadata.get("session", "{}"))
            turns = kept.get("turns", 0)
            dialogue, pins = self.records.dialogues.kept(kept, memory.rows[0].seen), saved_pins(kept)
        except (ValueError, AttributeError, KeyError, TypeError, ConfigError) as error:
            raise MemoryFileError(f"the file's session is not readable ({error})") from error
        if not isinstance(turns, int) or not 0 <= turns < 1 << 53:
            raise MemoryFileError(f"the file claims {str(turns)[:20]!r} turns, expected a count")
        state = State(session or new_id("conv"), 0, self.records.checked(memory), dialogue, turns, pins=pins)
        await self.records.create(tenant, state)
        return await self.view(tenant, state.session)

    async def rebuild(self, tenant: str, session: str) -> View:
        """Make the memory anew from the stored texts, with the model and adapter of this server.

        Raises:
            ConfigError: no texts are stored, or nothing was said.
        """
        self.running.check()
        with self.running.alone(tenant, session):
            state = await self.records.load(tenant, session, anew=True)
            entries = await asyncio.to_thread(self.store.transcript, tenant, session)
            told = transcript.current(entries)
            reset = replace(state, entries=(transcript.RESET,), back=tuple(told))
            await self._take_in(tenant, reset, _texts(told))
        return await self.view(tenant, session)

    async def compact(
        self, tenant: str, messages: Sequence[Message], session: str | None = None, version: int | None = None
    ) -> tuple[View, int]:
        """A new conversation that takes in these messages. With ``session`` it begins as a copy of that one.

        Returns:
            the new conversation, and the number of tokens taken in.
        """
        self.running.check()
        if session is None:
            state = self.records.new(new_id("mem"))
        else:
            known = await self.records.load(tenant, session, version)
            state = await self.records.branched(tenant, known)
        await self._take_in(tenant, state, messages)
        view = await self.view(tenant, state.session)
        return view, view.stats["tokens_seen"] - self.records.seen(state.memory)

    async def _take_in(self, tenant: str, state: State, messages: Sequence[Message]) -> None:
        """Fold messages and commit."""
        rendering = await asyncio.to_thread(render, self.records, state, messages)

        async def commit(result: Result) -> Outcome:
            dialogue, lengths = rendering.dialogue, rendering.lengths
            await self.records.commit(tenant, state, result.memory, dialogue, messages, lengths)
            return Outcome("", "stop", 0, 0, 0)

        alone = self.records.dialogues.alone
        pins = tuple(map(alone, () if state.memory.rows[0].pinned else state.pins))  # to be read anew
        job = Job(state.memory, rendering.segments, pins=pins)
        await Turn(self.engine, job, commit, self.running.count()).finish()


def _turns(entries: Sequence[dict[str, Any]]) -> list[Said]:
    return [Said(entry["role"], entry.get("content"), entry["tokens"]) for entry in entries]


def _texts(entries: Sequence[dict[str, Any]]) -> list[Message]:
    if not entries:
        raise ConfigError("nothing was said in this conversation: there is nothing to rebuild")
    texts = transcript.texts(entries)
    if texts is None:
        raise ConfigError("the texts of this conversation were not kept: it cannot be rebuilt")
    return texts
