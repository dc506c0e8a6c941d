"""Ways to keep a conversation, each with the same calls: take in a history, play a turn behind it, answer many.

A turn is what a user waits for: a question of some tokens is read, an answer of a given length is written greedily,
and the state is ready for the next question. Then it goes back to where it was: every repetition is the same turn.

A history is read before by those alone that cannot do without. For the others, keys and values of the size that it
would leave are put in place, random ones, because what they say makes no difference to the time.
"""

from __future__ import annotations

from importlib import import_module

from .base import Contender, Setting, Turn, history

__all__ = ["Contender", "Setting", "Turn", "history", "named"]

#: Where each is: an environment need not have what the others import.
_PLACES = {
    "ccm": ("memories", "InMemory"),
    "ccm in llama.cpp": ("llama", "InLlama"),
    "llama.cpp": ("llama", "Llama"),
    "vllm": ("vllm", "Vllm"),
    "full cache": ("transformers", "Full"),
    "kvpress": ("kvpress", "Pressed"),
    "streaming-llm": ("memories", "Streaming"),
    "window": ("transformers", "Window"),
    "resend": ("transformers", "Resend"),
}


def named(name: str) -> type[Contender]:
    """One of :data:`ccm.bench.sizes.NAMES`."""
    module, kind = _PLACES[name]
    found: type[Contender] = getattr(import_module(f".{module}", __name__), kind)
    return found
