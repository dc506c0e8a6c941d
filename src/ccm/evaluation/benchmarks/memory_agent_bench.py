"""MemoryAgentBench: retrieval, learning, understanding and conflicts in one long context (Hu et al., ICLR 2026).

Paper: https://arxiv.org/abs/2507.05257. Data: MIT, https://huggingface.co/datasets/ai-hyz/MemoryAgentBench, a file
for each of four abilities (``data/Accurate_Retrieval-00000-of-00001.parquet``, ...; a .json or .jsonl file of the
same rows will do). A row is::

    {"context": "…", "questions": ["…", …], "answers": [["…", …], …],
     "metadata": {"source": "factconsolidation_sh_6k", "question_types": ["…", …], "question_ids": ["…", …], …}}

The score goes by the source, as in ``utils/eval_other_utils.py`` of https://github.com/HUST-AI-HYZ/MemoryAgentBench.
EventQA wants all parts of an answer; labels and detective stories the exact answer; documents and conflicting facts
an answer that holds the right one, both as SQuAD compares texts. Chats are those of LongMemEval, with its judge.
Summaries are scored by ROUGE-L: the paper's judge of key points is not asked. Recommendations (``recsys_redial``)
are left out: their answers are numbers of films in a file that is not part of the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..items import Generation, Item
from ..metrics import rouge_l
from ..tasks.choosing import ask
from .base import Benchmark, register_benchmark
from .layout import Record, find, records
from .longmemeval import ABSTENTION, RIGHT, Judged
from .pieces import lines, packed, turns
from .scoring import F1, All, Exact, Within

PARTS = {
    "accurate-retrieval": "Accurate_Retrieval",
    "test-time-learning": "Test_Time_Learning",
    "long-range-understanding": "Long_Range_Understanding",
    "conflict-resolution": "Conflict_Resolution",
}
LEFT_OUT = "recsys"


@dataclass(frozen=True)
class _Source:
    """What is asked beside a question, the room for its answer, and how that is scored."""

    hint: str
    tokens: int
    rule: Callable[[tuple[str, ...]], Callable[[str], float]]


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L, the best over the answers."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return rouge_l(text, self.answers)


#: How the name of a source begins.
SOURCES = {
    "eventqa": _Source("Give the text of the right event alone.", 40, All),
    "icl": _Source("Give the label alone.", 20, Exact),
    "detective": _Source("Give the answer alone.", 50, Exact),
    "ruler_qa": _Source("Give the answer alone.", 50, Within),
    "factconsolidation": _Source(
        "Of facts that contradict each other, the one with the larger number holds. Give the answer alone.",
        20,
        Within,
    ),
    "longmemeval": _Source("Answer briefly.", 128, F1),
    "infbench": _Source("", 512, Rouge),
}


@register_benchmark("memory-agent-bench")
@dataclass(frozen=True, kw_only=True)
class MemoryAgentBench(Benchmark):
    """Each context is an item: it is folded piece by piece, then all questions about it are asked."""

    title = "Four abilities in one long context (MemoryAgentBench)"
    paper = "Hu et al., ICLR 2026, https://arxiv.org/abs/2507.05257"
    licence, origin = "MIT", "hub ai-hyz/MemoryAgentBench"
    file = "Accurate_Retrieval-00000-of-00001.parquet and its like"
    source = "the folder data from https://huggingface.co/datasets/ai-hyz/MemoryAgentBench"
    hub, downloaded = "ai-hyz/MemoryAgentBench", ("data/*.parquet",)
    judged = True

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        endings = ("parquet", "jsonl", "json")
        patterns = [f"{start}*.{ending}" for start in PARTS.values() for ending in endings]
        if data.is_file():
            there = [data]
        else:
            find(data, patterns, cls.source)  # says so if there is none of them
            there = sorted(path for path in data.rglob("*") if any(map(path.match, patterns)))
        found = {
            part: [path for path in there if path.name.startswith(start)] for part, start in PARTS.items()
        }
        if parts := {part: paths for part, paths in found.items() if paths}:
            return parts
        raise DataError(f"{data.name} is none of {', '.join(PARTS.values())}: download {cls.source}")

    @property
    def scored(self) -> str:
        judge = f"{self.judge.model} as judge" if self.judge else "F1 of words (its judge is not given)"
        return (
            f"by source, as in the paper's utils/eval_other_utils.py; chats by {judge}, summaries by ROUGE-L in "
            "place of a judge; recommendations are left out"
        )

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        rows = (record for path in self.paths() for record in records(path))
        known: dict[str, int] = {}
        for record in rows:
            if sum(known.values()) == limit:
                return
            source = record.object("metadata").text("source")
            if not source.startswith(LEFT_OUT):
                known[source] = known.get(source, 0) + 1
                yield self._item(record, source, known[source], tokenizer)

    def _item(self, record: Record, source: str, number: int, tokenizer: Any) -> Item:
        kind = next((kind for start, kind in SOURCES.items() if source.startswith(start)), None)
        if kind is None:
            raise record.object("metadata").wrong("source", f"one that begins with {', '.join(SOURCES)}")
        questions, answers = record.texts("questions"), record.many("answers")
        if len(questions) != len(answers):
            raise record.wrong("answers", f"one for each of {len(questions)} questions")
        told = [("user", piece) for piece in packed(tokenizer, lines(record.text("context")))]
        about = "Keep in mind what you are told now: you will be asked about it."
        segments = turns(tokenizer, [("user", about), *told])
        queries = []
        for k, question in enumerate(questions):
            right = Record({"answers": answers[k]}, f"{record.where}: answers[{k}]").texts("answers")
            rule = self._rule(record, source, k, question, right) or kind.rule(right)
            prompt = ask(tokenizer, f"{question} {kind.hint}".strip())
            long = kind.tokens > 100
            queries.append(Generation(prompt, right, kind.tokens, source, rule, lines=long))
        return Item(f"{source} {number}", segments, {len(segments): tuple(queries)}, once=True)

    def _rule(
        self, record: Record, source: str, k: int, question: str, right: tuple[str, ...]
    ) -> Judged | None:
        """The judge of a question about chats, if there is one."""
        if not self.judge or not source.startswith("longmemeval"):
            return None
        about = record.object("metadata")
        names, kinds = about.texts("question_ids"), about.texts("question_types")
        if k >= min(len(names), len(kinds)):
            raise about.wrong("question_types", "one for each question, and question_ids")
        kind = ABSTENTION if names[k].endswith("_abs") else kinds[k]
        if kind not in RIGHT:
            raise about.wrong("question_types", f"of {', '.join(RIGHT)}")
        return Judged(self.judge, question, right[0], kind)
