"""Answers that match a JSON schema: which tokens may come next (the extra ``json``, llguidance)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, needing

#: Blanks between parts of JSON: models write them as they like, but one that writes nothing else never ends.
_BLANKS = r"[ \n]{0,16}"


class Form:
    """The form of one answer.

    Args:
        schema: JSON schema, as text.
        tokenizer: of the model, a fast one.
        ends: token ids that end an answer.
        thoughts: the mark that ends thoughts, if the answer begins in the middle of some; the form is that of what
            follows.

    Raises:
        ConfigError: the schema, or the tokenizer, is not usable.
        MissingPackageError: without llguidance.
    """

    def __init__(self, schema: str, tokenizer: Any, ends: Iterable[int], thoughts: str | None = None):
        with needing("answers that follow a JSON schema need a package more", "json"):
            from llguidance import LLMatcher
        self.tokenizer, self.ends, self.thoughts = tokenizer, sorted(ends), thoughts
        self._newest: deque[int] = deque(maxlen=16)  # tokens of thoughts
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _BLANKS})
        self._matcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0)
        self._check("the schema is not usable here")

    def allow(self, logits: Tensor) -> Tensor:
        """Logits (V,) with those of tokens that cannot come next at -inf."""
        if self.thoughts:
            return logits
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        if not self._matcher.is_stopped():
            packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            known = bits.flatten().bool()[: len(logits)]
            allowed[: len(known)] = known
        allowed[self.ends] = self._matcher.is_accepting() or self._matcher.is_stopped()
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """The next token of the answer."""
        if self.thoughts:
            self._newest.append(token)
            if self.thoughts in self.tokenizer.decode(list(self._newest)):
                self.thoughts = None
        elif token not in self.ends:
            self._matcher.consume_token(token)
            self._check("the answer left its form")

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"response_format: {what}: {self._matcher.get_error()}")


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> Any:
    """The tokenizer in llguidance's terms, which takes a second."""
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer)
    except ValueError as error:
        raise ConfigError(f"response_format: this tokenizer cannot follow a schema: {error}") from error
