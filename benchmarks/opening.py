"""The first thing that people try: a fact is told in a chat, and asked back.

The embedded model with the settings that ``ccm chat`` ships with answers every message, once with its memory and once
with that of the server. Each of ten
facts has a chat of its own, and is asked for at once and after four exchanges about something else. Then all ten are
told in one chat, and asked for at its end. Every question is answered three ways: from the memory, from the full
context, from nothing. The facts were written down before any of them was tried; an answer is right if it has the
expected word.

    python benchmarks/opening.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from common import parser, store
from rich.progress import track

import ccm
from ccm.chat.messages import Message
from ccm.cli.repl import MAX_TOKENS
from ccm.comparison import WAYS, Compared, Comparison, Way
from ccm.methods.default import ADAPTER, TALKING
from ccm.models.generation import own_drawing
from ccm.models.load import DEFAULT_MODEL

#: What is told, what is asked, and the word that a right answer has.
FACTS = (
    ("My name is Elena.", "What is my name?", "Elena"),
    ("My dog is called Biscuit.", "What is my dog called?", "Biscuit"),
    ("I live in Porto.", "Which town do I live in?", "Porto"),
    ("I am allergic to peanuts.", "What am I allergic to?", "peanuts"),
    ("I work as a carpenter.", "What is my job?", "carpenter"),
    ("My sister is called Ingrid.", "What is my sister called?", "Ingrid"),
    ("My cat is called Miso.", "What is my cat called?", "Miso"),
    ("I grew up in Tampere.", "Where did I grow up?", "Tampere"),
    ("My brother works as a nurse.", "What does my brother do for a living?", "nurse"),
    ("My son is allergic to eggs.", "What is my son allergic to?", "eggs"),
)
#: Said between telling and asking.
BETWEEN = (
    "How are you today?",
    "What could I cook tonight?",
    "Tell me something nice about autumn.",
    "What is a good way to relax?",
)
#: When each question is asked: in a chat of its own, or in that of all facts.
TIMES = ("at once", "after four exchanges", "ten in one chat")
#: Of ``ccm chat``, and of the server.
MEMORIES = (TALKING, ADAPTER)
SEED = 0


def right(answer: str, expected: str) -> bool:
    """Whether the answer has the word, or its singular."""
    return re.search(rf"\b{expected.removesuffix('s')}", answer, re.IGNORECASE) is not None


class Chat:
    """One conversation, as ``ccm chat`` has it.

    Args:
        session: before anything was said.
    """

    def __init__(self, session: ccm.Session):
        self.session, self.said = session, list[Message]()
        self.comparison = Comparison(session)

    def say(self, text: str) -> None:
        """One message, and its answer."""
        torch.manual_seed(SEED)
        answer = self.session.generate(text, max_new_tokens=MAX_TOKENS)
        self.said += [Message("user", text), Message("assistant", answer)]

    def ask(self, question: str, ways: Sequence[Way]) -> dict[Way, Compared]:
        """The answers, by what they are from; the conversation does not change."""
        return self.comparison.ask(question, self.said, ways=ways, seed=SEED, max_new_tokens=MAX_TOKENS)


def opening(memory: str, alone: int = len(FACTS), together: int = len(FACTS)) -> dict[str, Any]:
    """Tell, talk on, and ask back.

    Args:
        memory: as ``--memory``.
        alone: so many of the facts, each in a chat of its own.
        together: so many of them in one chat; 0 leaves it out.
    """
    model, tokenizer = ccm.load_model(decode_in="auto")
    fresh = ccm.Session.open(model, tokenizer, memory)
    rows: list[dict[str, Any]] = []
    held: dict[str, dict[Way, int]] = {}

    def asked(chat: Chat, row: dict[str, Any], time: str) -> None:
        answers = chat.ask(row["asked"], ("memory", "full"))
        texts = {way: answer.text for way, answer in answers.items()} | {"none": row["none"]}
        row["answers"][time] = texts
        row["right"][time] = {way: right(text, row["expected"]) for way, text in texts.items()}
        held[time] = {way: answer.kv_bytes for way, answer in answers.items()}

    for told, question, expected in track(FACTS[: max(alone, together)], "in chats of their own"):
        chat = Chat(fresh.fork())
        nothing = chat.ask(question, ("none",))["none"].text
        row = {"told": told, "asked": question, "expected": expected, "none": nothing}
        rows.append(row | {"answers": {}, "right": {}})
        if len(rows) <= alone:
            chat.say(told)
            asked(chat, rows[-1], TIMES[0])
            for text in BETWEEN:
                chat.say(text)
            asked(chat, rows[-1], TIMES[1])
    chat = Chat(fresh.fork())
    texts = [told for told, _, _ in FACTS[:together]] + list(BETWEEN)
    for text in track(texts if together else [], "in one chat"):
        chat.say(text)
    for row in rows[:together]:
        asked(chat, row, TIMES[2])
    return {
        "model": DEFAULT_MODEL,
        "memory": fresh.method.text,
        "settings": {**asdict(own_drawing(model)), "max_tokens": MAX_TOKENS, "seed": SEED},
        "tokens": chat.session.stats()["tokens_seen"],
        "kv_bytes": held,
        "right": {
            time: {way: sum(row["right"][time][way] for row in rows if time in row["right"]) for way in WAYS}
            for time in held
        },
        "facts": rows,
    }


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--memory", help="another one, shown and not stored")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    few = given.limit or len(FACTS)
    if given.memory or given.limit:
        print(opening(given.memory or TALKING, few, few))
    else:
        store("opening", {"memories": {memory: opening(memory) for memory in MEMORIES}})
