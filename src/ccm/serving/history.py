"""Matching: what a client means that sends a history again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat.messages import Message
from .transcript import SYSTEM, TOLD, compared, current, digest_of, key_of, line_digest, lines_of, note

#: Places at which one and the same message is looked for, the newest ones.
_PLACES = 32
#: How requests begin, and what is in them, that clients make for themselves under the id of a conversation.
_TASKS = (
    # Open WebUI: titles, tags, follow-ups, search queries
    ("### Task:", "### Chat History:\n<chat_history>"),
    # LibreChat
    ("Provide a concise, 5-word-or-less title for the conversation", ""),
)


@dataclass(frozen=True)
class Plan:
    """What a request means for a memory.

    Attributes:
        keep: how many of the first entries of :func:`~ccm.serving.transcript.current` stay.
        append: messages of the request that are taken in behind them.
        matched: messages of the request that the memory holds.
        system: what becomes of the request's system text. "known": nothing of it is new. "kept": it differs in dates
            and times alone, and the known one stays. "taken in": some of it is new. None: there is none.
    """

    keep: int
    append: tuple[Message, ...]
    matched: int
    system: str | None = None


# ---------------------------------------------------------------------- system text


def news(entries: Sequence[dict[str, Any]], message: Message) -> tuple[Message | None, str]:
    """What of a system message is taken in behind these entries, and what :class:`Plan` says of it.

    Of a changed text the new lines alone are taken in, so that a long one is not read at every turn. A line that
    differs in dates and times alone is not new, so that a clock in it costs nothing.
    """
    known = [entry for entry in entries if entry["role"] in SYSTEM]
    if digest_of(message) in {entry["sha256"] for entry in known}:
        return None, "known"
    lines = {line for entry in known for line in lines_of(entry)}
    new = [line for line in message.content.splitlines() if line.strip() and line_digest(line) not in lines]
    if not new:
        return None, "kept"
    whole = len(new) == sum(bool(line.strip()) for line in message.content.splitlines())
    return (message if whole else Message(message.role, "\n".join(new))), "taken in"


# ---------------------------------------------------------------------- matching


def is_task(messages: Sequence[Message]) -> bool:
    """Whether a known client asks for a title, tags and the like. Such a request is no part of the conversation."""
    asked = messages[-1].content.lstrip() if messages and messages[-1].role == "user" else ""
    return any(asked.startswith(start) and inside in asked for start, inside in _TASKS)


def plan(
    entries: Sequence[dict[str, Any]],
    messages: Sequence[Message],
    imported: bool = False,
    back: bool = True,
) -> Plan | None:
    """Match the messages of a request against what a memory holds; None: they tell another history.

    The last message is new, unless it is also the last known one. Those before it are looked for among the known
    ones. System messages and empty answers are left aside, and answers are compared without their thoughts. In the
    table ``u`` asks and ``a`` answers::

        known          sent                    then known, before the answer
        u1 a1          u1 a1 u2                u1 a1 u2                 new
        u1 a1          u2 u3                   u1 a1 u2 u3              new, without any history
        u1 a1 u2 a2    u2 a2 u3                u1 a1 u2 a2 u3           the rest was trimmed away: nothing is lost
        u1 a1 u2 a2    u1 a1 u2                u1 a1 u2                 the answer is written again
        u1 a1 u2 a2    u1 v1 u2 a2 u3          u1 v1 u2 a2 u3           an old message was edited
        u1 a1 u2 a2    u1 a1 v2                u1 a1 v2                 edited, and gone on from there
        u1 a1 u2 a2    x u2 a2 u3              u1 a1 u2 a2 x u3         trimmed, with a summary in place
        u1 a1 u2 a2    v1 w1 v3                None

    Where several matches are possible, the one with the longest run of equal messages is taken, and of equal ones the
    one that keeps most. A message that is sent and not known is never left out.

    Args:
        entries: the transcript.
        messages: of the request.
        imported: whether the memory holds more than the entries say. A history is then taken only if some of it is
            among the entries, since nobody can tell what else the memory holds.
        back: whether a client may take something back by asking again. Otherwise everything it asks is new.
    """
    known = current(entries)
    found = [_plan(known, list(range(len(known))), messages, imported, back)]
    if found[0] is None or found[0].keep < len(known):  # it may be what the client was never shown
        shown = [i for i, entry in enumerate(known) if TOLD not in entry]
        if len(shown) < len(known):
            found.append(_plan(known, shown, messages, imported, back))
    fit = [one for one in found if one is not None]
    return max(fit, key=lambda one: (one.matched, one.keep), default=None)


def _plan(
    known: Sequence[dict[str, Any]],
    shown: Sequence[int],
    messages: Sequence[Message],
    imported: bool,
    back: bool,
) -> Plan | None:
    """A plan for a client that was shown these entries of all that are known."""
    places = [i for i in shown if compared(known[i]["role"], key_of(known[i]))]
    system = [i for i, message in enumerate(messages) if message.role in SYSTEM]
    talk = [i for i, m in enumerate(messages) if m.role not in SYSTEM and compared(m.role, digest_of(m))]
    found = _align(
        [key_of(known[i]) for i in places],
        [digest_of(messages[i]) for i in talk],
        [known[i]["role"] for i in places],
        [messages[i].role for i in talk],
        imported,
        back,
    )
    if found is None:
        return None
    keep, fresh = found
    if keep == len(places) and (fresh or not talk):
        keep = len(known)
    else:  # what was said before the first message stays, and what the client was not shown with what it follows
        keep = places[keep - 1] + 1 if keep else places[0]
        while keep < len(known) and TOLD in known[keep] and keep not in shown:
            keep += 1
    new = {talk[i]: messages[talk[i]] for i in fresh}
    matched, words = len(talk) - len(new), None
    so_far = list(known[:keep])
    for i in system:
        text, word = news(so_far, messages[i])
        matched += text is None
        words = max(words or word, word, key=("known", "kept", "taken in").index)
        if text is not None:
            new[i] = text
            so_far.append(note(text, 0, True))
    return Plan(keep, tuple(new[i] for i in sorted(new)), matched, words)


def _align(
    known: list[str],
    sent: list[str],
    who_known: list[str],
    who_sent: list[str],
    imported: bool,
    back: bool,
) -> tuple[int, list[int]] | None:
    """How many of the known stay, and which of the sent are taken in; None: another history.

    Args:
        known, sent: digests.
        who_known, who_sent: the roles.
        imported: the memory holds more than what is known.
        back: as for :func:`plan`.
    """
    if not sent:
        return len(known), []
    n, h = len(known), len(sent) - 1
    fresh, everything = [h], list(range(h + 1))
    if "assistant" not in who_sent:
        return _only_asked(known, sent, who_known, imported, back)
    if not n:
        return None if imported else (0, everything)
    if not h:  # an answer of somebody else's, and nothing before it
        return None
    # from the first message on: what was said next is new, or takes the place of what was said before
    leads = [
        (r, b == n, b == r, b) for q, b, r in _runs(known, sent[:h]) if q == r and (b in (n, r) or r > 1)
    ]
    if end := _overlap(known, sent[:h]):
        leads.append((end, True, end == n, n))
    length, at_end, _, stop = max(leads, default=(0, False, False, 0))
    if length == h:
        if known[stop : stop + 1] == [sent[h]] and (stop == n - 1 or who_sent[h] == "assistant"):
            return stop + 1, []
        return stop, fresh
    if at_end:
        return n, everything[length:]
    if _among(known, sent[:h]):  # some were left out in the middle
        return n, fresh
    there = set(known)
    if 2 * sum(digest in there for digest in sent[:h]) < h:
        return None
    # from a later message on: some were edited, or others put in the place of those left out
    later = [(q, r, b) for q, b, r in _runs(known, sent[:h]) if q > length and (r > 1 or b == n)]
    if later:
        q, _, b = max(later)
        off = b - q
        equal = [off + i >= 0 and known[off + i] == sent[i] for i in range(q)]
        if off >= 0 and (off == 0 or equal[0]) and 2 * sum(equal) >= q:
            edited = equal.index(False) if False in equal else q
            return off + edited, everything[edited:]
        there = set(known[:b])
        return b, [i for i in range(q) if sent[i] not in there] + everything[q:]
    return (stop, everything[length:]) if length else None


def _only_asked(
    known: list[str], sent: list[str], who_known: list[str], imported: bool, back: bool
) -> tuple[int, list[int]]:
    """The same for messages without an answer among them: new ones, unless they end what was asked before."""
    asked = [i for i, who in enumerate(who_known) if who != "assistant"]
    n, h = len(known), len(sent) - 1
    if back and [known[i] for i in asked] == sent and not imported:
        # all that was ever asked: a client that sends its history wants another answer
        return (n, []) if asked[h] == n - 1 else (asked[h], [h])
    if back and h and known[:h] == sent[:h] and who_known[h : h + 1] not in ([], ["assistant"]):
        return h, [h]  # the last of several was edited
    for q in range(min(len(asked), h), 0, -1):
        if [known[i] for i in asked[-q:]] == sent[:q]:
            return n, list(range(q, h + 1))
    return n, list(range(h + 1))


def _overlap(known: list[str], sent: list[str]) -> int:
    """How many of those sent, from the first on, are the last ones known; at most so many as there are."""
    fall, k = [0, 0], 0
    for digest in sent[1:]:
        while k and digest != sent[k]:
            k = fall[k]
        k += digest == sent[k]
        fall.append(k)
    k = 0
    for digest in known:
        while k and (k == len(sent) or digest != sent[k]):
            k = fall[k]
        k += digest == sent[k]
    return k


def _runs(known: list[str], sent: list[str]) -> Iterator[tuple[int, int, int]]:
    """Ends (q, b) of what was sent and of what is known, with equal messages, and how many are equal up to there."""
    places: dict[str, list[int]] = {}
    for b, digest in enumerate(known, 1):
        places.setdefault(digest, []).append(b)
    before: dict[int, int] = {}
    alike = True  # so far from the first message on, however often it is said
    for q, digest in enumerate(sent, 1):
        row = {b: before.get(b - 1, 0) + 1 for b in places.get(digest, ())[-_PLACES:]}
        alike = alike and known[q - 1 : q] == [digest]
        if alike:
            row[q] = q
        yield from ((q, b, run) for b, run in row.items())
        before = row


def _among(known: Sequence[str], sent: Sequence[str]) -> bool:
    """Whether the last ones are equal, and those sent before stand among the known ones in this order."""
    rest = iter(reversed(known))
    return known[-1] == sent[-1] and all(any(digest == other for other in rest) for digest in reversed(sent))
