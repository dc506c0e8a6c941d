"""Between a turn and the store: memories are decoded and checked, turns are committed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat.dialogue import Dialogue, Dialogues
from ..chat.messages import Message
from ..core.memory import Memory
from ..errors import MismatchError
from ..methods import Method
from ..methods.accounting import counters, say_losses
from . import transcript
from .engine.resting import rest
from .metrics import Metrics
from .settings import Settings
from .store import ConflictError, NotFoundError, Snapshot, Store, codec


def new_id(kind: str) -> str:
    """An id that cannot be guessed."""
    return f"{kind}_{secrets.token_urlsafe(24)}"


@dataclass(frozen=True)
class State:
    """A conversation as a turn begins with it.

    Attributes:
        session: its id. A new conversation and a branch get theirs by the commit.
        version: the version that the commit follows; 0 creates the session.
        memory: decoded, on the model's device, at rest (``engine.resting``).
        dialogue: how far the chat template has come.
        turns: messages so far.
        metadata: the caller's own.
        entries: transcript that the commit brings along, before the turn's own.
        aside: the request is no part of the conversation. Nothing is committed.
        drop: versions that the commit removes.
        told: what is taken in is not answered.
        back: entries that were taken back; what is taken in again keeps their marks.
        pins: what is pinned, as far as texts are kept.
    """

    session: str
    version: int
    memory: Memory
    dialogue: Dialogue = field(default_factory=Dialogue)
    turns: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    entries: tuple[dict[str, Any], ...] = ()
    aside: bool = False
    drop: tuple[int, ...] = ()
    told: bool = False
    back: tuple[dict[str, Any], ...] = ()
    pins: tuple[str, ...] = ()


class Records:
    """A store of conversations, in terms of states.

    Every method raises what the store raises: NotFoundError, ConflictError, QuotaError, StorageError,
    MemoryFileError; MismatchError for a memory of another model or adapter.
    """

    def __init__(
        self, method: Method, dialogues: Dialogues, store: Store, settings: Settings, metrics: Metrics
    ):
        self.method, self.dialogues, self.store = method, dialogues, store
        self.settings, self.metrics = settings, metrics

    # ------------------------------------------------------------------ reading

    def new(self, session: str) -> State:
        """A conversation that the commit will create."""
        return State(session, 0, self.method.empty())

    async def load(self, tenant: str, session: str, version: int | None = None, anew: bool = False) -> State:
        """A conversation as it is stored; with ``anew`` its memory is replaced by an empty one."""
        if version is None:
            snapshot = await asyncio.to_thread(self.store.latest, tenant, session)
        else:
            snapshot = await asyncio.to_thread(self.store.get, tenant, session, version)
        if snapshot is None:
            return self.new(session)
        kept = snapshot.metadata
        user, pins = dict(kept.get("user", {})), tuple(kept.get("pins", ()))
        if anew:
            return State(session, snapshot.version, self.method.empty(), metadata=user, pins=pins)
        memory, _ = await asyncio.to_thread(codec.decode, snapshot.payload)
        memory = await asyncio.to_thread(rest, self.checked(memory))
        dialogue = self.dialogues.kept(kept, memory.rows[0].seen)
        return State(session, snapshot.version, memory, dialogue, kept["stats"]["turns"], user, pins=pins)

    async def begin(
        self, tenant: str, session: str, create: bool, version: int | None, branch: bool
    ) -> State:
        """What a turn begins with; the arguments are those of :meth:`ccm.serving.service.Service.answer`."""
        if not session:
            return self.new(new_id("mem"))
        try:
            state = await self.load(tenant, session, version)
        except NotFoundError:
            if create and version is None:
                return self.new(session)
            raise
        if version is None:
            return state
        newest = await asyncio.to_thread(self.store.info, tenant, session)
        if newest.version == version and not branch:
            return state
        return await self.branched(tenant, state)

    async def branched(self, tenant: str, state: State) -> State:
        """The conversation up to this state, under a new id that the commit will create."""
        entries = await asyncio.to_thread(self.store.transcript, tenant, state.session, state.version)
        return replace(state, session=new_id("mem"), version=0, entries=tuple(entries))

    async def entries(self, tenant: str, state: State) -> list[dict[str, Any]]:
        """The transcript in the store up to this state."""
        if not state.version:
            return []
        return await asyncio.to_thread(self.store.transcript, tenant, state.session, state.version)

    def checked(self, memory: Memory) -> Memory:
        """The memory on the model's device.

        Raises:
            MismatchError: made by another model, adapter or method.
            MemoryFileError: its shapes are not the model's.
        """
        try:
            memory = self.method.admit(memory)
        except MismatchError as error:
            raise MismatchError(
                f"{error}; or rebuild it from its texts (POST /v1/memories/ID/rebuild)"
            ) from error
        self.method.reader.check_length(memory.length + 1)
        return memory

    # ------------------------------------------------------------------ counting

    def stats(self, memory: Memory, turns: int = 0) -> dict[str, int]:
        """The number of turns beside the counters of :func:`ccm.methods.accounting.counters`."""
        return {"turns": turns, **counters(memory, self.method)}

    def seen(self, memory: Memory) -> int:
        """Tokens that the memory was made of."""
        return self.stats(memory)["tokens_seen"]

    # ------------------------------------------------------------------ writing

    async def commit(
        self,
        tenant: str,
        state: State,
        memory: Memory,
        dialogue: Dialogue,
        messages: Sequence[Message],
        lengths: Sequence[int],
        answer: dict[str, Any] | None = None,
    ) -> State:
        """Make a turn durable.

        Args:
            tenant: whose conversation.
            state: what the turn began with.
            memory, dialogue: what it ended with.
            messages: what was taken in.
            lengths: tokens of each message.
            answer: marks of the last message, if that is a new answer.

        Returns:
            the conversation after the turn.
        """
        say_losses(state.memory, memory, self.method)
        texts = self.settings.texts
        told = {transcript.TOLD: True} if state.told else {}
        marks = [told | mark for mark in transcript.marks(messages, state.back)]
        if answer is not None:
            marks[-1] = answer
        notes = (
            transcript.note(message, tokens, texts, mark)
            for message, tokens, mark in zip(messages, lengths, marks, strict=True)
        )
        turns, entries = state.turns + len(messages), (*state.entries, *notes)
        state = replace(state, memory=memory, dialogue=dialogue, turns=turns, entries=entries)
        if not state.version:
            return replace(state, version=await self.create(tenant, state))
        snapshot = await asyncio.to_thread(self._snapshot, state)
        return replace(state, version=await self._store(tenant, state, snapshot))

    async def create(self, tenant: str, state: State) -> int:
        """Create a conversation and commit its first version. Returns the version."""
        snapshot = await asyncio.to_thread(self._snapshot, state)
        try:
            await asyncio.to_thread(self.store.create, tenant, state.session)
        except ConflictError:
            # a server that was killed between the two steps leaves a conversation without a version
            if (await asyncio.to_thread(self.store.info, tenant, state.session)).version:
                raise
        return await self._store(tenant, state, snapshot)

    async def _store(self, tenant: str, state: State, snapshot: Snapshot) -> int:
        began = time.monotonic()
        try:
            stored = await asyncio.to_thread(
                self.store.commit, tenant, state.session, state.version, snapshot, state.entries, state.drop
            )
        except ConflictError:
            self.metrics.conflicts.inc()
            raise
        self.metrics.commits.observe(time.monotonic() - began)
        self.metrics.stored.inc(len(snapshot.payload))
        return stored.version

    def _snapshot(self, state: State) -> Snapshot:
        means = [self.method.means(row.steps) for row in state.memory.rows]
        payload, encoded = codec.encode(state.memory, self.settings.precision, means)
        stats = self.stats(state.memory, state.turns)
        kept = {**encoded, "adapter": self.settings.adapter, "user": state.metadata, "stats": stats}
        kept["dialogue"] = state.dialogue.as_dict()
        kept["pins"] = state.pins if self.settings.texts else ()
        return Snapshot(payload, kept, cuts=codec.cuts(payload))
