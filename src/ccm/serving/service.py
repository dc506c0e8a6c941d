"""Conversations over an engine and a store: the server without HTTP.

    turn    = load memory -> render what is new -> engine -> commit memory and transcript -> outcome

A turn happens as a whole or not at all: its commit is one compare-and-swap, made when the answer is complete and
taken in, and nobody is told of the end before. One turn runs at a time in a conversation.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..accounting import counters
from ..answers import AnswerReader
from ..dialogue import Dialogue, Dialogues
from ..errors import CCMError, ConfigError, MemoryFileError, MismatchError, UnknownNameError
from ..memory import Memory
from ..messages import Message, ToolCall
from ..methods import Method
from ..session import resumed, say_losses
from ..storage.fingerprint import base_name
from ..template import template_of
from . import history
from .engine import (
    Engine,
    Event,
    Job,
    Kept,
    PaddedEngine,
    Result,
    Sampling,
    StoppingError,
)
from .history import Entry
from .metrics import Metrics
from .rendering import Rendering
from .store import ConflictError, Info, NotFoundError, Snapshot, Store, codec

__all__ = ["BusyError", "Entry", "Message", "Outcome", "Sampling", "Service", "Settings", "Turn", "View"]

log = logging.getLogger(__name__)

#: Seconds of silence after which the model's thread counts as hung; a step takes far less.
SILENCE = 60.0
#: What becomes of a turn whose client goes away.
DISCONNECT = ("drop", "keep", "finish")
#: Seconds for which a look at the store's health holds: everybody may ask, and it writes.
FRESH = 1.0
#: More characters per token than any text has; a longer one is refused before it is tokenized, which takes seconds.
CHARACTERS = 16
#: What may be done with a history that differs from the known one.
RESENDS = ("match", "refuse", "rebuild")


def new_id(kind: str) -> str:
    """An id that cannot be guessed."""
    return f"{kind}_{secrets.token_urlsafe(24)}"


class BusyError(ConflictError):
    """Another turn of this conversation is running."""


@dataclass(frozen=True)
class Settings:
    """How a service keeps conversations.

    Attributes:
        adapter: name of the adapter, as clients see it.
        texts: keep what was said beside the memory, so that it can be shown, and memories be rebuilt by another
            adapter; otherwise digests alone.
        resend: what to do with a history that differs from the known one: "match" what is known of it, giving up
            what the client has visibly taken back, and refuse the rest; "refuse" whatever would give up anything; or
            "rebuild": as "match", but where nothing matches the memory is made anew.
        precision: how memories are stored: float32, bfloat16 or int8.
        input_tokens: tokens that one request may bring at most.
        disconnect: what becomes of a turn whose client goes away: "drop" it; "keep" what was said by then, and the
            message of the user; "finish" it without the client.
    """

    adapter: str
    texts: bool = True
    resend: str = "match"
    precision: str = "float32"
    input_tokens: int = 1 << 16
    disconnect: str = "drop"

    def __post_init__(self) -> None:
        if self.resend not in RESENDS:
            raise UnknownNameError("resend", self.resend, list(RESENDS))
        if self.precision not in codec.DTYPES:
            raise UnknownNameError("precision", self.precision, list(codec.DTYPES))
        if self.disconnect not in DISCONNECT:
            raise UnknownNameError("disconnect", self.disconnect, list(DISCONNECT))


@dataclass(frozen=True)
class View:
    """A conversation from outside.

    Attributes:
        session: its id.
        version: the newest.
        created, updated, expires: seconds since the epoch; None: it does not expire.
        stored_nbytes: what it takes in the store.
        metadata: the caller's own.
        stats: turns, and what :func:`ccm.accounting.counters` gives.
        precision: in which the memory is stored.
        error: relative, of the stored keys and values against those that were stored.
        adapter, fingerprint: of model and adapter that made the memory.
    """

    session: str
    version: int
    created: float
    updated: float
    expires: float | None
    stored_nbytes: int
    metadata: dict[str, str]
    stats: dict[str, int]
    precision: str
    error: dict[str, float]
    adapter: str
    fingerprint: str


@dataclass(frozen=True)
class Taken:
    """How a request was understood, in numbers of messages.

    Attributes:
        matched: of the request, that the memory held.
        appended: of the request, that were taken in.
        rewound: that the memory held and does not hold any more.
        rebuilt: that were read again, as no version of their place is kept, or as the memory was made anew.
        system: of the request's system text, what :class:`~ccm.serving.history.Plan` says.
        ephemeral: nothing of the request was kept.
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
        finish_reason: "stop", "length" or "tool_calls".
        prompt_tokens: all that the answer depends on.
        known_tokens: of these, those that the memory held before the request.
        completion_tokens: of the answer.
        reasoning: thoughts of the answer, apart from its text.
        tool_calls: that it asks for.
        session, version, stats: of the conversation; None and 0 for a stateless answer.
        reasoning_tokens: of completion_tokens, those of its thoughts.
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


