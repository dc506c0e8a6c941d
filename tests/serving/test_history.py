"""What a client that sends a history again means: every way to send it, and random clients against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccm.chat.messages import Message, ToolCall
from ccm.serving.history import Plan, is_task, news, plan
from ccm.serving.transcript import RESET, TOLD, current, note, rewind, said, standing, texts, timeline

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def message(word: str) -> Message:
    """``u1`` is what a user says; ``a`` alone is an empty answer."""
    return Message(ROLES[word[0]], "" if word == "a" else word)


def messages(words: str) -> list[Message]:
    return [message(word) for word in words.split()]


def noted(words: str, texts: bool = True) -> list[dict[str, Any]]:
    return [note(m, 1, texts) for m in messages(words)]


def remembered(entries: Sequence[dict[str, Any]], found: Plan) -> list[str]:
    """What the memory holds before the answer."""
    held = [said(entry) for entry in current(entries)[: found.keep]]
    return [m.content or "a" for m in (*held, *found.append) if m is not None]


CASES = {
    "all that was said": ("u1 a1", "u1 a1 u2", "u1 a1 u2"),
    "what is new alone": ("u1 a1 u2 a2", "u3", "u1 a1 u2 a2 u3"),
    "two new ones alone": ("u1 a1", "u2 u3", "u1 a1 u2 u3"),
    "two new ones behind a history": ("u1 a1", "u1 a1 u2 u3", "u1 a1 u2 u3"),
    "two new ones behind a system message": ("s u1 a1", "s u2 u3", "s u1 a1 u2 u3"),
    "answers of another model": ("u1 a1", "u1 a1 u2 b2 u3".replace("b2", "ab2"), "u1 a1 u2 ab2 u3"),
    "the first two answered again": ("u1 u2 a2", "u1 u2", "u1 u2"),
    "the second of two edited": ("u1 u2 a2", "u1 ux", "u1 ux"),
    "many answers of another model": ("u1 a1", "u1 a1 u2 ax u3 ay u4 az u5", "u1 a1 u2 ax u3 ay u4 az u5"),
    "said twice": ("u1 a1 u2 a2", "u2", "u1 a1 u2 a2 u2"),
    "all but questions trimmed away": ("u1 a1 u2 a2", "u1 u2 u3", "u1 a1 u2 a2 u3"),
    # trimmed
    "the beginning trimmed away": ("u1 a1 u2 a2 u3 a3", "u3 a3 u4", "u1 a1 u2 a2 u3 a3 u4"),
    "all but an answer trimmed away": ("u1 a1 u2 a2", "a2 u3", "u1 a1 u2 a2 u3"),
    "trimmed behind a system message": ("s u1 a1 u2 a2", "s u2 a2 u3", "s u1 a1 u2 a2 u3"),
    "the system message trimmed away": ("s u1 a1", "u1 a1 u2", "s u1 a1 u2"),
    "the middle trimmed away": ("u1 a1 u2 a2 u3 a3", "u1 a1 u3 a3 u4", "u1 a1 u2 a2 u3 a3 u4"),
    "trimmed in two places": (
        "u1 a1 u2 a2 u3 a3 u4 a4",
        "u1 u2 a2 u3 u4 a4 u5",
        "u1 a1 u2 a2 u3 a3 u4 a4 u5",
    ),
    "the middle trimmed away, and the same answers": (
        "u1 a1 u2 aok u3 aok",
        "u1 u2 aok u4",
        "u1 a1 u2 aok u3 aok u4",
    ),
    "trimmed in two places, with a summary": (
        "u1 a1 u2 a2 u3 a3 u4 a4 u5 a5",
        "u1 usum u2 a2 u3 u5 a5 u6",
        "u1 a1 u2 a2 u3 a3 u4 a4 u5 a5 usum u6",
    ),
    "a summary of what was trimmed away": ("u1 a1 u2 a2 u3 a3", "usum u3 a3 u4", "u1 a1 u2 a2 u3 a3 usum u4"),
    "the first message and a summary": ("u1 a1 u2 a2", "u1 usum a2 u3", "u1 a1 u2 a2 usum u3"),
    "the same summary again": ("u1 a1 u2 a2 usum u3 a3", "usum u2 a2 u3 a3 u4", "u1 a1 u2 a2 usum u3 a3 u4"),
    "trimmed, then edited": ("u1 a1 u2 a2 u3 a3 u4 a4", "u2 a2 u3 a3 ux", "u1 a1 u2 a2 u3 a3 ux"),
    "the first kept, trimmed, then edited": (
        "u1 a1 u2 a2 u3 a3 u4 a4 u5 a5",
        "u1 u3 a3 u4 a4 ux",
        "u1 a1 u2 a2 u3 a3 u4 a4 ux",
    ),
    # written again
    "the answer again": ("u1 a1 u2 a2", "u1 a1 u2", "u1 a1 u2"),
    "the first answer again": ("u1 a1", "u1", "u1"),
    "the first answer again, with a system message": ("s u1 a1", "s u1", "s u1"),
    "an older answer again": ("u1 a1 u2 a2 u3 a3", "u1 a1 u2", "u1 a1 u2"),
    "the answer again, trimmed": ("u1 a1 u2 a2 u3 a3", "u2 a2 u3", "u1 a1 u2 a2 u3"),
    "an answer that never came": ("u1 a1 u2", "u1 a1 u2", "u1 a1 u2"),
    "an empty answer again": ("u1 a1 u2 a", "u1 a1 u2", "u1 a1 u2"),
    # edited
    "the last message edited": ("u1 a1 u2 a2", "u1 a1 ux", "u1 a1 ux"),
    "a message in the middle edited": ("u1 a1 u2 a2 u3 a3", "u1 a1 ux", "u1 a1 ux"),
    "an answer edited": ("u1 a1 u2 a2", "u1 a1 u2 ax u3", "u1 a1 u2 ax u3"),
    "edited where it stands": ("u1 a1 u2 a2 u3 a3", "u1 a1 ux a2 u3 a3 u4", "u1 a1 ux a2 u3 a3 u4"),
    "the first one edited where it stands": ("s u1 a1 u2 a2", "s ux a1 u2 a2 u3", "s ux a1 u2 a2 u3"),
    "trimmed, and edited where it stands": (
        "u1 a1 u2 a2 u3 a3 u4 a4",
        "u2 a2 ux a3 u4 a4 u5",
        "u1 a1 u2 a2 ux a3 u4 a4 u5",
    ),
    "gone on from an edited first answer": ("u1 a1 u2 a2", "u1 ax ux", "u1 ax ux"),
    "back to another branch": ("u1 a1 ux ax", "u1 a1 u2 a2 u3", "u1 a1 u2 a2 u3"),
    # the same words again and again
    "go on": ("ugo aok ugo aok", "ugo aok ugo aok ugo", "ugo aok ugo aok ugo"),
    "go on, trimmed": ("u1 a1 ugo aok ugo aok", "ugo aok ugo", "u1 a1 ugo aok ugo aok ugo"),
    "go on, alone": ("u1 a1 ugo aok", "ugo", "u1 a1 ugo aok ugo"),
    "the same answer to both": ("u1 aok u2 aok", "u1 aok ux", "u1 aok ux"),
    "a run of the same that ends elsewhere": ("u1 aok u2 aok u3 aok", "u1 aok u2", "u1 aok u2"),
    "empty answers that the client leaves out": ("u1 a u2 a", "u1 u2 u3", "u1 a u2 a u3"),
    "empty answers that it sends": ("u1 a u2 a", "u1 a u2 a u3", "u1 a u2 a u3"),
    # another history
    "nothing is known": ("u1 a1", "ux ax uy", None),
    "an answer alone": ("u1 a1", "ax", None),
    "less than half is known": ("u1 a1 u2 a2", "u1 ax uy ay uz az uw", None),
    "trimmed to an answer from long ago": ("u1 aok u2 a2", "aok ux", None),
    "begun anew with the same words": ("uhi a1 u2 a2 u3 a3", "uhi ax uy ay uz", None),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_remembered(name):
    known, sent, expected = CASES[name]
    old = [*noted("u0 a0"), RESET]  # what was forgotten is not looked at
    taken_back = [*noted(known), *noted("uz az"), rewind(len(known.split()))]
    for entries in (noted(known), [*old, *noted(known)], taken_back, noted(known, texts=False)):
        found = plan(entries, messages(sent))
        if expected is None:
            assert found is None
            continue
        assert found is not None
        if "content" in entries[0]:
            assert remembered(entries, found) == expected.split()
        else:
            places = [expected.split()[: found.keep], [m.content or "a" for m in found.append]]
            assert [*known.split()[: found.keep], *places[1]] == expected.split()
        kept = [word for word in sent.split() if word != "a"]
        assert found.matched + len(found.append) == len(kept)


def test_a_history_without_a_match_is_no_edit():
    """Negative control of the cases: the same messages in another order are no history of this conversation."""
    assert plan(noted("u1 a1 u2 a2 u3 a3"), messages("u3 ax u1 ay u2 az u4")) is None


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("u1", "u1"), ("s u1", "s u1"), ("u1 u2", "u1 u2"), ("u1 a1 u2", None), ("a1", None)],
)
def test_an_imported_memory(sent, expected):
    found = plan([], messages(sent), imported=True)
    assert (None if found is None else remembered([], found)) == (expected and expected.split())
    assert plan([], messages(sent)) == Plan(
        0, tuple(messages(sent)), 0, "taken in" if sent[0] == "s" else None
    )


def test_what_was_said_since_an_import_is_known():
    entries = noted("u1 a1")
    assert remembered(entries, plan(entries, messages("u1 a1 u2"), imported=True)) == ["u1", "a1", "u2"]
    # before u1 there is more: it is not all that was ever asked, and may have been said again
    assert remembered(entries, plan(entries, messages("u1"), imported=True)) == ["u1", "a1", "u1"]


def test_what_the_server_alone_knows_is_not_taken_back():
    """Taken in without an answer, by another way than the client's."""
    told = [note(message("u2"), 1, True, {TOLD: True})]
    for known, sent, expected in (
        ([*noted("u1 a1"), *told], "u1 a1 u3", "u1 a1 u2 u3"),
        ([*told, *noted("u1 a1")], "u1 a1 u3", "u2 u1 a1 u3"),
        ([*noted("u1 a1"), *told, *noted("u3 a3")], "u1 a1 u3", "u1 a1 u2 u3"),
        ([*noted("u1 a1"), *told, *noted("u3 a3")], "u1 a1 u3 a3 u4", "u1 a1 u2 u3 a3 u4"),
        ([*noted("u1 a1"), *told, *noted("u3 a3 u4 a4")], "u1 a1 u3 a3 ux", "u1 a1 u2 u3 a3 ux"),
        ([*noted("u1 a1"), *told], "u1 a1 u2 ax u3", "u1 a1 u2 ax u3"),  # and some do know of it
        ([*told, *noted("a2", True)], "u2 a2 u3", "u2 a2 u3"),
    ):
        assert remembered(known, plan(known, messages(sent))) == expected.split()


