"""Questions about paragraphs: SQuADShifts (Wikipedia, newspaper, Reddit, Amazon), for evaluation alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from .carriers import BIGBENCH, SQUAD_SHIFTS
from .conversation import unit

LICENCE, ORIGIN = "upstream, SQuADShifts in BIG-bench", str(BIGBENCH)


@dataclass(frozen=True)
class Question:
    """A question and the different answers that people gave, the most frequent first."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, the article that it is from (where that is known) and the questions about it."""

    article: str
    text: str
    questions: tuple[Question, ...]


@lru_cache(maxsize=1)
def load_squad_shifts() -> dict[str, list[Paragraph]]:
    """All paragraphs by domain, each domain ordered by a hash of its texts.

    Raises:
        DataError, MissingPackageError, StorageError: the package cannot be fetched, or is not as expected.
    """
    domains = {}
    with BIGBENCH.reading() as folder:
        for domain, file in SQUAD_SHIFTS.items():
            articles = json.loads((folder / file).read_bytes())["data"]
            paragraphs = [
                Paragraph(
                    article["title"],
                    " ".join(paragraph["context"].split()),
                    tuple(
                        Question(
                            " ".join(asked["question"].split()),
                            _frequent([given["text"] for given in asked["answers"]]),
                        )
                        for asked in paragraph["qas"]
                    ),
                )
                for article in articles
                for paragraph in article["paragraphs"]
            ]
            domains[domain] = sorted(paragraphs, key=lambda paragraph: unit(paragraph.text))
    return domains


def _frequent(answers: list[str]) -> tuple[str, ...]:
    """Different answers, the most frequent first."""
    stripped = [" ".join(answer.split()) for answer in answers]
    return tuple(sorted(dict.fromkeys(filter(None, stripped)), key=lambda answer: -stripped.count(answer)))
