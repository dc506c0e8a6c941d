"""Conversations over an engine and a store: the server without HTTP.

    turn    = load memory -> render what is new -> engine -> commit memory and transcript -> outcome

A turn happens as a whole or not at all. Its commit is one compare-and-swap, made once the answer is complete and
folded. The client hears of the end after the commit. One turn runs at a time in a conversation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..chat.answers import AnswerReader
from ..chat.dialogue import Dialogues
from ..chat.messages import Message
from ..chat.template import template_of
from ..errors import ConfigError
from ..files.fingerprint import base_name
from ..methods import Method
from . import history, resends
from .conversations import Conversations, View
from .engine import Engine, Job, Kept, PaddedEngine, Result, Sampling
from .health import Health
from .metrics import Metrics
from .records import Records, State, new_id
from .rendering import Rendering, render
from .running import BusyError, Running
from .settings import Settings
from .store import Store
from .transcript import Cut, Entry
from .turn import Outcome, Taken, Turn

__all__ = ["BusyError", "Entry", "Message", "Outcome", "Sampling", "Service", "Settings", "Turn", "View"]


class Service(Conversations):
    """Many tenants' conversations on one model, and answers in them.

    Args:
        method: how conversations are kept, bound to a model; the service's engine has it for itself.
        tokenizer: of the model.
        store: where memories live.
        settings: how conversations are kept.
        engine: runs the model; by default a :class:`~ccm.serving.engine.PaddedEngine`.
        metrics: counters of the server.

    Attributes:
        running: the turns that run.
        parameters: of the model.
        health: of engine and store.
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
        self.method, self.tokenizer = method, tokenizer
        self.template = template_of(tokenizer)
        self.metrics = metrics or Metrics()
        engine = engine or PaddedEngine(method, tokenizer, metrics=self.metrics)
        records = Records(method, Dialogues(self.template), store, settings, self.metrics)
        super().__init__(records, engine, Running())
        self.health = Health(engine, store, self.running, self.metrics)
        self.name = f"{base_name(method.reader.model)}+{settings.adapter}"
        self.created = int(time.time())
        adapted = sum(p.numel() for name, p in method.reader.model.named_parameters() if "lora_" in name)
        self.parameters = int(method.reader.model.num_parameters()) - adapted

    def close(self) -> None:
        """Stop the engine and close the store."""
        self.engine.close()
        self.store.close()

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
        keep: int | None = None,
    ) -> Turn:
        """Begin to answer.

        Args:
            tenant: who asks.
            session: the conversation. None answers from the messages alone and keeps nothing; "" begins a
                conversation with a new id.
            messages: what is new; the answer follows the last one.
            sampling: of the answer.
            create: begin the conversation if it is not there.
            resent: the messages may repeat what the conversation knows, see :func:`ccm.serving.history.plan`.
            version: go on from this version. If it is not the newest, the turn goes into a branch with a new id.
            branch: go on from that version in a branch in any case.
            instructions: a system message. What is new of it is taken in first.
            tools: tools that the model may call, in the form of chat templates.
            disconnect: what becomes of the turn if the client disconnects; None is what the settings say. Without a
                conversation the turn is dropped.
            resend: what to do with a history that differs; None is what the settings say.
            aside: the request is no part of the conversation, such as one for a title. It is answered from memory
                and messages, and not kept. None: decided by how the requests of known clients begin.
            keep: go back to so many of the first messages that the conversation knows, and go on with these.

        Raises:
            ConfigError: nothing to answer, or more than the model's context can hold.
            ConflictError: the messages tell another history than the conversation's, or take back what cannot be.
            BusyError: a turn of this conversation is running.
            OverloadedError: too many turns are waiting.
            StoppingError: the server is about to stop.
        """
        self.running.check()
        if not messages:
            raise ConfigError("got no messages, expected at least one to answer: send what the user says")
        if sampling.schema is not None:
            await asyncio.to_thread(self.engine.check, sampling)
        if session is None:
            system = [] if instructions is None else [Message("system", instructions)]
            return await self._stateless([*system, *messages], sampling, tools)
        if aside is None:
            aside = resent and keep is None and history.is_task(messages)
        lock = session and version is None and not aside
        unlock = self.running.lock(tenant, session) if lock else _nothing
        try:
            state = await self.records.begin(tenant, session, create, version, branch)
            if aside:
                if not state.version:
                    return await self._stateless(messages, sampling, tools)
                state = replace(state, aside=True)
            if version is not None and state.version:
                unlock = self.running.lock(tenant, session)
            taken = Taken(appended=len(messages))
            if keep is not None:
                state, messages, taken = await resends.back(self.records, tenant, state, messages, keep)
            elif resent:
                resend = resend or self.settings.resend
                state, messages, taken = await resends.compare(self.records, tenant, state, messages, resend)
            if instructions is not None:
                again = messages[: taken.rebuilt if state.back else 0]
                text, word = await resends.instructions(self.records, tenant, state, again, instructions)
                appended = taken.appended + len(text)
                messages = [*again, *text, *messages[len(again) :]]
                taken = replace(taken, matched=taken.matched + 1 - len(text), appended=appended, system=word)
            disconnect = "drop" if aside else disconnect or self.settings.disconnect
            turn = await self._turn(tenant, state, messages, sampling, unlock, tools, disconnect)
            turn.taken = taken
            return turn
        except BaseException:
            unlock()
            raise

    async def _stateless(
        self, messages: Sequence[Message], sampling: Sampling, tools: Sequence[dict[str, Any]]
    ) -> Turn:
        state = self.records.new(new_id("mem"))
        rendering = await asyncio.to_thread(render, self.records, state, messages, True, tools)
        prompt = (*(token for segment in rendering.segments for token in segment), *rendering.head)

        async def outcome(result: Result) -> Outcome:
            return self._outcome(result, rendering, len(prompt), 0)

        job = Job(state.memory, prompt=prompt, sampling=sampling)
        turn = Turn(self.engine, job, outcome, self.running.count(), reader=self._reader(rendering))
        self.running.begun.add(turn)
        return turn

    async def _turn(
        self,
        tenant: str,
        state: State,
        messages: Sequence[Message],
        sampling: Sampling,
        release: Callable[[], None],
        tools: Sequence[dict[str, Any]] = (),
        disconnect: str = "drop",
    ) -> Turn:
        rendering = await asyncio.to_thread(render, self.records, state, messages, True, tools)
        if not state.aside:
            await asyncio.to_thread(rendering.check_answer)
        known = self.records.seen(state.memory)
        prompt = known + rendering.tokens + len(rendering.head)

        def remember(text: str) -> Kept:
            return rendering.remember(self._answer(rendering, text))[0]

        async def commit(result: Result) -> Outcome:
            outcome = self._outcome(result, rendering, prompt, known)
            if state.aside:
                return self._placed(outcome, state)
            answer = self._answer(rendering, result.text)
            dialogue = rendering.remember(answer)[1]
            taken = self.records.seen(result.memory) - known - sum(rendering.lengths)
            said, lengths = [*messages, answer], [*rendering.lengths, taken]
            broken = result.finish_reason in ("length", "stopped")
            marks = Cut(result.finish_reason, result.tokens).mark() if broken else {}
            after = await self.records.commit(tenant, state, result.memory, dialogue, said, lengths, marks)
            return self._placed(outcome, after)

        job = Job(
            state.memory,
            segments=rendering.segments,
            prompt=rendering.head,
            sampling=sampling,
            remember=None if state.aside else remember,
        )
        done = self.running.count()

        def both() -> None:
            done()
            release()

        reader = self._reader(rendering)
        place = state.session, state.version + (not state.aside)
        turn = Turn(self.engine, job, commit, both, *place, reader, disconnect, self.running.left)
        self.running.begun.add(turn)
        return turn

    def _placed(self, outcome: Outcome, state: State) -> Outcome:
        """The outcome with id, version and counters of its conversation."""
        stats = self.records.stats(state.memory, state.turns)
        return replace(outcome, session=state.session, version=state.version, stats=stats)

    def _reader(self, rendering: Rendering) -> AnswerReader:
        return AnswerReader(self.template, rendering.head, rendering.tools)

    def _answer(self, rendering: Rendering, text: str) -> Message:
        """The answer as it is remembered: without thoughts, which clients do not send back."""
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


def _nothing() -> None:
    """In place of what unlocks a conversation that nobody else can know."""