def test_asked_again_is_new_where_nothing_may_be_taken_back():
    for known, sent in (("u1 a1", "u1"), ("u1 u2 a2", "u1 u2"), ("u1 u2 a2", "u1 ux")):
        found = plan(noted(known), messages(sent), back=False)
        assert remembered(noted(known), found) == [*known.split(), *sent.split()]


def test_all_is_known_already():
    entries = noted("u1 a1 u2 a2")
    assert plan(entries, messages("u1 a1 u2 a2")).append == ()
    assert plan(entries, messages("u1 a1")).append == ()


# ------------------------------------------------------------------ answers and their thoughts


@pytest.mark.parametrize(
    ("known", "sent"),
    [
        (Message("assistant", "<think>\nhm\n</think>\n\nBlue."), Message("assistant", "Blue.")),
        (Message("assistant", "Blue."), Message("assistant", " <think>so</think> Blue.\n")),
        (
            Message("assistant", "hm\n</think>\n\nBlue."),
            Message("assistant", "Blue."),
        ),  # the template opened it
        (Message("assistant", "Blue.", reasoning="hm"), Message("assistant", "Blue.")),
        (Message("assistant", "Blue."), Message("assistant", "Blue.", reasoning="other")),
    ],
)
def test_answers_are_compared_without_thoughts(known, sent):
    entries = [note(m, 1, True) for m in (message("u1"), known)]
    old = [dict(entries[0]), {**entries[1], "sha256": "of the whole text, by an older server"}]
    for notes in (entries, old) if "think>" in known.content else (entries,):
        found = plan(notes, [message("u1"), sent, message("u2")])
        assert (found.keep, found.append, found.matched) == (2, (message("u2"),), 2)
    other = plan(entries, [message("u1"), Message("assistant", "Red."), message("u2")])
    assert other.keep == 1  # negative control: what it says does count


