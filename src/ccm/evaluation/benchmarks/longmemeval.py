"""LongMemEval: questions about many chats of one user with an assistant (Wu et al., ICLR 2025).

Paper: https://arxiv.org/abs/2410.10813. Data: MIT, https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned.
``longmemeval_oracle.json`` has only the chats that matter, ``longmemeval_s_cleaned.json`` (before its cleaning
``longmemeval_s.json``) about 115,000 tokens a question, ``longmemeval_m_cleaned.json`` about 1.5 million. A record::

    {"question_id": "…", "question_type": "temporal-reasoning", "question": "…", "answer": "…",
     "question_date": "2023/05/30 (Tue) 23:40", "haystack_dates": ["2023/05/20 (Sat) 02:21", …],
     "haystack_session_ids": ["…", …],
     "haystack_sessions": [[{"role": "user", "content": "…", "has_answer": true}, …], …],
     "answer_session_ids": ["…"]}

An id that ends with ``_abs`` is that of a question without an answer. The paper has a model judge whether an answer
is right, by the kind of question, and its prompts are in ``src/evaluation/evaluate_qa.py`` there; the judge here is
asked for the same in other words. Without a judge the score is the F1 of words, which the paper does not report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..items import Generation, Item
from ..tasks.choosing import ask
from .base import Benchmark, register_benchmark
from .judge import Judge
from .layout import Record, find, listed
from .pieces import turns
from .scoring import F1

ABSTENTION = "abstention"
#: Kind of question -> what makes an answer right.
RIGHT = {
    "single-session-user": (
        "It is right if it contains the correct answer, means the same, or has every step that leads to it. It is "
        "wrong if only a part of what the correct answer says is in it."
    ),
    "temporal-reasoning": (
        "It is right if it contains the correct answer, means the same, or has every step that leads to it. It is "
        "wrong if only a part of what the correct answer says is in it. A number of days, weeks or months that is "
        "off by one is right."
    ),
    "knowledge-update": (
        "It is right if what is up to date in it is the correct answer; older facts beside that do no harm."
    ),
    "single-session-preference": (
        "The correct answer describes what a response to this user should be like. The response is right if it "
        "recalls what the user said of themselves and uses it correctly; it need not follow every point."
    ),
    ABSTENTION: (
        "The question cannot be answered, and what is called the correct answer explains why. The response is right "
        "if it says that it cannot be answered, that something is not known, or that only something else is."
    ),
}
RIGHT["single-session-assistant"] = RIGHT["multi-session"] = RIGHT["single-session-user"]
#: Tokens of an answer.
TOKENS = 128


@register_benchmark("longmemeval")
@dataclass(frozen=True, kw_only=True)
class LongMemEval(Benchmark):
    """Each question is an item: all its chats, by their dates, are folded turn by turn, then it is asked."""

    title = "Questions about many chats of one user (LongMemEval)"
    paper = "Wu et al., ICLR 2025, https://arxiv.org/abs/2410.10813"
    licence, origin = "MIT", "hub xiaowu0162/longmemeval-cleaned"
    file = "longmemeval_s_cleaned.json or longmemeval_oracle.json"
    source = f"{file} from https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned"
    hub, downloaded = "xiaowu0162/longmemeval-cleaned", ("longmemeval_s_cleaned.json",)
    judged = True

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        names = [f"longmemeval_{name}.json" for name in ("s_cleaned", "s", "oracle", "m_cleaned", "m")]
        return {cls.key: find(data, names, cls.source)[:1]}

    @property
    def scored(self) -> str:
        if self.judge:
            return f"accuracy by {self.judge.model} as judge, asked for what the paper's judge is asked for"
        return "F1 of words; the paper's accuracy needs a judge (--judge)"

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for k, record in enumerate(listed(self.paths()[0])):
            if k == limit:
                return
            yield self._item(record, tokenizer)

    def _item(self, record: Record, tokenizer: Any) -> Item:
        name, question, answer = (record.text(key) for key in ("question_id", "question", "answer"))
        kind = ABSTENTION if name.endswith("_abs") else record.text("question_type")
        if kind not in RIGHT:
            raise record.wrong("question_type", f"one of {', '.join(RIGHT)}")
        segments = turns(tokenizer, list(_told(record)))
        asked = ask(tokenizer, f"Today is {record.text('question_date')}. {question} Answer briefly.")
        rule = Judged(self.judge, question, answer, kind) if self.judge else F1((answer,))
        query = Generation(asked, (answer,), TOKENS, kind, rule, lines=True)
        return Item(name, segments, {len(segments): (query,)}, once=True)


def _told(record: Record) -> Iterator[tuple[str, str]]:
    """Every turn of every chat (role, text), the oldest chat first; its first turn begins with the date."""
    dates, sessions = record.texts("haystack_dates"), record.many("haystack_sessions")
    if len(dates) != len(sessions):
        raise record.wrong("haystack_dates", f"one for each of {len(sessions)} haystack_sessions")
    for k in sorted(range(len(dates)), key=lambda k: dates[k]):
        date = f"[{dates[k]}] "
        for j, turn in enumerate(sessions[k]):
            turn = Record(turn, f"{record.where}: haystack_sessions[{k}][{j}]")
            if turn.value.get("role") not in ("user", "assistant"):
                raise turn.wrong("role", "user or assistant")
            if not isinstance(turn.value.get("content"), str):
                raise turn.wrong("content", "a text")
            if turn.value["content"].strip():
                yield turn.text("role"), date + turn.text("content")
                date = ""


@dataclass(frozen=True)
class Judged:
    """1 if a judge calls an answer right, else 0.

    Attributes:
        judge: that is asked.
        question, answer: what was asked, and what is right.
        kind: of question, which says when an answer is right.
    """

    judge: Judge
    question: str
    answer: str
    kind: str

    def __call__(self, text: str) -> float:
        return float(
            self.judge.agrees(
                f"Judge whether a response to a question is right. {RIGHT[self.kind]}\n\n"
                f"Question: {self.question}\n\nCorrect answer: {self.answer}\n\n"
                f"Response: {text}\n\nIs the response right? Say yes or no, nothing else."
            )
        )
