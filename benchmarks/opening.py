"""The first thing that people try: ten facts, told one after the other in one conversation, and asked back.

The embedded model with the memory and the settings that ``ccm chat`` ships with answers every message. After a
few more exchanges each fact is asked for, three ways: from the memory, from the full context, from nothing. The
facts were written down before any of them was tried; an answer is right if it has the expected word.

    python benchmarks/opening.py
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import torch
from common import parser, store
from rich.progress import track

import ccm
from ccm.chat.messages import Message
from ccm.cli.repl import MAX_TOKENS
from ccm.comparison import WAYS, Comparison
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
BETWEEN = ("How are you today?", "What could I cook tonight?", "Tell me something nice about autumn.")
SEED = 0


def right(answer: str, expected: str) -> bool:
    """Whether the answer has the word, or its singular."""
    return re.search(rf"\b{expected.removesuffix('s')}", answer, re.IGNORECASE) is not None


def opening(memory: str | None = None, facts: int = len(FACTS)) -> dict[str, Any]:
    """Tell, talk on, and ask back.

    Args:
        memory: as ``--memory``; None is the one that is shipped.
        facts: so many of them.
    """
    model, tokenizer = ccm.load_default_model()
    session = ccm.Session.open(model, tokenizer, memory)
    said: list[Message] = []
    torch.manual_seed(SEED)
    for text in track([told for told, _, _ in FACTS[:facts]] + list(BETWEEN), "told"):
        answer = session.generate(text, max_new_tokens=MAX_TOKENS)
        said += [Message("user", text), Message("assistant", answer)]
    comparison, rows = Comparison(session), []
    for told, asked, expected in track(FACTS[:facts], "asked"):
        answers = comparison.ask(asked, said, seed=SEED, max_new_tokens=MAX_TOKENS)
        texts = {way: answer.text for way, answer in answers.items()}
        rows.append(
            {
                "told": told,
                "asked": asked,
                "expected": expected,
                "answers": texts,
                "right": {way: right(text, expected) for way, text in texts.items()},
            }
        )
    return {
        "model": DEFAULT_MODEL,
        "memory": session.method.text,
        "settings": {**asdict(own_drawing(model)), "max_tokens": MAX_TOKENS, "seed": SEED},
        "tokens": session.stats()["tokens_seen"],
        "kv_bytes": {way: answer.kv_bytes for way, answer in answers.items() if way != "none"},
        "facts": rows,
        "right": {way: sum(row["right"][way] for row in rows) for way in WAYS},
        "said": [{"role": message.role, "content": message.content} for message in said],
    }


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--memory", help="another one, shown and not stored")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    result = opening(given.memory, given.limit or len(FACTS))
    if given.memory or given.limit:
        print(result)
    else:
        store("opening", result)