def test_a_user_may_talk_of_thoughts():
    entries = [note(m, 1, True) for m in (Message("user", "<think>a</think>"), message("a1"))]
    found = plan(entries, [Message("user", "<think>b</think>"), message("a1"), message("u2")])
    assert found.keep == 0 and len(found.append) == 3


def test_digests_of_plain_messages_are_those_of_older_servers():
    import hashlib

    for one in (message("u1"), message("a1"), message("s1"), Message("developer", "s1")):
        role = "system" if one.role == "developer" else one.role
        old = hashlib.sha256(f"{role}\0{one.content}".encode()).hexdigest()
        assert note(one, 1, False)["sha256"] == old


def test_calls_and_results_are_compared():
    call = Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1, "b": 2}', "c1"),))
    spaced = Message("assistant", "", tool_calls=(ToolCall("add", '{"b":2,"a":1}', "c1"),))
    other = Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1, "b": 3}', "c1"),))
    result = Message("tool", "3", tool_call_id="c1", name="add")
    entries = [note(m, 1, True) for m in (message("u1"), call)]
    assert plan(entries, [message("u1"), spaced, result]) == Plan(2, (result,), 2)
    assert plan(entries, [message("u1"), other, result]).keep == 1
    assert [said(entry) for entry in [*entries, note(result, 1, True)]] == [message("u1"), call, result]
    done = [*entries, *(note(m, 1, True) for m in (result, message("a2")))]
    elsewhere = Message("tool", "3", tool_call_id="c2")
    assert plan(done, [message("u1"), call, result, message("a2"), message("u2")]).keep == 4
    assert plan(done, [message("u1"), call, elsewhere, message("a2"), message("u2")]).keep == 2


