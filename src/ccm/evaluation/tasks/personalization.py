"""Personalization: after t segments of film ratings, how will this person rate other films?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...data.conversation import unit
from ...data.movielens import MovieLens, Profile, Rating, load_profiles, segment
from ...data.sources import number
from ..items import Choice, Item
from .base import EvalTask, register_task
from .choosing import by_length, check_steps, choice, encode

_RATINGS = (1, 2, 3, 4, 5)
_LIKED = (0, 0, 0, 1, 1)


@register_task
@dataclass(frozen=True)
class Personalization(EvalTask):
    """Profiles of test users in the order of time: the newest ratings before the last fifth, which is asked for.

    The choice is among ratings from 1 to 5, not calibrated, because how a person rates at all is a part of what is
    asked; the coarser one is whether the film was liked (4 or 5). Every step asks for the same films. Users with a
    full history come first.

    Attributes:
        steps: segments of ratings before the films that are asked for; the last is how many an item has.
        ratings: per segment.
        films: asked for, of each user.
    """

    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    ratings: int = 4
    films: int = 4

    name, title = "personalization", "How a person rates films, after a profile of ratings (MovieLens 100k)"
    metrics = ("accuracy", "group_accuracy")
    licence, origin = MovieLens.licence, MovieLens.origin

    def __post_init__(self) -> None:
        check_steps(self.steps)
        number("ratings", self.ratings, 1)
        number("films", self.films, 1)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        needed = self.steps[-1] * self.ratings
        profiles = by_length(
            load_profiles("test"),
            lambda profile: len(profile.history) >= needed and len(profile.targets) >= self.films,
            lambda profile: (profile.user,),
        )
        for profile in profiles[:limit]:
            yield self._item(profile, tokenizer)

    def _item(self, profile: Profile, tokenizer: Any) -> Item:
        count = min(self.steps[-1], len(profile.history) // self.ratings)
        known = profile.history[len(profile.history) - count * self.ratings :]
        asked = sorted(profile.targets, key=lambda film: unit(f"{profile.user} {film.film}"))[: self.films]
        queries = tuple(_query(film, tokenizer) for film in asked)
        steps = [t for t in self.steps if t <= count]
        segments = tuple(
            segment(tokenizer, known[k * self.ratings : (k + 1) * self.ratings])[0] for k in range(steps[-1])
        )
        return Item(f"user {profile.user}", segments, dict.fromkeys(steps, queries))


def _query(film: Rating, tokenizer: Any) -> Choice:
    return choice(
        encode(tokenizer, film.prompt),
        [encode(tokenizer, f" {rating}") for rating in _RATINGS],
        _RATINGS.index(film.rating),
        groups=_LIKED,
    )
