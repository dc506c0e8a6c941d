"""A request may repeat its conversation: what of it is read, and from which memory it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..chat.dialogue import Dialogue
from ..chat.messages import Message
from ..errors import ConfigError
from . import history, transcript
from .records import Records, State
from .store import ConflictError, NotFoundError
from .turn import Taken


async def compare(
    records: Records, tenant: str, state: State, messages: Sequence[Message], resend: str
) -> tuple[State, Sequence[Message], Taken]:
    """Match messages that may repeat the conversation against what it knows.

    Args:
        records: the store.
        tenant: whose conversation.
        state: the conversation as it is.
        messages: of the request.
        resend: "match", "refuse" or "rebuild", see :class:`~ccm.serving.settings.Settings`.

    Returns:
        the state that the turn goes on from, the messages read behind it, and how the request was understood.

    Raises:
        ConflictError: the messages tell another history, or take back what cannot or must not be taken back.
        ConfigError: the conversation knows all messages, and the last one is an answer.
    """
    entries = await records.entries(tenant, state)
    known = transcript.current(entries)
    plan = await asyncio.to_thread(
        history.plan, entries, messages, state.turns > len(known), resend != "refuse"
    )
    if state.aside:
        taken = Taken(0 if plan is None else plan.matched, ephemeral=True)
        return state, messages if plan is None else plan.append, taken
    if plan is None and resend == "rebuild":
        nothing = records.method.empty().pinned_as(state.memory)
        empty = replace(state, memory=nothing, dialogue=Dialogue(), turns=0, entries=(transcript.RESET,))
        return empty, messages, Taken(rewound=len(known), rebuilt=len(messages))
    if plan is None:
        raise ConflictError(
            f"these {len(messages)} messages tell another history than the {len(known)} that the conversation "
            "knows: send what is new alone, fork an earlier version, name a new conversation, or ask for its "
            "memory to be made anew (X-CCM-Resend: rebuild)",
            state.version,
        )
    if not plan.append and messages[-1].role not in ("user", "tool"):
        raise ConfigError("the conversation knows all of these messages: add one to answer")
    append, system = await _sayable(records, state.dialogue, plan.append, plan.system, plan.keep)
    lost, again = len(known) - plan.keep, list[Message]()
    if lost and resend == "refuse":
        raise ConflictError(
            f"these {len(messages)} messages take back {lost} of the {len(known)} that the conversation knows: "
            "send what is new alone, or allow it (X-CCM-Resend: match)",
            state.version,
        )
    if lost:
        state, again = await rewound(records, tenant, state, entries, plan.keep, messages)
    return state, [*again, *append], Taken(plan.matched, len(append), lost, len(again), system)


async def back(
    records: Records, tenant: str, state: State, messages: Sequence[Message], keep: int
) -> tuple[State, Sequence[Message], Taken]:
    """Go back to the first ``keep`` messages that the conversation knows, whatever the new ones say.

    Returns:
        as :func:`compare`.

    Raises:
        ConflictError: it knows fewer, or cannot go back so far.
    """
    entries = await records.entries(tenant, state)
    known = len(transcript.current(entries))
    if keep > known:
        raise ConflictError(
            f"got {keep} messages to keep, the conversation knows {known}: look at it again", state.version
        )
    if keep == known:
        return state, messages, Taken(appended=len(messages))
    state, again = await rewound(records, tenant, state, entries, keep)
    return state, [*again, *messages], Taken(0, len(messages), known - keep, len(again))


async def instructions(
    records: Records, tenant: str, state: State, again: Sequence[Message], text: str
) -> tuple[Sequence[Message], str | None]:
    """The part of the instructions that is new behind the messages that are read again, and the word of
    :attr:`Taken.system` for them.
    """
    entries = transcript.current([*await records.entries(tenant, state), *state.entries])
    known = [*entries, *(transcript.note(message, 0, True) for message in again)]
    new, word = history.news(known, Message("system", text))
    dialogue = state.dialogue
    for message in again:
        step = await asyncio.to_thread(records.dialogues.add, dialogue, message, back=False)
        dialogue = step.dialogue
    return await _sayable(records, dialogue, [] if new is None else [new], word, len(known))


async def rewound(
    records: Records,
    tenant: str,
    state: State,
    entries: Sequence[dict[str, Any]],
    keep: int,
    messages: Sequence[Message] = (),
) -> tuple[State, list[Message]]:
    """The conversation before what was taken back: an older version, and the messages to read again behind it.

    The newest version is taken that knows the first ``keep`` messages at most. Those of the ``keep`` that it lacks
    are read again, from the stored texts or from the request.

    Raises:
        ConflictError: a text is in neither.
    """
    kept = await asyncio.to_thread(records.store.versions, tenant, state.session)
    reset = max((i for i, entry in enumerate(entries) if entry == transcript.RESET), default=-1)
    versions = [v for v, count in kept.items() if v <= state.version and count > reset]
    places, *before = transcript.standing(entries, [kept[v] for v in versions])
    found = [
        (len(then), version)
        for version, then in zip(versions, before, strict=True)
        if len(then) <= keep and then == places[: len(then)]
    ]
    first, version = max(found, default=(0, 0))
    base = records.new(state.session)
    if found:
        try:
            base = await records.load(tenant, state.session, version)
        except NotFoundError as error:  # another server has committed meanwhile
            raise ConflictError(f"{error}; send this again", state.version) from error
    again = transcript.texts([entries[i] for i in places[first:keep]], messages)
    if again is None or (not found and state.turns > len(places)):
        raise ConflictError(
            f"{len(places) - keep} of the {len(places)} messages that the conversation knows would be taken back, "
            "and no version from before is kept: send what is new alone, or name a new conversation",
            state.version,
        )
    # versions that know what is taken back make room for others; the newest stays for a while, to fork from
    drop = {v for v in kept if v < state.version} - {v for _, v in found}
    memory = base.memory.pinned_as(state.memory)  # pins are not taken back
    state = replace(state, memory=memory, dialogue=base.dialogue, turns=base.turns, drop=tuple(drop))
    lost = tuple(entries[i] for i in places[first:])
    return replace(state, entries=(transcript.rewind(first),), back=lost), again


async def _sayable(
    records: Records, dialogue: Dialogue, messages: Sequence[Message], word: str | None, known: int
) -> tuple[Sequence[Message], str | None]:
    """The messages, without system text if the template allows it at the beginning alone. The known one stays."""
    if word != "taken in" or not known:
        return messages, word
    fit = [message for message in messages if message.role not in transcript.SYSTEM]
    for message in messages:
        if message.role in transcript.SYSTEM:
            try:
                await asyncio.to_thread(records.dialogues.add, dialogue, message)
            except ConfigError:
                return fit, "kept"
    return messages, word