# ------------------------------------------------------------------ system text


RULES = "You are kind.\nAnswer in at most 50 words.\nIt is {}."


def taken_in(known: str, now: str, texts: bool = True) -> tuple[str | None, str]:
    message, word = news([note(Message("system", known), 1, texts)], Message("system", now))
    return (None if message is None else message.content), word


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("14:05", "14:06"),
        ("2026-11-27T14:05:59Z", "2026-12-01T09:00:00Z"),
        ("Friday, 27 November 2026, 2:05 PM", "Saturday, 28 November 2026, 11:59 AM"),
        ("November 27th, 2026", "May 1st, 2027"),
        ("Fri 27 Nov 2026", "Sat 28 Nov 2026"),
        ("27.11.2026", "1.12.2026"),
        ("11/27/26 at 14:05:09.123", "12/1/26 at 14:05:10.001"),
        ("1795788000", "1795788060"),
    ],
)
def test_a_clock_is_not_new(before, after, texts):
    assert taken_in(RULES.format(before), RULES.format(after), texts) == (None, "kept")
    assert taken_in(RULES.format(before), RULES.format(before), texts) == (None, "known")


@pytest.mark.parametrize("texts", [True, False])
def test_of_a_changed_system_message_the_new_lines_are_taken_in(texts):
    before = RULES.format("14:05")
    assert taken_in(before, before.replace("50", "100"), texts) == (
        "Answer in at most 100 words.",
        "taken in",
    )
    assert taken_in(before, before + "\n\nThe user likes tea.", texts) == ("The user likes tea.", "taken in")
    assert taken_in(before, "You are kind.", texts) == (None, "kept")  # what is left out cannot be unlearned
    assert taken_in(before, "Be brief.\nBe a cat.", texts) == ("Be brief.\nBe a cat.", "taken in")


@pytest.mark.parametrize("texts", [True, False])
def test_a_clock_costs_nothing_over_many_turns(texts):
    entries: list[dict[str, Any]] = []
    sent: list[Message] = []
    for n in range(30):
        rules = Message("system", RULES.format(f"14:{n:02}"))
        sent.append(message(f"u{n}"))
        found = plan(entries, [rules, *sent])
        assert found.system == ("kept" if n else "taken in") and found.keep == len(entries)
        answer = message(f"a{n}")
        entries += [note(m, 1, texts) for m in (*found.append, answer)]
        sent.append(answer)
    assert [entry["role"] for entry in entries].count("system") == 1 and len(entries) == 61
    rules = Message("system", RULES.format("15:00") + "\nBe brief.")
    for words in ("taken in", "known"):
        found = plan(entries, [rules, *sent, message("u30")])
        assert found.system == ("taken in" if words == "taken in" else "kept")
        entries += [note(m, 1, texts) for m in found.append[:-1]]  # folded once, not at every turn
    assert [entry["role"] for entry in entries].count("system") == 2


