"""SCBench: many requests that share one long context (Li et al., ICLR 2025).

Paper: https://arxiv.org/abs/2412.10319. Data: MIT, https://huggingface.co/datasets/microsoft/SCBench, a file for
each task (``data/scbench_kv.jsonl``, ...; parquet files of the same rows in ``scbench_kv/`` will do). A line is::

    {"context": "…",
     "multi_turns": [{"input": "…", "answer": "…", "options": ["…", …], "task": "…"}, …]}

This is the paper's multi-request mode: every request reads the same memory and changes nothing. The scores are of
``scbench/compute_scores.py`` in https://github.com/microsoft/MInference. Functions of repositories
(``scbench_repoqa``, and these requests in ``scbench_repoqa_and_kv``) are left out: they are scored against all
functions of a repository.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, needing
from ..items import Generation, Item
from ..tasks.choosing import ask
from .base import Benchmark, register_benchmark
from .layout import Record, find, records
from .pieces import lines, packed, turns
from .scoring import Part, Some

LEFT_OUT = "scbench_repoqa"
_LETTERS = "ABCD"
#: Punctuation of Chinese texts, beside that of English ones.
_CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、〃《》「」『』【】〔〕–—‘’“”…"


@dataclass(frozen=True)
class Holds:
    """1 if one of the answers stands in what is written, as it is."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return float(any(answer in text for answer in self.answers))


@dataclass(frozen=True)
class Number:
    """1 if the first number that is written is the right one, whole if that is whole."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        found = re.search(r"\d+\.\d+|\d+", text)
        right = float(self.answers[0])
        if found is None:
            return 0.0
        said = float(found[0])
        return float((int(said) if right.is_integer() else said) == right)


@dataclass(frozen=True)
class Digits:
    """1 if the first digits that are written are the right ones."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        found = re.search(r"[0-9]+", text)
        return float(found is not None and found[0] == self.answers[0])


@dataclass(frozen=True)
class Letter:
    """1 if the letter of the right option is written first, behind "answer is" or alone."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        text = text.strip()
        if text[:1] and text[0] in _LETTERS:
            return float(text[0] in self.answers)
        bare = re.sub(r"[\n\"'.,?!{}\s]+", " ", text)
        named = re.search(r"(?:answer is:?|answer:|option is) ([A-D])", bare) or re.search(
            r"\b([A-D])\b", bare
        )
        return float(named is not None and named[1] in self.answers)


@dataclass(frozen=True)
class Characters:
    """F1 of the characters of Chinese texts, without case, space and punctuation; the best over the answers."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        said = _bare(text)
        scores = []
        for gold in map(_bare, self.answers):
            common = sum((Counter(said) & Counter(gold)).values())
            scores.append(2 * common / (len(said) + len(gold)) if common else 0.0)
        return max(scores)


def _bare(text: str) -> str:
    return "".join(c for c in text.lower() if c not in string.punctuation + _CHINESE and not c.isspace())


