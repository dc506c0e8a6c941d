"""BEAM: ten abilities in conversations of 100,000 tokens to a million (Tavakoli et al., ICLR 2026).

Paper: https://arxiv.org/abs/2510.27246. Data: CC BY-SA 4.0, the folder ``chats`` of
https://github.com/mohammadtavakoli78/BEAM. ``chats/100K/1`` holds the first conversation of a size::

    chat.json, or chat_trunecated.json where there is one:
        [{"batch_number": 1,
          "turns": [[{"role": "user", "content": "…", "time_anchor": "March-15-2024", …}, …], …]}, …]
    probing_questions/probing_questions.json:
        {"abstention": [{"question": "…", "ideal_response": "…", "rubric": ["…", …]}, …],
         "event_ordering": [{"question": "…", "answer": "…", "rubric": ["…", …]}, …], …}

The paper has a model judge every point of a question's rubric with 0, 0.5 or 1; the score is their mean. The order
of events is scored by Kendall's tau-b between the rubric and the lines of the answer, which the judge matches with
each other, from 0 (reversed) to 1; ``src/evaluation/compute_metrics.py`` there. Halves count as halves, which its
code rounds off. Without a judge the score is the F1 of words with the ideal answer, which the paper does not report.
Conversations of ten million tokens have another layout and are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import DataError
from ..items import Generation, Item
from ..tasks.choosing import ask
from .base import Benchmark, register_benchmark
from .judge import Judge
from .layout import Record, find, listed, one
from .pieces import turns
from .scoring import F1

SIZES = ("100K", "128K", "500K", "1M")
QUESTIONS = "probing_questions.json"
ORDER = "event_ordering"
#: Fields that hold the ideal answer, by ability.
_IDEAL = ("answer", "ideal_response", "ideal_answer", "ideal_summary", "expected_compliance")
#: Tokens of an answer.
TOKENS = 256


@register_benchmark("beam")
@dataclass(frozen=True, kw_only=True)
class Beam(Benchmark):
    """Each conversation is an item: it is folded turn by turn, then its twenty questions are asked."""

    title = "Ten abilities in conversations of up to a million tokens (BEAM)"
    paper = "Tavakoli et al., ICLR 2026, https://arxiv.org/abs/2510.27246"
    licence, origin = "CC BY-SA 4.0", "github.com/mohammadtavakoli78/BEAM"
    file = f"100K/1/chat.json and 100K/1/probing_questions/{QUESTIONS}"
    source = "the folder chats from https://github.com/mohammadtavakoli78/BEAM"
    judged = True

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        parts: dict[str, list[Path]] = {}
        for path in find(data, [QUESTIONS], cls.source):
            size, folder = path.parts[-4:-2] if len(path.parts) > 3 else ("", "")
            if size in SIZES and folder.isdigit():
                parts.setdefault(f"beam-{size}", []).append(path)
        if not parts:
            raise DataError(
                f"{data} has no {QUESTIONS} in folders named {', '.join(SIZES)}, expected {cls.file}: download "
                f"{cls.source}"
            )
        ordered = sorted(parts.items(), key=lambda part: SIZES.index(part[0][5:]))
        return {
            part: [
                path
                for questions in sorted(paths, key=lambda path: int(path.parts[-3]))
                for path in (questions, _chat(questions.parents[1]))
            ]
            for part, paths in ordered
        }

    @property
    def scored(self) -> str:
        if self.judge:
            return f"points of rubrics by {self.judge.model} as judge, the order of events by tau-b, as in the paper"
        return "F1 of words with the ideal answer; the paper's rubrics need a judge (--judge)"

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        paths = self.paths()
        for path, chat in list(zip(paths[::2], paths[1::2], strict=True))[:limit]:
            yield self._item(path, chat, tokenizer)

    def _item(self, path: Path, chat: Path, tokenizer: Any) -> Item:
        segments = turns(tokenizer, list(_told(chat)))
        asked = one(path)
        queries = tuple(
            self._query(question, ability, tokenizer)
            for ability in asked.value
            for question in asked.objects(ability)
        )
        return Item(f"{self.name} {path.parts[-3]}", segments, {len(segments): queries}, once=True)

    def _query(self, question: Record, ability: str, tokenizer: Any) -> Generation:
        key = next((key for key in _IDEAL if key in question), _IDEAL[0])
        ideal, rubric = question.text(key), question.texts("rubric")
        rule: F1 | Rubric | Order = F1((ideal,))
        if self.judge:
            rule = (Order if ability == ORDER else Rubric)(self.judge, rubric)
        prompt = ask(tokenizer, question.text("question"))
        return Generation(prompt, (ideal,), TOKENS, ability.replace("_", "-"), rule, lines=True)


def _chat(folder: Path) -> Path:
    """The file that the paper's answers are from."""
    path = next(
        (folder / name for name in ("chat_trunecated.json", "chat.json") if (folder / name).is_file()), None
    )
    if path is None:
        raise DataError(f"{folder} has no chat.json beside {QUESTIONS}: download it again")
    return path