def test_system_text_stands_where_the_client_puts_it():
    entries = noted("s1 u1 a1")
    found = plan(entries, messages("s2 u1 a1 u2 s3 u3"))
    assert [m.content for m in found.append] == ["s2", "u2", "s3", "u3"] and found.keep == 3
    found = plan(
        noted("s1 u1 a1 s2 u2 a2"), messages("s2 u1 a1 ux")
    )  # s2 goes with its turn, and comes again
    assert found.keep == 3 and [m.content for m in found.append] == ["s2", "ux"]


def test_a_line_of_digits_does_not_take_for_ever():
    for text in ("1" * 100_000, "1 " * 50_000, "1:11" * 25_000, "may " * 25_000):
        assert news([], Message("system", text))[1] == "taken in"


# ------------------------------------------------------------------ requests for the client itself


def test_requests_for_titles_and_tags():
    task = (
        "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Output:\n"
        '{ "title": "..." }\n### Chat History:\n<chat_history>\nUSER: hi\nASSISTANT: hello\n</chat_history>'
    )
    title = "Provide a concise, 5-word-or-less title for the conversation, using title case conventions."
    assert is_task([Message("user", task)]) and is_task([message("s1"), Message("user", task)])
    assert is_task([Message("user", title)])
    retrieval = (
        "### Task:\nRespond to the user query using the provided context.\n<context>\nx\n</context>\nhi"
    )
    for text in (retrieval, "hi", "what does '### Task:' mean?", f"I was sent this:\n{task}"):
        assert not is_task([Message("user", text)])
    assert not is_task([Message("user", task), message("a1")]) and not is_task([])


# ------------------------------------------------------------------ transcripts


def test_resets_and_rewinds():
    one, two, three = noted("u1"), noted("u2"), noted("u3")
    entries = [*one, *two, rewind(1), *three]
    assert current(entries) == [*one, *three]
    assert standing(entries, [0, 2, 3, 2]) == [[0, 3], [], [0, 1], [0], [0, 1]]
    assert current([*entries, rewind(0), *two]) == two
    assert current([*entries, RESET, *two, rewind(1), *three]) == [*two, *three]
    assert current([*entries, RESET]) == []
    assert [turn.folded for turn in timeline(entries, 1)] == [True, False]


def test_texts_come_from_the_request_where_they_were_not_kept():
    entries = noted("u1 a a1", texts=False)
    assert texts(entries) is None
    assert texts(entries, messages("u0 u1 a1 u2")) == messages("u1 a1")
    assert texts(entries, messages("u1")) is None
    assert texts(noted("u1 a a1")) == messages("u1 a1")


WORDS = st.lists(st.sampled_from(["u1", "u2", "u3", "a1", "a2", "a", "s1", "t1"]), max_size=9)


@given(
    known=WORDS,
    sent=WORDS.filter(bool),
    told=st.sets(st.integers(0, 8)),
    more=st.tuples(*[st.booleans()] * 3),
)
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_whatever_is_sent_nothing_of_it_is_dropped(known, sent, told, more):
    """Also where it makes no sense: all that was sent is remembered, in the end what was asked, or it is refused."""
    imported, back, kept = more
    entries = [
        note(message(word), 1, kept, {TOLD: True} if i in told else {}) for i, word in enumerate(known)
    ]
    found = plan(entries, messages(" ".join(sent)), imported, back)
    if found is None:
        return
    assert 0 <= found.keep <= len(known)
    held = [*known[: found.keep], *(m.content or "a" for m in found.append)]
    assert set(sent) - {"a"} <= set(held)
    counted = [word for word in sent if word != "a"]
    assert found.matched + len(found.append) == len(counted)
    spoken = [word for word in counted if word[0] != "s"]
    if any(m.role != "system" for m in found.append):
        assert [word for word in held if word[0] != "s" and word != "a"][-1] == spoken[-1]
    if not back and not any(word[0] == "a" for word in spoken):
        assert found.keep == len(known)


