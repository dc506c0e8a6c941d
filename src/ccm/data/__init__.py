"""Training data: sources of rows (see ``sources``), each in a file of its own, and their mixture."""

from __future__ import annotations

from . import (  # noqa: F401  (they register)
    books,
    chitchat,
    documents,
    hub,
    icl,
    jsonl,
    lamp,
    lists,
    movielens,
    notes,
    other_talks,
    told,
    topical_chat,
)
from .chitchat import load_chitchat
from .conversation import Conversation, Turn
from .sources import Source, get_source, list_sources, register_source

__all__ = [
    "Conversation",
    "Source",
    "Turn",
    "get_source",
    "list_sources",
    "load_chitchat",
    "register_source",
]