@dataclass(frozen=True)
class _Held:
    """A conversation as a turn begins with it.

    Attributes:
        session: its id; for a branch and a new one, of what the commit will create.
        version: that the commit follows on; 0 creates the session.
        memory: decoded, on the model's device.
        dialogue: how far it has come.
        turns: so far.
        metadata: the caller's own.
        entries: a transcript that the commit has to bring along.
        aside: what is asked is no part of the conversation: nothing is committed.
        drop: versions that need not be kept once it is committed.
        told: what is taken in is not answered.
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


class Turn:
    """An answer on its way: an async iterator of pieces of text. When it ends, the turn is committed.

    Pieces that the model thinks and does not say are of type :class:`~ccm.messages.Thought`.

    Attributes:
        session, version: of the conversation once the turn is committed; None and 0 for a stateless answer.
        taken: how the request was understood.
        outcome: set at the end.

    Raises (while iterating):
        EngineError, ConfigError: no answer; nothing was committed.
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
        # a caller who goes away now does not stop the commit, and the conversation is busy until it is made
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
        """Nobody listens any more: of a turn that has not ended becomes what was chosen (see :class:`Settings`)."""
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

    def hurry(self) -> None:
        """End the answer soon, and keep what is written by then."""
        self._ticket.finish()

    async def _end_alone(self) -> None:
        try:
            async for _ in self:
                pass
        except CCMError as error:
            log.warning("a turn whose client had gone was not kept: %s", error)
        finally:
            self._left.discard(self)


