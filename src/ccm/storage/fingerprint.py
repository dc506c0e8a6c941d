"""Who made a memory, in words. A fingerprint is MODEL-MAKER, and the maker an adapter's hash or a method's name."""

from __future__ import annotations

import re

from ..errors import MismatchError


def made_by(fingerprint: str) -> str:
    """A fingerprint in words; of a model alone, if there is no maker in it."""
    model, _, maker = fingerprint.partition("-")
    return f"model {model} and {_words(maker)}" if maker else f"model {model}"


def mismatch(got: str, expected: str) -> MismatchError:
    """The error for a memory that another model, adapter or method made.

    Args:
        got: fingerprint of the memory.
        expected: fingerprint of what was to read it.
    """
    (model, _, maker), (own_model, _, own) = got.partition("-"), expected.partition("-")
    if model != own_model:
        reader, advice = made_by(expected), "load the model that made it"
    else:
        reader, advice = f"the same model and {_words(own)}", f"open it with {_words(maker)} (--memory)"
    return MismatchError(
        f"the memory was made by {made_by(got)}, this is {reader}; {advice}, or start a new memory"
    )


def _words(maker: str) -> str:
    return f"{'adapter' if re.fullmatch('[0-9a-f]{16}', maker) else 'method'} {maker}"
