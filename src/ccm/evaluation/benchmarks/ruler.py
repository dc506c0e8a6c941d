"""RULER: needles, chains of variables, frequent words and questions in texts of any length (Hsieh et al., COLM 2024).

Paper: https://arxiv.org/abs/2404.06654. Code: Apache-2.0, https://github.com/NVIDIA/RULER, whose tasks, sizes and
scores (``scripts/synthetic.yaml``, ``scripts/eval/synthetic/constants.py``) these are. No file is needed: all texts
are made here, always the same, from words that are kept here. So they differ from those of the paper in three ways.
Essays are novels of the project's own data in place of Paul Graham's. Documents are those of SQuADShifts in place of
SQuAD, and there is no HotpotQA (``qa_2``). The wording is this library's own, and no worked example precedes it.

A text is cut between its sentences into segments, which are folded one by one. Its length, in tokens of the model,
counts all of it: segments, question and room for the answer.
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from ...data.books import load_books
from ...data.squad import Question, load_squad_shifts
from ...errors import ConfigError, UnknownNameError
from ..items import Generation, Item
from ..tasks.choosing import ask, check_steps
from ..tasks.coqa import sentences
from .base import Benchmark, register_benchmark
from .pieces import packed, turns
from .scoring import Part, Some
from .words import ADJECTIVES, NOUNS

#: Places of needles in a text, in per cent of its sentences.
DEPTHS = tuple(round(k * 100 / 39) for k in range(40))
#: A text without content.
NOISE = "The rain fell on the roof. The road was long and grey. A dog ran by. Then it was quiet again."
#: Most sentences that a text is tried with.
_MOST = 1 << 17


@dataclass(frozen=True)
class Text:
    """A text and what is asked about it.

    Attributes:
        about: what stands before it.
        parts: its sentences or words, in order.
        question: what is asked.
        stem: how the answer begins.
        answers: what the answer must hold.
        depths: of each needle, how many per cent of the other sentences stand before it.
    """

    about: str
    parts: tuple[str, ...]
    question: str
    stem: str
    answers: tuple[str, ...]
    depths: tuple[int, ...] = ()


class Kind(ABC):
    """A task of RULER: how a text of some size is made, and how answers to it are scored.

    Attributes:
        tokens: room for the answer.
        between: what stands between two parts of the text.
        least: parts of the smallest text.
    """

    tokens: ClassVar[int] = 128
    between: ClassVar[str] = " "
    least: ClassVar[int] = 1

    @abstractmethod
    def text(self, rng: random.Random, size: int) -> Text:
        """The text with ``size`` parts, beside needles; another size has the same needles."""

    def rule(self, text: Text) -> Part | Some:
        """The score of an answer."""
        return Part(text.answers)


# ---------------------------------------------------------------------- needles


@dataclass(frozen=True)
class Needles(Kind):
    """Values of keys, told somewhere in a text.

    Attributes:
        hay: "noise", "essay", or "needles" of other keys.
        key, value: "words", "numbers" or "uuids".
        keys: of them that are told.
        values: of each key.
        asked: keys that are asked for.
    """

    hay: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def text(self, rng: random.Random, size: int) -> Text:
        kind = "secret code" if self.value == "uuids" else "secret number"
        told = {
            _name(rng, self.key): [_name(rng, self.value) for _ in range(self.values)]
            for _ in range(self.keys)
        }
        needles = [_needle(kind, key, value) for key, values in told.items() for value in values]
        rng.shuffle(needles)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        keys = rng.sample(list(told), self.asked)
        start = rng.random()
        answers = tuple(value for key in keys for value in told[key])
        several = "s" if len(answers) > 1 else ""
        names = " and ".join(keys)
        return Text(
            f"Some {kind}s are hidden in the following text. Keep them in mind: you will be asked for them.",
            tuple(_planted(self._hay(kind, rng, start, size, told), needles, depths)),
            f"What {'are' if several else 'is'} the {kind}{several} of {names} in the text?",
            f"The {kind}{several} of {names} {'are' if several else 'is'}",
            answers,
            tuple(depths),
        )

    def _hay(
        self, kind: str, rng: random.Random, start: float, size: int, told: Collection[str]
    ) -> Sequence[str]:
        if self.hay == "noise":
            return [NOISE] * size
        if self.hay == "needles":
            names = (_name(rng, self.key) for _ in itertools.count())
            others = itertools.islice((name for name in names if name not in told), size)
            return [_needle(kind, name, _name(rng, self.value)) for name in others]
        essay = _essay()
        first = int(start * len(essay))
        return [essay[(first + k) % len(essay)] for k in range(size)]


def _needle(kind: str, key: str, value: str) -> str:
    return f"One {kind} of {key} is: {value}."


def _name(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randrange(1_000_000, 10_000_000))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _planted(hay: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> Iterator[str]:
    """Needles in a text, each behind as many per cent of its sentences as its depth says."""
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        upto = len(hay) * depth // 100
        yield from hay[done:upto]
        yield needle
        done = upto
    yield from hay[done:]


@lru_cache(maxsize=1)
def _essay() -> tuple[str, ...]:
    """Sentences of the held-out novels."""
    books = load_books()["test"]
    return tuple(
        " ".join(sentence.split())
        for title in sorted(books)
        for sentence in sentences(books[title])
        if sentence.split()
    )


# ---------------------------------------------------------------------- the other tasks


@dataclass(frozen=True)
class Chain(Kind):
    """A variable gets a number, and each of four others that of the one before it; all of them are asked for."""

    hops: int = 4
    tokens: ClassVar[int] = 30

    def text(self, rng: random.Random, size: int) -> Text:
        names: list[str] = []
        while len(set(names)) < self.hops + 1:
            names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(self.hops + 1)]
        value = str(rng.randrange(10_000, 100_000))
        told = [f"VAR {names[0]} = {value}."]
        told += [f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(names)]
        depths = sorted(rng.sample(DEPTHS, len(told)))
        return Text(
            "Some variables are set in the following text. Keep in mind what each of them is.",
            tuple(_planted([NOISE] * size, told, depths)),
            f"Which variables are set to {value} in the text, directly or through others?",
            f"The {len(names)} variables that are set to {value} are:",
            tuple(names),
            tuple(depths),
        )


@dataclass(frozen=True)
class CommonWords(Kind):
    """A numbered list in which ten words come ten times as often as the others; they are asked for."""

    common: int = 10
    tokens: ClassVar[int] = 120
    least: ClassVar[int] = 10

    def text(self, rng: random.Random, size: int) -> Text:
        # as often as in the paper, where the text is long enough; size counts the words of the list
        often, seldom = (30, 3) if size >= 30 * self.common + 3 * 30 else (10, 1)
        words = [*ADJECTIVES, *NOUNS, *(f"{a}-{n}" for a in ADJECTIVES for n in NOUNS)]
        few = max(1, (size - often * self.common) // seldom)
        known = len(ADJECTIVES) + len(NOUNS)
        pool = rng.sample(words[: max(known, few + self.common)], few + self.common)
        answers, others = pool[: self.common], pool[self.common :]
        listed = answers * often + others * seldom
        rng.shuffle(listed)
        return Text(
            "This is a numbered list of words. Some come more often than others: keep those in mind.",
            tuple(f"{k}. {word}" for k, word in enumerate(listed, 1)),
            f"Which {self.common} words come most often in the list?",
            f"The {self.common} words that come most often are:",
            tuple(answers),
        )


@dataclass(frozen=True)
class FrequentWords(Kind):
    """Made-up words whose k-th comes in proportion to k to the power -2; the three behind the first are asked for.

    The first is "...", which stands for noise.
    """

    tokens: ClassVar[int] = 50
    least: ClassVar[int] = 64  # of fewer, the third is no more frequent than others

    def text(self, rng: random.Random, size: int) -> Text:
        coded = ["...", *("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(size // 8 + 3))]
        weights = [k**-2 for k in range(1, len(coded) + 1)]
        counts = [max(1, int(size * weight / sum(weights))) for weight in weights]
        said = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        rng.shuffle(said)
        return Text(
            "This text is made of coded words. Keep in mind how often each comes; the dots are none.",
            tuple(said),
            "Which three coded words come most often in the text? Leave the dots aside.",
            "The three coded words that come most often are:",
            tuple(coded[1:4]),
        )


@dataclass(frozen=True)
class Documents(Kind):
    """A question about one of many paragraphs."""

    tokens: ClassVar[int] = 32
    between: ClassVar[str] = "\n\n"

    def text(self, rng: random.Random, size: int) -> Text:
        paragraphs = [paragraph for some in load_squad_shifts().values() for paragraph in some]
        chosen = rng.choice(
            [paragraph for paragraph in paragraphs if any(map(_answered, paragraph.questions))]
        )
        question = rng.choice(list(filter(_answered, chosen.questions)))
        depth = rng.choice(DEPTHS)
        others = [rng.choice(paragraphs).text for _ in range(size)]
        documents = _planted(others, [chosen.text], [depth])
        return Text(
            "Read these documents: you will be asked about one of them.",
            tuple(f"Document {k}: {text}" for k, text in enumerate(documents, 1)),
            f"{question.text} Answer from the documents, with the answer alone.",
            "",
            question.answers,
            (depth,),
        )

    def rule(self, text: Text) -> Some:
        return Some(text.answers)


def _answered(question: Question) -> bool:
    return bool(question.answers)


KINDS: dict[str, Kind] = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, asked=4),
    "vt": Chain(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Documents(),
}


@register_benchmark("ruler")
@dataclass(frozen=True, kw_only=True)
class Ruler(Benchmark):
    """One of RULER's tasks, a text of every length in turn.

    Attributes:
        lengths: tokens of a text, the question and the room for the answer included.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)

    title = "Needles, chains and frequent words in long texts (RULER)"
    paper = "Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654"
    licence, origin = "Apache-2.0 (made up); novels in the public domain; SQuADShifts", "generated, seeded"
    generated = True

    def __post_init__(self) -> None:
        check_steps(self.lengths, 1, "lengths")
        if self.name not in KINDS:
            raise UnknownNameError("task of RULER", self.name, list(KINDS))

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        return {name: [] for name in KINDS}

    @property
    def scored(self) -> str:
        return "share of the right answers that stand in what is written, as in the paper; one of them for questions"

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        for k in range(limit):
            length = self.lengths[k % len(self.lengths)]
            yield fitted(self.name, length, k // len(self.lengths), tokenizer)


def fitted(name: str, length: int, k: int, tokenizer: Any) -> Item:
    """The k-th text of a task with as many sentences as fit a length.

    Raises:
        ConfigError: not even the smallest text fits.
    """
    kind = KINDS[name]
    size, item = kind.least, _item(name, length, k, kind.least, tokenizer)
    if item is None:
        raise ConfigError(f"{name} has no text of {length} tokens: give --lengths larger ones")
    step = size
    while size + step < _MOST and (found := _item(name, length, k, size + step, tokenizer)):
        size, step, item = size + step, 2 * step, found
    while step := step // 2:
        if found := _item(name, length, k, size + step, tokenizer):
            size, item = size + step, found
    return item


def _item(name: str, length: int, k: int, size: int, tokenizer: Any) -> Item | None:
    """The k-th text of a task with so many sentences; None if it is longer than allowed."""
    kind = KINDS[name]
    text = kind.text(random.Random(f"{name} {k}"), size)
    parts = [part + kind.between for part in text.parts]
    segments = turns(tokenizer, [("user", piece) for piece in [text.about, *packed(tokenizer, parts)]])
    prompt = ask(tokenizer, text.question, text.stem)
    if sum(map(len, segments)) + len(prompt) + kind.tokens > length:
        return None
    lines = len(text.answers) > 1 and not isinstance(kind, Documents)
    query = Generation(prompt, text.answers, kind.tokens, f"{length} tokens", kind.rule(text), lines)
    return Item(f"{length} tokens {k}", segments, {len(segments): (query,)}, once=True)
