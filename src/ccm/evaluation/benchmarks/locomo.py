"""LoCoMo: questions about conversations of two people over many months (Maharana et al., ACL 2024).

Paper: https://arxiv.org/abs/2402.17753. Data: CC BY-NC 4.0, ``data/locomo10.json`` of
https://github.com/snap-research/locomo, ten conversations with 1,986 questions. A record of the file is::

    {"sample_id": "conv-26",
     "conversation": {"speaker_a": "…", "speaker_b": "…",
                      "session_1_date_time": "…", "session_1": [{"speaker": "…", "dia_id": "D1:1", "text": "…",
                                                                 "blip_caption": "…"}, …], …},
     "qa": [{"question": "…", "answer": "…", "evidence": ["D1:3"], "category": 2},
            {"question": "…", "adversarial_answer": "…", "category": 5}, …]}

Scores are those of ``task_eval/evaluation.py`` there: words without case, punctuation and "a", "an", "the", "and",
stemmed by Porter's rules; F1 of them as bags. Multi-hop answers are lists by commas: each part of the right answer
gets its best F1 with a part of what was said, and the mean counts. Of open-domain answers what stands before the
first semicolon counts. Adversarial questions have no answer in the conversation: two are offered, and it is right to
say that there is no information.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import needing
from ..items import Generation, Item
from ..tasks.choosing import ask
from .base import Benchmark, register_benchmark
from .layout import Record, find, listed
from .pieces import turns

MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP, ADVERSARIAL = 1, 2, 3, 4, 5
CATEGORIES = {
    MULTI_HOP: "multi-hop",
    TEMPORAL: "temporal",
    OPEN_DOMAIN: "open-domain",
    SINGLE_HOP: "single-hop",
    ADVERSARIAL: "adversarial",
}
NOTHING = "No information available"
#: What stands before a question.
ASKED = "Answer this question about the conversations in a few words, with words from them where you can:"
#: What says that there is no answer.
_NONE = ("no information available", "not mentioned")
#: Tokens of an answer, as in the paper's code.
TOKENS = 50
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@register_benchmark("locomo")
@dataclass(frozen=True, kw_only=True)
class Locomo(Benchmark):
    """Each conversation is an item: its turns are folded one by one, then all questions are asked."""

    title = "Questions about conversations of many months (LoCoMo)"
    paper = "Maharana et al., ACL 2024, https://arxiv.org/abs/2402.17753"
    licence, origin = "CC BY-NC 4.0", "github.com/snap-research/locomo"
    file, source = "locomo10.json", "data/locomo10.json from https://github.com/snap-research/locomo"

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        return {cls.key: find(data, [cls.file], cls.source)[:1]}

    @property
    def scored(self) -> str:
        return "F1 of stemmed words by category, as in the paper's task_eval/evaluation.py"

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for k, record in enumerate(listed(self.paths()[0])):
            if k == limit:
                return
            yield _item(record, tokenizer)


def _item(record: Record, tokenizer: Any) -> Item:
    name, talk = record.text("sample_id"), record.object("conversation")
    said = [("user", _opening(talk)), *(("user", text) for text in spoken(talk))]
    segments = turns(tokenizer, said)
    queries = tuple(_query(qa, f"{name} {k}", tokenizer) for k, qa in enumerate(record.objects("qa")))
    return Item(name, segments, {len(segments): queries}, once=True)


def _opening(talk: Record) -> str:
    both = f"{talk.text('speaker_a')} and {talk.text('speaker_b')}"
    return f"These are conversations between {both}. The date of each stands at its beginning."


def spoken(talk: Record) -> Iterator[str]:
    """Every turn, behind its speaker's name; the first of a session behind the session's date."""
    numbers = sorted(int(found[1]) for key in talk.value if (found := re.fullmatch(r"session_(\d+)", key)))
    if not numbers:
        raise talk.wrong("session_1", "a list of turns")
    for number in numbers:
        key = f"session_{number}"
        date = f"[{talk.text(f'{key}_date_time')}] " if talk.many(key) else ""
        for turn in talk.objects(key):
            shown = f" [shows a picture: {turn.text('blip_caption')}]" if "blip_caption" in turn else ""
            words = turn.text("text") if turn.value.get("text") or not shown else ""
            yield f"{date}{turn.text('speaker')}: {words}{shown}"
            date = ""


def _query(qa: Record, name: str, tokenizer: Any) -> Generation:
    category, question = qa.value.get("category"), qa.text("question")
    if category not in CATEGORIES:
        raise qa.wrong("category", "a number from 1 to 5")
    options: tuple[str, ...] = ()
    if category == ADVERSARIAL:
        wrong = qa.text("adversarial_answer" if "adversarial_answer" in qa else "answer")
        options = (NOTHING, wrong) if random.Random(name).random() < 0.5 else (wrong, NOTHING)
        question += f" (a) {options[0]} (b) {options[1]}. Answer with (a) or (b)."
    elif category == TEMPORAL:
        question += " Go by the dates of the conversations; an approximate date will do."
    asked = f"{ASKED} {question}"
    right = NOTHING if category == ADVERSARIAL else qa.text("answer")
    rule = Rule(category, right, options)
    return Generation(ask(tokenizer, asked), (right,), TOKENS, CATEGORIES[category], rule)


# ---------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Rule:
    """The score of an answer, from 0 to 1.

    Attributes:
        category: of the question.
        right: the answer to it.
        options: the two that an adversarial question offers, (a) and (b).
    """

    category: int
    right: str
    options: tuple[str, ...] = ()

    def __call__(self, text: str) -> float:
        if self.category == ADVERSARIAL:
            return float(any(words in self._chosen(text).lower() for words in _NONE))
        if self.category == MULTI_HOP:
            return several(text, self.right)
        return f1(text, self.right.split(";")[0] if self.category == OPEN_DOMAIN else self.right)

    def _chosen(self, text: str) -> str:
        """The option that an answer names by its letter; else the answer."""
        letter = re.match(r"\W*([ab])\b", text.lower())
        named = [found for found in ("(a)", "(b)") if found in text.lower()]
        if len(named) == 1:
            return self.options["(a)(b)".index(named[0]) // 3]
        return self.options["ab".index(letter[1])] if letter and len(text.strip()) <= 3 else text


def several(text: str, right: str) -> float:
    """Mean over the parts of the right answer, between commas, of the best F1 with a part of the text."""
    said = text.split(",")
    return fmean(max(f1(part, gold) for part in said) for gold in right.split(","))


def f1(text: str, right: str) -> float:
    """F1 of stemmed words, as bags."""
    said, gold = stems(text), stems(right)
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold)) if common else 0.0


def stems(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles, each as its stem.

    Raises:
        MissingPackageError: nltk is not installed.
    """
    bare = re.sub(r"\b(a|an|the|and)\b", " ", text.lower().translate(_PUNCTUATION))
    return [_stemmer().stem(word) for word in bare.split()]


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    with needing("LoCoMo's scores need nltk", "eval"):
        from nltk.stem import PorterStemmer
    return PorterStemmer()