class Service:
    """Many tenants' conversations on one model.

    Every method raises what the store raises: NotFoundError, ConflictError, QuotaError, StorageError,
    MemoryFileError; MismatchError for a memory of another model or adapter.

    Args:
        method: how conversations are kept, bound to a model; the service's engine has it for itself.
        tokenizer: of the model.
        store: where memories live.
        settings: how.
        engine: who runs the model; by default a :class:`~ccm.serving.engine.PaddedEngine`.
        metrics: where it counts.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Any,
        store: Store,
        settings: Settings,
        engine: Engine | None = None,
        metrics: Metrics | None = None,
    ):
        self.method, self.tokenizer, self.store, self.settings = method, tokenizer, store, settings
        self.metrics = metrics or Metrics()
        self.engine = engine or PaddedEngine(method, tokenizer, metrics=self.metrics)
        self.name = f"{base_name(method.reader.model)}+{settings.adapter}"
        self.created = int(time.time())
        self._busy: set[tuple[str, str]] = set()
        self._turns = 0
        self._left: set[Turn] = set()  # that end without their clients
        self._draining = False
        self._health: tuple[float, bool] | None = (
            None  # when the store was looked at, and whether it was well
        )
        self._looking = asyncio.Lock()
        self.template = template_of(tokenizer)
        self.dialogues = Dialogues(self.template)

    # ------------------------------------------------------------------ conversations

    async def create(
        self,
        tenant: str,
        session: str | None = None,
        *,
        metadata: dict[str, str] | None = None,
        messages: Sequence[Message] = (),
    ) -> View:
        """Begin a conversation, with messages that are taken in if there are any."""
        new = await self._make(tenant, session, metadata or {}, self.method.empty(), 0, (), Dialogue())
        return await self.append(tenant, new, messages) if messages else await self.view(tenant, new)

    async def view(self, tenant: str, session: str) -> View:
        """A conversation's memory, times and sizes."""
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
            stats=dict(kept.get("stats") or self._stats(self.method.empty(), 0)),
            precision=kept.get("dtype", self.settings.precision),
            error=dict(kept.get("error") or {"keys": 0.0, "values": 0.0}),
            adapter=kept.get("adapter", self.settings.adapter),
            fingerprint=kept.get("fingerprint", self.method.fingerprint()),
        )

    async def timeline(self, tenant: str, session: str) -> list[Entry]:
        """The turns of a conversation, oldest first."""
        view = await self.view(tenant, session)
        entries = await asyncio.to_thread(self.store.transcript, tenant, session, view.version)
        return history.timeline(entries, view.stats["tokens_folded"])

    async def sessions(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Info]:
        """One page of a tenant's conversations, ordered by id."""
        return await asyncio.to_thread(self.store.sessions, tenant, after, limit)

    async def update(self, tenant: str, session: str, metadata: dict[str, str]) -> View:
        """Put the caller's metadata in place of the old."""
        with self._alone(tenant, session):
            newest = await asyncio.to_thread(self.store.latest, tenant, session)
            if newest is None:  # made by another program; it has no memory to keep it with
                raise NotFoundError(f"session {session!r} has no memory yet: append something first")
            changed = replace(newest, metadata={**newest.metadata, "user": metadata})
            await asyncio.to_thread(self.store.commit, tenant, session, newest.version, changed)
        return await self.view(tenant, session)

    async def delete(self, tenant: str, session: str) -> None:
        """Forget a conversation, for good."""
        with self._alone(tenant, session):
            await asyncio.to_thread(self.store.delete, tenant, session)

    async def append(self, tenant: str, session: str, messages: Sequence[Message]) -> View:
        """Take in messages without an answer.

        Raises:
            BusyError: a turn of this conversation is running.
        """
        self._open()
        with self._alone(tenant, session):
            held = await self._load(tenant, session)
            await self._take_in(tenant, replace(held, told=True), messages)
        return await self.view(tenant, session)

    async def fork(
        self, tenant: str, session: str, new: str | None = None, version: int | None = None
    ) -> View:
        """A copy that goes its own way, of the newest version or of another one that is still kept."""
        made = await asyncio.to_thread(self.store.fork, tenant, session, new, version)
        return await self.view(tenant, made)

    async def export(self, tenant: str, session: str) -> bytes:
        """The conversation as a session file (``Session.load``)."""
        held = await self._load(tenant, session)
        state = {
            "budget": self.method.sizes(),
            "turns": held.turns,
            "dialogue": held.dialogue.as_dict(),
        }
        return await asyncio.to_thread(held.memory.dumps, {"session": json.dumps(state)})

    async def load(self, tenant: str, data: bytes, session: str | None = None) -> View:
        """A new conversation from a session file; what was said is not in it.

        Raises:
            MemoryFileError: damaged, of another format, or a memory that cannot be.
            MismatchError: made by another model or adapter.
        """
        memory, metadata = await asyncio.to_thread(Memory.loads, data)
        try:
            state = json.loads(metadata.get("session", "{}"))
            turns = state.get("turns", 0)
            dialogue = resumed(self.dialogues, state, memory)
        except (ValueError, AttributeError, KeyError, TypeError, ConfigError) as error:
            raise MemoryFileError(f"the file's session is not readable ({error})") from error
        if not isinstance(turns, int) or not 0 <= turns < 1 << 53:
            raise MemoryFileError(f"the file claims {str(turns)[:20]!r} turns, expected a count")
        made = await self._make(tenant, session, {}, self._checked(memory), turns, (), dialogue)
        return await self.view(tenant, made)

    async def rebuild(self, tenant: str, session: str) -> View:
        """Make the memory anew from the texts that were kept, with the model and adapter at hand.

        Raises:
            ConfigError: texts were not kept, or nothing was said.
        """
        self._open()
        with self._alone(tenant, session):
            held = await self._load(tenant, session, anew=True)
            entries = await asyncio.to_thread(self.store.transcript, tenant, session)
            messages = self._texts(history.current(entries))
            await self._take_in(tenant, replace(held, entries=(history.RESET,)), messages)
        return await self.view(tenant, session)

    async def compact(
        self, tenant: str, messages: Sequence[Message], session: str | None = None, version: int | None = None
    ) -> tuple[View, int]:
        """A new conversation that has taken in these messages, behind a version of another one if given.

        Returns:
            the new conversation, and the number of tokens taken in.
        """
        self._open()
        if session is None:
            held = self._new()
        else:
            held = await self._load(tenant, session, version=version)
            entries = await asyncio.to_thread(self.store.transcript, tenant, session, held.version)
            held = replace(held, session=new_id("mem"), version=0, entries=tuple(entries))
        made = await self._take_in(tenant, held, messages)
        view = await self.view(tenant, made)
        return view, view.stats["tokens_seen"] - self._stats(held.memory, 0)["tokens_seen"]

    # ------------------------------------------------------------------ answers

    async def answer(
        self,
        tenant: str,
        session: str | None,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        create: bool = False,
        resent: bool = False,
        version: int | None = None,
        branch: bool = False,
        instructions: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
        disconnect: str | None = None,
        resend: str | None = None,
        aside: bool | None = None,
    ) -> Turn:
        """Begin to answer.

        Args:
            tenant: who asks.
            session: which conversation; None answers from the messages alone and keeps nothing.
            messages: what is new; the answer follows the last one.
            sampling: of the answer.
            create: begin the conversation if it is not there, or, with session "", one with a new id.
            resent: the messages may repeat what the conversation knows, see :func:`ccm.serving.history.plan`.
            version: go on from this version; if it is not the newest, in a branch with a new id.
            branch: go on from that version in a branch in any case.
            instructions: a system message of which what is new is taken in first.
            tools: that the model may call, in the form of chat templates.
            disconnect: what becomes of the turn if its client goes away; None is what the settings say. Without a
                conversation there is nothing to keep.
            resend: what to do with a history that differs, in place of the settings'.
            aside: what is asked is no part of the conversation, such as a title for it: it is answered from memory
                and messages, and not kept. None: if a client is known for such requests.

        Raises:
            ConfigError: nothing to answer, or more than the model's context can hold.
            ConflictError: the messages tell another history than the conversation's, or take back what cannot be.
            BusyError: a turn of this conversation is running.
            OverloadedError: too many turns are waiting.
            StoppingError: the server is about to stop.
        """
        self._open()
        if not messages:
            raise ConfigError("messages: got none, expected at least one to answer")
        if sampling.schema is not None:
            await asyncio.to_thread(self.engine.check, sampling)
        if session is None:
            system = [] if instructions is None else [Message("system", instructions)]
            return await self._stateless([*system, *messages], sampling, tools)
        if aside is None:
            aside = resent and history.is_task(messages)
        alone = self._alone(tenant, session) if session and version is None and not aside else _Nothing()
        try:
            alone.__enter__()
            held = await self._begin(tenant, session, create, version, branch)
            if aside:
                if not held.version:
                    return await self._stateless(messages, sampling, tools)
                held = replace(held, aside=True)
            if version is not None and held.version:
                alone = self._alone(tenant, session)
                alone.__enter__()
            taken = Taken(appended=len(messages))
            if resent:
                held, messages, taken = await self._compare(
                    tenant, held, messages, resend or self.settings.resend
                )
            if instructions is not None:
                text, word = await self._instructions(tenant, held, instructions)
                messages = [*text, *messages]
                taken = replace(taken, matched=1 - len(text), appended=len(messages), system=word)
            disconnect = "drop" if aside else disconnect or self.settings.disconnect
            turn = await self._turn(tenant, held, messages, sampling, alone.release, tools, disconnect)
            turn.taken = taken
            return turn
        except BaseException:
            alone.release()
            raise

    async def _stateless(
        self, messages: Sequence[Message], sampling: Sampling, tools: Sequence[dict[str, Any]]
    ) -> Turn:
        rendering = await asyncio.to_thread(self._rendered, self._new(), messages, True, tools)
        prompt = (*(token for segment in rendering.segments for token in segment), *rendering.head)

        async def outcome(result: Result) -> Outcome:
            return self._outcome(result, rendering, len(prompt), 0)

        job = Job(self.method.empty(), prompt=prompt, sampling=sampling)
        return Turn(self.engine, job, outcome, self._count(), reader=self._reader(rendering))

    async def _turn(
        self,
        tenant: str,
        held: _Held,
        messages: Sequence[Message],
        sampling: Sampling,
        release: Callable[[], None],
        tools: Sequence[dict[str, Any]] = (),
        disconnect: str = "drop",
    ) -> Turn:
        rendering = await asyncio.to_thread(self._rendered, held, messages, True, tools)
        if not held.aside:
            await asyncio.to_thread(rendering.check_answer)
        known = self._stats(held.memory, 0)["tokens_seen"]
        prompt = known + rendering.tokens + len(rendering.head)

        def remember(text: str) -> Kept:
            return rendering.remember(self._answer(rendering, text))[0]

        async def commit(result: Result) -> Outcome:
            if held.aside:
                outcome = self._outcome(result, rendering, prompt, known)
                stats = self._stats(held.memory, held.turns)
                return replace(outcome, session=held.session, version=held.version, stats=stats)
            answer = self._answer(rendering, result.text)
            dialogue = rendering.remember(answer)[1]
            taken = self._stats(result.memory, 0)["tokens_seen"] - known - sum(rendering.lengths)
            said, lengths = [*messages, answer], [*rendering.lengths, taken]
            session, version, stats = await self._commit(tenant, held, result.memory, dialogue, said, lengths)
            outcome = self._outcome(result, rendering, prompt, known)
            return replace(outcome, session=session, version=version, stats=stats)

        job = Job(
            held.memory,
            segments=rendering.segments,
            prompt=rendering.head,
            sampling=sampling,
            remember=None if held.aside else remember,
        )
        done = self._count()

        def both() -> None:
            done()
            release()

        reader = self._reader(rendering)
        place = held.session, held.version + (not held.aside)
        return Turn(self.engine, job, commit, both, *place, reader, disconnect, self._left)

    def _reader(self, rendering: Rendering) -> AnswerReader:
        return AnswerReader(self.template, rendering.head, rendering.tools)

    def _answer(self, rendering: Rendering, text: str) -> Message:
        """The answer as it is remembered: clients send it back without its thoughts."""
        return rendering.read(text).message().without_thoughts()

    def _outcome(self, result: Result, rendering: Rendering, prompt: int, known: int) -> Outcome:
        answer = rendering.read(result.text)
        finish = "tool_calls" if answer.tool_calls else result.finish_reason
        thought = (
            len(self.tokenizer.encode(answer.reasoning, add_special_tokens=False)) if answer.reasoning else 0
        )
        return Outcome(
            answer.content,
            finish,
            prompt,
            known,
            result.tokens,
            reasoning=answer.reasoning,
            tool_calls=answer.tool_calls,
            reasoning_tokens=min(thought, result.tokens),
        )

    async def _compare(
        self, tenant: str, held: _Held, messages: Sequence[Message], resend: str
    ) -> tuple[_Held, Sequence[Message], Taken]:
        """What is to be read of messages that may repeat the conversation, the memory they go on from, and a report.

        Raises:
            ConflictError: the messages tell another history, or take back what cannot or must not be taken back.
            ConfigError: the messages end with an answer that is known.
        """
        entries: list[dict[str, Any]] = []
        if held.version:
            entries = await asyncio.to_thread(self.store.transcript, tenant, held.session, held.version)
        known = history.current(entries)
        plan = await asyncio.to_thread(
            history.plan, entries, messages, held.turns > len(known), resend != "refuse"
        )
        if held.aside:
            taken = Taken(0 if plan is None else plan.matched, ephemeral=True)
            return held, messages if plan is None else plan.append, taken
        if plan is None and resend == "rebuild":
            nothing = self.method.empty()
            empty = replace(held, memory=nothing, dialogue=Dialogue(), turns=0, entries=(history.RESET,))
            return empty, messages, Taken(rewound=len(known), rebuilt=len(messages))
        if plan is None:
            raise ConflictError(
                f"these {len(messages)} messages tell another history than the {len(known)} that the conversation "
                "knows: send what is new alone, fork an earlier version, name a new conversation, or ask for its "
                "memory to be made anew (X-CCM-Resend: rebuild)",
                held.version,
            )
        if not plan.append and messages[-1].role not in ("user", "tool"):
            raise ConfigError("the conversation knows all of these messages: add one to answer")
        append, system = await self._sayable(held.dialogue, plan.append, plan.system, plan.keep)
        lost, again = len(known) - plan.keep, list[Message]()
        if lost and resend == "refuse":
            raise ConflictError(
                f"these {len(messages)} messages take back {lost} of the {len(known)} that the conversation knows: "
                "send what is new alone, or allow it (X-CCM-Resend: match)",
                held.version,
            )
        if lost:
            held, again = await self._rewound(tenant, held, entries, plan.keep, messages)
        return held, [*again, *append], Taken(plan.matched, len(append), lost, len(again), system)

    async def _rewound(
        self,
        tenant: str,
        held: _Held,
        entries: Sequence[dict[str, Any]],
        keep: int,
        messages: Sequence[Message],
    ) -> tuple[_Held, list[Message]]:
        """The memory of the newest version that knows the first ``keep`` messages at most, and those it lacks.

        They are read again, from the texts that were kept or from the request.

        Raises:
            ConflictError: some are in neither.
        """
        kept = await asyncio.to_thread(self.store.versions, tenant, held.session)
        reset = max((i for i, entry in enumerate(entries) if entry == history.RESET), default=-1)
        versions = [v for v, count in kept.items() if v <= held.version and count > reset]
        places, *before = history.standing(entries, [kept[v] for v in versions])
        found = [
            (len(then), version)
            for version, then in zip(versions, before, strict=True)
            if len(then) <= keep and then == places[: len(then)]
        ]
        first, version = max(found, default=(0, 0))
        memory, dialogue, turns = self.method.empty(), Dialogue(), 0
        if found:
            try:
                base = await self._load(tenant, held.session, version=version)
            except NotFoundError as error:  # another server has committed meanwhile
                raise ConflictError(f"{error}; send this again", held.version) from error
            memory, dialogue, turns = base.memory, base.dialogue, base.turns
        again = history.texts([entries[i] for i in places[first:keep]], messages)
        if again is None or (not found and held.turns > len(places)):
            raise ConflictError(
                f"these {len(messages)} messages take back {len(places) - keep} of the {len(places)} that the "
                "conversation knows, and no version from before is kept: send what is new alone, or name a new "
                "conversation",
                held.version,
            )
        # those that know what is taken back are in the way of others; the newest stays for a while, to fork from
        drop = {v for v in kept if v < held.version} - {v for _, v in found}
        held = replace(held, memory=memory, dialogue=dialogue, turns=turns, drop=tuple(drop))
        return replace(held, entries=(history.rewind(first),)), again

    async def _instructions(self, tenant: str, held: _Held, instructions: str) -> tuple[list[Message], str]:
        """What of the instructions is new, and what :class:`Taken` says of them."""
        entries = list(held.entries)
        if held.version:
            known = await asyncio.to_thread(self.store.transcript, tenant, held.session, held.version)
            entries = [*known, *entries]
        text, word = history.news(history.current(entries), Message("system", instructions))
        texts, said = await self._sayable(held.dialogue, [] if text is None else [text], word, len(entries))
        return list(texts), said or word

    async def _sayable(
        self, dialogue: Dialogue, messages: Sequence[Message], word: str | None, known: int
    ) -> tuple[Sequence[Message], str | None]:
        """The messages, without system text that the template knows only at the beginning: the known one is kept."""
        if word != "taken in" or not known:
            return messages, word
        fit = [message for message in messages if message.role not in history.SYSTEM]
        for message in messages:
            if message.role in history.SYSTEM:
                try:
                    await asyncio.to_thread(self.dialogues.add, dialogue, message)
                except ConfigError:
                    return fit, "kept"
        return messages, word

    # ------------------------------------------------------------------ life

    async def ready(self) -> list[str]:
        """Why no turn should be sent here; empty if there is no reason."""
        reasons = ["the server is about to stop"] if self._draining else []
        if (silent := self.engine.idle_seconds()) > SILENCE:
            reasons.append(f"the model's thread has been silent for {silent:.0f} s")
        if not await self._store_is_well():
            reasons.append("the store cannot be written; the log says why")
        return reasons

    async def _store_is_well(self) -> bool:
        async with self._looking:
            if self._health is None or time.monotonic() - self._health[0] > FRESH:
                try:
                    await asyncio.to_thread(self.store.check_health)
                    well = True
                except Exception as error:  # whatever it is, it is no health
                    log.warning("the store cannot be written: %s", error)
                    well = False
                self._health = time.monotonic(), well
            return self._health[1]

    async def tend(self, every: float = 600) -> None:
        """Remove expired conversations from time to time, until cancelled."""
        while True:
            try:
                self.metrics.expired.inc(await asyncio.to_thread(self.store.purge))
            except CCMError as error:  # the next round tries again
                log.warning("expired conversations were not removed: %s", error)
            await asyncio.sleep(every)

    def stop_taking(self) -> None:
        """Take no new turns."""
        self._draining = True

    async def drain(self) -> None:
        """Take no new turns, and wait for those that run; those without a client end at once."""
        self.stop_taking()
        while self._turns:
            for turn in self._left:
                turn.hurry()
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Stop the engine and close the store."""
        self.engine.close()
        self.store.close()

    # ------------------------------------------------------------------ steps

    def _open(self) -> None:
        if self._draining:
            raise StoppingError("the server is about to stop: send this to another one, or later", 10)

    def _alone(self, tenant: str, session: str) -> _Alone:
        return _Alone(self._busy, (tenant, session))

    def _count(self) -> Callable[[], None]:
        """One more turn runs; the returned function ends it, once."""
        self._turns += 1
        running = [True]

        def done() -> None:
            if running:
                running.clear()
                self._turns -= 1

        return done

    async def _begin(
        self, tenant: str, session: str, create: bool, version: int | None, branch: bool
    ) -> _Held:
        if not session:
            return self._new()
        try:
            held = await self._load(tenant, session, version=version)
        except NotFoundError:
            if create and version is None:
                return _Held(session, 0, self.method.empty())
            raise
        if version is None:
            return held
        newest = await asyncio.to_thread(self.store.info, tenant, session)
        if newest.version == version and not branch:
            return held
        entries = await asyncio.to_thread(self.store.transcript, tenant, session, version)
        return replace(held, session=new_id("mem"), version=0, entries=tuple(entries))

    def _new(self) -> _Held:
        return _Held(new_id("mem"), 0, self.method.empty())

    async def _load(self, tenant: str, session: str, version: int | None = None, anew: bool = False) -> _Held:
        """A conversation as it is stored; ``anew`` with an empty memory in place of its own."""
        if version is None:
            snapshot = await asyncio.to_thread(self.store.latest, tenant, session)
        else:
            snapshot = await asyncio.to_thread(self.store.get, tenant, session, version)
        if snapshot is None:
            return _Held(session, 0, self.method.empty())
        kept = snapshot.metadata
        user = dict(kept.get("user", {}))
        if anew:
            return _Held(session, snapshot.version, self.method.empty(), metadata=user)
        memory, _ = await asyncio.to_thread(codec.decode, snapshot.payload)
        memory = self._checked(memory)
        dialogue = resumed(self.dialogues, kept, memory)
        return _Held(session, snapshot.version, memory, dialogue, kept["stats"]["turns"], user)

    def _checked(self, memory: Memory) -> Memory:
        """The memory as this model takes it, if this model and adapter made it and it can be what it says."""
        try:
            memory = self.method.admit(memory)
        except MismatchError as error:
            raise MismatchError(
                f"{error}; or rebuild it from its texts (POST /v1/memories/ID/rebuild)"
            ) from error
        self.method.reader.check_length(memory.length + 1)
        return memory

    def _rendered(
        self,
        held: _Held,
        messages: Sequence[Message],
        answer: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Rendering:
        """The messages as the model's template writes them behind what the conversation holds."""
        self._check_characters(messages)
        longest = self.method.longest
        rendering = Rendering(self.dialogues, held.dialogue, held.memory, longest, messages, answer, tools)
        self._check_tokens(rendering.tokens + len(rendering.head))
        return rendering

    def _check_characters(self, messages: Sequence[Message]) -> None:
        count = sum(len(message.content) for message in messages)
        if count > CHARACTERS * self.settings.input_tokens:
            raise ConfigError(
                f"the request brings {count} characters, the limit is {self.settings.input_tokens} tokens: "
                "send it in parts"
            )

    def _check_tokens(self, count: int) -> None:
        if count > self.settings.input_tokens:
            raise ConfigError(
                f"the request brings {count} tokens, the limit is {self.settings.input_tokens}: send it in parts"
            )

    async def _take_in(self, tenant: str, held: _Held, messages: Sequence[Message]) -> str:
        """Fold messages and commit; returns the session."""
        rendering = await asyncio.to_thread(self._rendered, held, messages)
        made: list[str] = []

        async def commit(result: Result) -> Outcome:
            session, *_ = await self._commit(
                tenant, held, result.memory, rendering.dialogue, messages, rendering.lengths
            )
            made.append(session)
            return Outcome("", "stop", 0, 0, 0)

        job = Job(held.memory, rendering.segments)
        await Turn(self.engine, job, commit, self._count()).finish()
        return made[0]

    async def _commit(
        self,
        tenant: str,
        held: _Held,
        memory: Memory,
        dialogue: Dialogue,
        messages: Sequence[Message],
        lengths: Sequence[int],
    ) -> tuple[str, int, dict[str, int]]:
        """Make a turn durable: session, version and counters."""
        turns = held.turns + len(messages)
        say_losses(held.memory, memory, self.method)
        entries = [
            *held.entries,
            *(
                history.note(m, n, self.settings.texts, held.told)
                for m, n in zip(messages, lengths, strict=True)
            ),
        ]
        if not held.version:
            session = await self._make(tenant, held.session, held.metadata, memory, turns, entries, dialogue)
            return session, 1, self._stats(memory, turns)
        snapshot = await asyncio.to_thread(self._snapshot, memory, turns, held.metadata, dialogue)
        stored = await self._store(tenant, held.session, held.version, snapshot, entries, held.drop)
        return held.session, stored.version, self._stats(memory, turns)

    async def _make(
        self,
        tenant: str,
        session: str | None,
        metadata: dict[str, str],
        memory: Memory,
        turns: int,
        entries: Sequence[dict[str, Any]],
        dialogue: Dialogue,
    ) -> str:
        """A new session with a first version; without an id it gets one that cannot be guessed."""
        session = session or new_id("conv")
        snapshot = await asyncio.to_thread(self._snapshot, memory, turns, metadata, dialogue)
        try:
            await asyncio.to_thread(self.store.create, tenant, session)
        except ConflictError:
            # one without a version is what a killed server left between the two steps
            if (await asyncio.to_thread(self.store.info, tenant, session)).version:
                raise
        await self._store(tenant, session, 0, snapshot, entries)
        return session

    async def _store(
        self,
        tenant: str,
        session: str,
        expected: int,
        snapshot: Snapshot,
        entries: Sequence[dict[str, Any]],
        drop: Sequence[int] = (),
    ) -> Snapshot:
        began = time.monotonic()
        try:
            stored = await asyncio.to_thread(
                self.store.commit, tenant, session, expected, snapshot, entries, drop
            )
        except ConflictError:
            self.metrics.conflicts.inc()
            raise
        self.metrics.commits.observe(time.monotonic() - began)
        self.metrics.stored.inc(len(snapshot.payload))
        return stored

    def _snapshot(self, memory: Memory, turns: int, metadata: dict[str, str], dialogue: Dialogue) -> Snapshot:
        payload, encoded = codec.encode(memory, self.settings.precision)
        stats = self._stats(memory, turns)
        kept = {**encoded, "adapter": self.settings.adapter, "user": metadata, "stats": stats}
        kept["dialogue"] = dialogue.as_dict()
        return Snapshot(payload, kept)

    def _stats(self, memory: Memory, turns: int) -> dict[str, int]:
        return {"turns": turns, **counters(memory, self.method)}

    @staticmethod
    def _texts(entries: Sequence[dict[str, Any]]) -> list[Message]:
        if not entries:
            raise ConfigError("nothing was said in this conversation: there is nothing to rebuild")
        texts = history.texts(entries)
        if texts is None:
            raise ConfigError("the texts of this conversation were not kept: it cannot be rebuilt")
        return texts


class _Nothing:
    """In place of :class:`_Alone` where nobody else can know the conversation."""

    def __enter__(self) -> None:
        return None

    def release(self) -> None:
        return None


class _Alone:
    """One turn at a time in a conversation; a second one is refused rather than kept waiting."""

    def __init__(self, busy: set[tuple[str, str]], key: tuple[str, str]):
        self._busy, self._key, self._held = busy, key, False

    def __enter__(self) -> None:
        if self._key in self._busy:
            raise BusyError(
                "another turn of this conversation is running: wait for its end, or fork the conversation", 0
            )
        self._busy.add(self._key)
        self._held = True

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        if self._held:
            self._held = False
            self._busy.discard(self._key)
