"""Rules that several benchmarks share: what was written -> a score from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..metrics import exact_match, f1, normalize


@dataclass(frozen=True)
class Part:
    """The share of some texts that stand in an answer, whatever their case (``string_match_all`` of RULER)."""

    texts: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return sum(part.lower() in text.lower() for part in self.texts) / len(self.texts)


@dataclass(frozen=True)
class All:
    """1 if all of some texts stand in an answer, whatever their case, else 0."""

    texts: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return float(Part(self.texts)(text) == 1)


@dataclass(frozen=True)
class Some:
    """1 if one of some texts stands in an answer, whatever their case, else 0 (``string_match_part`` of RULER)."""

    texts: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return float(any(part.lower() in text.lower() for part in self.texts))


@dataclass(frozen=True)
class Within:
    """1 if an answer holds one of the right ones, both as SQuAD compares texts."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return float(any(normalize(answer) in normalize(text) for answer in self.answers))


@dataclass(frozen=True)
class Exact:
    """1 if an answer, or what stands in it behind "answer:" or "label:", is a right one as SQuAD compares texts."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return max(exact_match(said, self.answers) for said in answered(text))


@dataclass(frozen=True)
class F1:
    """F1 of words as SQuAD compares them, the best over the right answers."""

    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return f1(text, self.answers)


def answered(text: str) -> Sequence[str]:
    """An answer, and what it says behind "answer:" or "label:"."""
    found = re.search(r"\b(?:answer|label)\s*:(.*)", text, re.IGNORECASE)
    return [text, found[1].strip()] if found else [text]
