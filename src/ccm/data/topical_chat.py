"""Dialogs about given topics (Topical-Chat), rebuilt from BIG-bench, which holds their growing beginnings."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import groupby

from .carriers import BIGBENCH, TOPICAL_CHAT
from .conversation import SPLITS, Conversation, Split, alternating, split_of
from .conversational import ConversationSource
from .sources import register_source


@lru_cache(maxsize=1)
def load_topical_chat() -> dict[Split, list[Conversation]]:
    """All dialogs, split by a hash of their text: 8 in 10 train, 1 validation, 1 test.

    Each example holds the beginning of a dialog and its next turn; a dialog is the first beginning and all the
    turns that came next. The two speakers have no names in the data, so that dialogs are split and not people.

    Raises:
        DataError, MissingPackageError, StorageError: the package cannot be fetched, or is not as expected.
    """
    splits: dict[Split, list[Conversation]] = {split: [] for split in SPLITS}
    with BIGBENCH.reading() as folder:
        examples = json.loads((folder / TOPICAL_CHAT).read_bytes())["examples"]
        for name, group in groupby(examples, lambda example: example["comment"]):
            part = list(group)
            said = [
                _words(re.sub(r"^agent_[AB]: ", "", part[0]["input"])),
                *(_words(e["target"]) for e in part),
            ]
            splits[split_of("\n".join(said))].append(Conversation(name, (), alternating(said)))
    return splits


def _words(quoted: str) -> str:
    return quoted.strip().removeprefix('"').removesuffix('"').strip()


@register_source
class TopicalChat(ConversationSource):
    """Dialogs of about 21 turns about sports, films, music and other topics.

    Args:
        turns, facts, echoes: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "topical-chat", "Dialogs about given topics (Topical-Chat)"
    size = "1,078 dialogs, 23,373 turns"
    licence, origin = "upstream, CDLA-Sharing", str(BIGBENCH)
    archives = (BIGBENCH,)

    def conversations(self, split: Split) -> list[Conversation]:
        return load_topical_chat()[split]
