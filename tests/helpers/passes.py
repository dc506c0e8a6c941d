"""What is read by a model, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ccm.core.reader import Reader


@contextmanager
def counted(reader: Reader) -> Iterator[list[int]]:
    """Tokens of every pass of the model, all rows together."""
    passes: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        rows, tokens = next(each for each in given if each is not None).shape[:2]
        passes.append(rows * tokens)

    hook = reader.body.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()
