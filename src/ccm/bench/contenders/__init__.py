"""Ways to keep a conversation, each with the same calls: take in a history, play a turn behind it, answer many.

A turn is what a user waits for: a question of some tokens is read, an answer of a given length is written greedily,
and the state is ready for the next question. Then it goes back to where it was: every repetition is the same turn.

A history is not read before: keys and values of the size that it would leave are put in place, random ones, because
what they say makes no difference to the time.
"""

from __future__ import annotations

from .base import Contender, Turn, history
from .llama import InLlama, Llama
from .memories import InMemory, Streaming
from .transformers import Full, Resend, Window

__all__ = ["CONTENDERS", "Contender", "InMemory", "Turn", "history"]

CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind for kind in (InMemory, InLlama, Llama, Full, Streaming, Window, Resend)
}
