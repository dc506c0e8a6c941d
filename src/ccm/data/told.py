"""Small talk in which facts are told that are asked for later (see :mod:`ccm.data.telling`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .chitchat import ChitChat
from .conversation import Split
from .formats import Said, Style
from .sources import numbers, register_source, share
from .telling import plant_told


@register_source
class ToldFacts(ChitChat):
    """Small talk in which people tell facts about themselves that are asked for later.

    Args:
        told: facts in a row, drawn from these; held-out rows have the first of them.
        changed: share of the facts that change before they are asked for.
        turns, formats, cap_per_user, limit: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "told", "Facts told in small talk, some of which change, and asked for later (made up)"
    size = "without end"
    licence, origin = "MIT; facts made up", f"{ChitChat.origin}, generated, seeded"

    def __init__(
        self,
        tokenizer: Any,
        told: int | Sequence[int] = (2, 4, 8),
        changed: float = 0.25,
        turns: int | Sequence[int] = (8, 16, 32, 64),
        formats: Any = "template",
        **options: Any,
    ):
        super().__init__(tokenizer, turns=turns, formats=formats, **options)
        self.told, self.changed = numbers("told", told, 1), share("changed", changed)

    def planted(self, said: list[Said], style: Style, rng: random.Random, split: Split) -> list[Said]:
        count = rng.choice(self.told) if split == "train" else self.told[0]
        return plant_told(said, rng, count, self.changed, style.people, split)
