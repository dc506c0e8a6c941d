"""A model that judges answers, behind any server that speaks OpenAI's API."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...errors import DataError, needing

#: The variable of the environment that holds the server's key.
KEY = "OPENAI_API_KEY"
#: Tokens of a verdict at most.
_TOKENS = 256


@dataclass(frozen=True)
class Judge:
    """Where it is, and its name there.

    Attributes:
        url: such as https://host/v1.
        model: as the server calls it.
    """

    url: str
    model: str

    def ask(self, question: str) -> str:
        """What it answers, at temperature 0.

        Raises:
            MissingPackageError: the package ``openai`` is not installed.
            DataError: the server cannot be reached, or refuses.
        """
        client = _client(self.url)
        from openai import OpenAIError

        try:
            answer = client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=_TOKENS,
            )
        except OpenAIError as error:
            raise DataError(
                f"the judge {self.model} at {self.url} gave no answer ({error}); what is measured is saved, and "
                f"the same command goes on when it answers. Its key is read from {KEY}"
            ) from error
        return str(answer.choices[0].message.content or "").strip()

    def agrees(self, question: str) -> bool:
        """Whether it answers a question with yes."""
        return "yes" in self.ask(question).lower()


@lru_cache(maxsize=4)
def _client(url: str) -> Any:
    with needing("--judge needs the package openai", "eval"):
        from openai import OpenAI
    return OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"))  # a server of one's own wants none
