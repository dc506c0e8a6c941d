"""Scores of written answers, and bootstrap intervals over items."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
N = TypeVar("N", float, np.ndarray, "Tensor")

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation, articles and extra spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text is one of the answers after :func:`normalize`, else 0."""
    return float(normalize(text) in {normalize(answer) for answer in answers})


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, as bags; the best over the answers."""
    said = normalize(text).split()
    return max(_overlap(said, normalize(answer).split()) for answer in answers)


def rouge_l(text: str, answers: Sequence[str]) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of words; the best over the answers."""
    said = _words(text)
    return max(_harmonic(_subsequence(said, gold), said, gold) for gold in map(_words, answers))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _overlap(said: list[str], gold: list[str]) -> float:
    if not said or not gold:  # an answer of articles alone
        return float(said == gold)
    return _harmonic(sum((Counter(said) & Counter(gold)).values()), said, gold)


def _harmonic(common: int, said: list[str], gold: list[str]) -> float:
    return 2 * common / (len(said) + len(gold)) if common else 0.0


def _subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        last = row
        row = [0]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
    return row[-1]


# ---------------------------------------------------------------------- what methods are compared by


def recovered_share(none: N, full: N, method: N) -> N:
    """(none - method) / (none - full), of numbers, arrays or tensors of mean NLL, or of sums over the same tokens."""
    return (none - method) / (none - full)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The Pareto frontier of methods, by rising bytes: nothing with as few bytes is as good.

    It begins at no memory: what is worse than that, or only as good, is not on it.

    Args:
        points: method -> (KV bytes, quality, of which more is better); without "none" there is no frontier.
    """
    if "none" not in points:
        return []
    best, found = -math.inf, []
    for name in sorted(points, key=lambda name: (name != "none", points[name][0], -points[name][1])):
        if points[name][1] > best:
            best = points[name][1]
            found.append(name)
    return found


# ---------------------------------------------------------------------- intervals


def bootstrap(
    statistic: Callable[..., Array], *columns: Array, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic of sums over items, by resampling items.

    All columns are resampled together, so differences of methods on the same items are paired.

    Args:
        statistic: sums of the columns over the items of each draw, each (draws,) -> values (draws,).
        columns: one number per item, each (n,).
        draws, seed: how many resamples, and which.

    Returns:
        (low, high); not a number if no draw gives a finite value.
    """
    counts = _counts(len(columns[0]), draws, seed)
    with np.errstate(all="ignore"):
        values = statistic(*(counts @ np.asarray(column, dtype=np.float64) for column in columns))
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _counts(n: int, draws: int, seed: int) -> Array:
    """How often each item is in each draw, (draws, n)."""
    picks = np.random.default_rng(seed).integers(n, size=(draws, n))
    counts = np.zeros((draws, n))
    np.add.at(counts, (np.arange(draws)[:, None], picks), 1)
    return counts