def _told(path: Path) -> Iterator[tuple[str, str]]:
    """Every message (role, text); one that has a date begins with it."""
    for batch in listed(path):
        for k, group in enumerate(batch.many("turns")):
            for j, message in enumerate(group if isinstance(group, list) else [group]):
                turn = Record(message, f"{batch.where}: turns[{k}][{j}]")
                if turn.value.get("role") not in ("user", "assistant"):
                    raise turn.wrong("role", "user or assistant")
                date = f"[{turn.text('time_anchor')}] " if "time_anchor" in turn else ""
                yield turn.value["role"], date + turn.text("content")


# ---------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Rubric:
    """The mean over the points of a rubric of what a judge gives each: 0, 0.5 or 1.

    Attributes:
        judge: that is asked.
        points: of the rubric.
    """

    judge: Judge
    points: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return fmean(self._of(point, text) for point in self.points)

    def _of(self, point: str, text: str) -> float:
        said = self.judge.ask(
            "Judge whether a response meets one criterion: 1 if it does, 0.5 if only in part, 0 if it does not. Only "
            f"the criterion counts, and the meaning of words rather than the words.\n\nCriterion: {point}\n\n"
            f"Response: {text}\n\nGive the number alone."
        )
        found = re.search(r"(?<![\d.])(1(?:\.0)?|0\.5|0(?:\.0)?)(?![\d.]*\d)", said)
        if found is None:
            raise DataError(
                f"the judge {self.judge.model} said {said[:60]!r}, expected 0, 0.5 or 1: take another one"
            )
        return float(found[1])


@dataclass(frozen=True)
class Order:
    """How far the lines of an answer have the order of a rubric.

    Attributes:
        judge: says which line means which point.
        points: of the rubric, in order.
    """

    judge: Judge
    points: tuple[str, ...]

    def __call__(self, text: str) -> float:
        said: list[str] = []
        free = list(self.points)
        for line in filter(None, map(str.strip, text.splitlines())):
            point = next((point for point in free if self._same(point, line)), None)
            if point is not None:
                free.remove(point)
            said.append(line if point is None else point)
        return order(self.points, said)

    def _same(self, point: str, line: str) -> bool:
        return self.judge.agrees(
            f"Do these two texts tell of the same event or fact?\n\n1. {point}\n\n2. {line}\n\nSay yes or no alone."
        )


def order(right: Sequence[str], said: Sequence[str]) -> float:
    """Kendall's tau-b of the ranks of all that is in either list, from 0 (reversed) to 1; what a list lacks is last.

    0 where tau-b is not defined.
    """
    union = list(dict.fromkeys([*right, *said]))
    ranks = []
    for items in (right, said):
        place = {item: k for k, item in enumerate(items)}
        ranks.append([place.get(item, len(union)) for item in union])
    signs = [
        ((a > b) - (a < b), (c > d) - (c < d)) for (a, c), (b, d) in combinations(zip(*ranks, strict=True), 2)
    ]
    agreed = sum(x * y for x, y in signs)
    size = math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    return (agreed / size + 1) / 2 if size else 0.0