@dataclass(frozen=True)
class RougeLsum:
    """ROUGE-Lsum of a summary, by Google's ``rouge_score`` as in the paper."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        with needing("scbench_summary needs rouge_score", "eval"):
            from rouge_score.rouge_scorer import RougeScorer
        scorer = RougeScorer(["rougeLsum"])
        return max(float(scorer.score(answer, text)["rougeLsum"].fmeasure) for answer in self.answers)


@dataclass(frozen=True)
class _Task:
    """What stands before the context, the room for an answer, and how that is scored."""

    about: str
    tokens: int
    rule: Callable[[tuple[str, ...]], Callable[[str], float]]


_PAIRS = "Here are keys and values, as JSON. You will be asked for the value of a key."
TASKS = {
    "scbench_kv": _Task(_PAIRS, 150, Holds),
    "scbench_prefix_suffix": _Task("Here are many strings. You will be asked for one of them.", 150, Holds),
    "scbench_vt": _Task("Here is a text in which variables are set.", 30, Part),
    "scbench_qa_eng": _Task(
        "Here is a book. You will be asked about it: answer as briefly as you can.", 40, Some
    ),
    "scbench_qa_chn": _Task("请阅读下面的书，然后用几个字回答问题。", 40, Characters),
    "scbench_choice_eng": _Task("Here is a book. You will be asked about it.", 40, Letter),
    "scbench_many_shot": _Task("Here are examples of a task.", 10, Some),
    "scbench_mf": _Task(
        "Here is a list of numbers. You will be asked about it: answer with a number.", 5, Number
    ),
    "scbench_summary": _Task("Here are documents. You will be asked to sum them up.", 200, RougeLsum),
    "scbench_passkey": _Task("Here is a text in which a number is hidden.", 15, Digits),
    "scbench_summary_with_needles": _Task("Here are documents in which numbers are hidden.", 800, RougeLsum),
    "scbench_repoqa_and_kv": _Task("Here are functions and, as JSON, keys and values.", 80, Holds),
}


@register_benchmark("scbench")
@dataclass(frozen=True, kw_only=True)
class SCBench(Benchmark):
    """Each line is an item: its context is folded piece by piece, then every request is put to the same memory."""

    title = "Many requests that share one context (SCBench)"
    paper = "Li et al., ICLR 2025, https://arxiv.org/abs/2412.10319"
    licence, origin = "MIT", "hub microsoft/SCBench"
    file = "scbench_kv.jsonl and its like"
    source = "the folder data from https://huggingface.co/datasets/microsoft/SCBench"
    hub, downloaded = "microsoft/SCBench", ("data/*.jsonl",)

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        if data.is_file():
            there = [data]
        else:
            patterns = [pattern for task in TASKS for pattern in (f"{task}.jsonl", f"{task}/*.parquet")]
            find(data, patterns, cls.source)  # says so if there is none of them
            there = sorted(path for path in data.rglob("*") if any(map(path.match, patterns)))
        found: dict[str, list[Path]] = {}
        for path in there:
            task = path.stem if path.suffix == ".jsonl" else path.parent.name
            if task not in TASKS:
                raise DataError(f"{path.name} is none of {', '.join(TASKS)}: download {cls.source}")
            found.setdefault(task, []).append(path)
        return {task: found[task] for task in TASKS if task in found}

    @property
    def scored(self) -> str:
        return "by task, as in the paper's scbench/compute_scores.py, in its multi-request mode"

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        rows = (record for path in self.paths() for record in records(path))
        for k, record in enumerate(rows):
            if k == limit:
                return
            yield self._item(record, k, tokenizer)

    def _item(self, record: Record, k: int, tokenizer: Any) -> Item:
        context = record.text("context" if "context" in record else "input")
        told = [("user", piece) for piece in packed(tokenizer, lines(context))]
        segments = turns(tokenizer, [("user", TASKS[self.name].about), *told])
        asked = (_query(self.name, request, tokenizer) for request in record.objects("multi_turns"))
        queries = tuple(query for query in asked if query)
        if not queries:
            raise record.wrong("multi_turns", "at least one request that can be scored")
        return Item(f"{self.name} {k}", segments, {len(segments): queries}, once=True)


def _query(name: str, request: Record, tokenizer: Any) -> Generation | None:
    """A request, scored by its own task where a file mixes two; None if that is left out."""
    name = request.text("task") if "task" in request else name
    if name == LEFT_OUT:
        return None
    if name not in TASKS:
        raise request.wrong("task", f"one of {', '.join(TASKS)}")
    task, question, right = TASKS[name], request.text("input"), request.texts("answer")
    if task.rule is Letter:
        options = request.texts("options")
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
        question = f"{question}\n{listed}\nGive the letter of the right answer."
        right = tuple(_LETTERS[options.index(text)] if text in options else text for text in right)
        if not set(right) & set(_LETTERS[: len(options)]):
            raise request.wrong("answer", "one of the options, or its letter")
    if task.rule is Number and not re.fullmatch(r"-?\d+(\.\d+)?", right[0]):
        raise request.wrong("answer", "a number")
    prompt = ask(tokenizer, question)
    return Generation(prompt, right, task.tokens, name, task.rule(right), lines=task.tokens > 100)