@pytest.mark.parametrize("names", [["go on"], ["go on", "next"], []])
def test_long_histories_take_no_time(names):
    """20,000 messages, with the same words again and again or not, whole, trimmed, edited, and of another kind."""
    many = [
        Message("assistant" if i % 2 else "user", names[i % len(names)] if names else f"{i}")
        for i in range(20_000)
    ]
    entries = [note(m, 1, False) for m in many[:-1]]
    for sent in (many, many[5001:]):
        found = plan(entries, sent)
        assert (found.keep, found.append) == (19_999, (many[-1],))
    assert plan(entries, [*many[:5001], message("ux")]).append == (message("ux"),)
    plan(entries, [*many[:9000], *many[:9000][::-1]])


# ------------------------------------------------------------------ random clients


class Client:
    """A chat program, a server's transcript, and what is truly the conversation.

    Attributes:
        shown: what the client shows, and sends some of.
        truth: what should be remembered: all that was shown and not taken back, whether it is sent again or not.
    """

    def __init__(self, names: list[str], texts: bool):
        self.shown: list[Message] = []
        self.truth: list[Message] = []
        self.entries: list[dict[str, Any]] = []
        self.names, self.texts, self.turns = names, texts, 0

    def word(self, role: str, pick: int) -> Message:
        self.turns += 1
        name = self.names[pick % len(self.names)] if self.names else f"{role} {self.turns}"
        return Message(role, name)

    def send(self, sent: list[Message], answer: Message) -> Plan:
        found = plan(self.entries, sent)
        assert found is not None, (current(self.entries), sent)
        lost = len(current(self.entries)) - found.keep
        self.entries += [rewind(found.keep)] if lost else []
        self.entries += [note(m, 1, self.texts) for m in (*found.append, answer)]
        return found

    def remembered(self) -> list[str]:
        return [entry["sha256"] for entry in current(self.entries)]

    def expected(self) -> list[str]:
        return [note(m, 1, False)["sha256"] for m in self.truth]

    def act(self, kind: str, pick: int) -> Plan:
        answer = self.word("assistant", pick)
        asked = [i for i, m in enumerate(self.shown) if m.role == "user"]
        both = len(self.shown) == len(self.truth)  # a client that has trimmed no longer shows the beginning
        if kind in ("edited", "again") and asked and both:
            at = asked[pick % len(asked)] if kind == "edited" else asked[-1]
            new = self.word("user", pick) if kind == "edited" else self.shown[at]
            self.shown = [*self.shown[:at], new]
            self.truth = list(self.shown)
        else:
            new = [self.word("user", pick + i) for i in range(2 if kind == "two" else 1)]
            self.shown += new
            self.truth += new
        if kind == "trimmed":
            self.shown = self.shown[-(2 + pick % 5) :]
        sent = self.shown
        if kind == "alone" and len(asked) > 1:
            sent = self.shown[-1:]
        if kind == "stripped":
            sent = [Message(m.role, f" {m.content}\n", m.reasoning and "other") for m in sent]
        found = self.send(sent, answer)
        self.shown.append(answer)
        self.truth.append(answer)
        return found


KINDS = ["full", "trimmed", "stripped", "edited", "again", "two", "alone"]
ACTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 30)), min_size=1, max_size=25)


@given(acts=ACTS, texts=st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_random_clients_get_the_memory_that_is_true(acts, texts):
    client = Client([], texts)
    for kind, pick in acts:
        if kind == "edited" and client.shown and len([m for m in client.shown if m.role == "user"]) > 0:
            asked = [i for i, m in enumerate(client.shown) if m.role == "user"]
            if asked[pick % len(asked)] == 0 and len(client.shown) == len(client.truth):
                kind = "full"  # the very first message edited: nothing says that it is no new one
        client.act(kind, pick)
        assert client.remembered() == client.expected()


@given(acts=ACTS, names=st.lists(st.sampled_from(["yes", "ok", "go on", ""]), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_nothing_new_is_dropped_whatever_is_said_twice(acts, names):
    """Clients that take nothing back, with the same few words: nobody can tell which, but all is remembered."""
    client = Client([name or "hm" for name in names], True)
    for kind, pick in acts:
        if kind not in ("edited", "again"):
            found = client.act(kind, pick)
            assert found.append and found.append[-1].content.strip() == client.truth[-2].content
            held = client.remembered()
            assert set(held) == set(client.expected())
            assert held[-2:] == client.expected()[-2:]
