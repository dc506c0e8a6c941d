"""Real conversations between two people: the Chit-Chat Challenge data set (PyPI ``chitchat-dataset``, MIT).

Of its 7168 records 4017 hold messages of two people (2731 of them in 8 turns or more); the rest is dropped.
Keeping every person in one split costs the conversations between splits, and the cap on the few very busy
people costs more. What is left, with the default arguments and without the cap:

============  ==========================  ==========================
split         ``cap_per_user=8``          ``cap_per_user=None``
============  ==========================  ==========================
train         570 (20907 turns)           1448 (69033 turns)
validation    50 (1952 turns)             72 (3116 turns)
test          94 (3605 turns)             136 (5711 turns)
============  ==========================  ==========================

With ``min_turns=10`` and the cap: 531, 47 and 92 conversations. A turn has 15 to 16 words on average.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import groupby
from typing import Any

from ..errors import ConfigError, DataError
from ..models import packages
from .archives import Archive
from .conversation import SPLITS, Conversation, Split, Turn, check_split, unit
from .conversational import ConversationSource
from .sources import number, register_source

PACKAGE, VERSION, MEMBER = "chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json"

_HUB = 400  # users with more conversations than this (two of them) always belong to train
_REGULAR = 5  # users with at least so many conversations are drawn; the others follow their partners
_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.67), ("validation", 0.15), ("test", 0.18))


def load_chitchat(split: Split, min_turns: int = 8, cap_per_user: int | None = 8) -> list[Conversation]:
    """Return the conversations of one split, in an order that is the same everywhere.

    No person is in two splits. People with at least 5 conversations are drawn by a hash of their id (the two
    with more than 400 always go to train); everybody else joins the split where most of their conversations
    with those are. A conversation is kept if both people are in the same split.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        min_turns: shortest conversation kept, in turns.
        cap_per_user: most conversations kept of one person (chosen by a hash); None keeps all.

    Raises:
        UnknownNameError: no such split.
        ConfigError: ``cap_per_user`` is less than 1.
        DataError, MissingPackageError: the data set cannot be fetched or is broken.
        StorageError: the cache cannot be written.
    """
    check_split(split)
    if cap_per_user is not None and cap_per_user < 1:
        raise ConfigError(f"cap_per_user is {cap_per_user}: expected at least 1, or None to keep all")
    kept, count = [], Counter[str]()
    for talk in _load()[split]:
        if len(talk.turns) < min_turns:
            continue
        if cap_per_user is not None and any(count[user] >= cap_per_user for user in talk.users):
            continue
        count.update(talk.users)
        kept.append(talk)
    return kept


@lru_cache(maxsize=1)
def _load() -> dict[str, list[Conversation]]:
    """Read the whole data set and return its splits, each ordered by a hash of the conversation ids."""
    path = packages.fetch(PACKAGE, VERSION, MEMBER)
    try:
        records = json.loads(path.read_bytes())
        talks = [talk for key, record in records.items() if (talk := _conversation(key, record))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not the expected data set ({error!r}): "
            f"delete it, or install {PACKAGE}=={VERSION} again"
        ) from error
    talks.sort(key=lambda talk: unit(talk.id))
    home = assign_users(talks)
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    for talk in talks:
        first, second = (home[user] for user in talk.users)
        if first == second:
            splits[first].append(talk)
    return splits


def assign_users(talks: list[Conversation]) -> dict[str, Split]:
    """Return the split of every person in ``talks`` by the rule of :func:`load_chitchat`."""
    total = Counter(user for talk in talks for user in talk.users)
    home = {
        user: SPLITS[0] if count > _HUB else _drawn(user)
        for user, count in total.items()
        if count >= _REGULAR
    }
    pulls: dict[str, Counter[Split]] = defaultdict(Counter)
    for talk in talks:
        for user, other in (talk.users, talk.users[::-1]):
            if user not in home and other in home:
                pulls[user][home[other]] += 1
    for user in total.keys() - home.keys():
        votes = pulls[user]
        home[user] = max(SPLITS, key=lambda split: votes[split]) if votes else _drawn(user)
    return home


def _conversation(key: str, record: dict[str, Any]) -> Conversation | None:
    """Merge the messages of one record into turns; None unless exactly two people wrote something."""
    messages = [message for group in record["messages"] for message in group]
    said = [(message["sender"], text) for message in messages if (text := message["text"].strip())]
    runs = [
        (sender, "\n".join(text for _, text in run)) for sender, run in groupby(said, lambda pair: pair[0])
    ]
    if len({sender for sender, _ in runs}) != 2:
        return None
    first, second = runs[0][0], runs[1][0]
    turns = tuple(Turn("user" if sender == first else "assistant", text) for sender, text in runs)
    return Conversation(key, (first, second), turns)


def _drawn(user: str) -> Split:
    place = unit(f"user {user}")
    for split, share in _SHARES:
        if place < share:
            return split
        place -= share
    return SPLITS[-1]


@register_source
class ChitChat(ConversationSource):
    """Small talk of two people.

    Args:
        cap_per_user: most training conversations kept of one person; None keeps all.
        turns, facts, echoes: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "chitchat", "Small talk of two people (Chit-Chat Challenge)"
    size = "2,731 conversations of 8 turns or more, 1,656 of them in one split"
    licence, origin = "MIT", f"pypi {PACKAGE} {VERSION}"
    archives = (Archive("pypi", PACKAGE, VERSION, (MEMBER,), 8),)

    def __init__(self, tokenizer: Any, cap_per_user: int | None = 64, **options: Any):
        self.cap_per_user = None if cap_per_user is None else number("cap_per_user", cap_per_user, 1)
        super().__init__(tokenizer, **options)

    def conversations(self, split: Split) -> list[Conversation]:
        return load_chitchat(split, cap_per_user=self.cap_per_user if split == "train" else 8)

    @classmethod
    def downloaded(cls) -> bool:
        return packages.locate(PACKAGE, VERSION, MEMBER) is not None
