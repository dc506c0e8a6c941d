"""Conversations about stories: CoQA, for evaluation alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from .carriers import BIGBENCH, COQA
from .conversation import unit
from .squad import Question

LICENCE, ORIGIN = "upstream, CoQA in BIG-bench", str(BIGBENCH)


@dataclass(frozen=True)
class Story:
    """A story, where it is from, and questions that follow each other; those without an answer end them."""

    id: str
    kind: str
    text: str
    questions: tuple[Question, ...]


@lru_cache(maxsize=1)
def load_coqa() -> list[Story]:
    """All stories, ordered by a hash of their ids.

    A conversation ends before its first question that nobody could answer from the story. The first answer of a
    question is the one that the conversation went on with.

    Raises:
        DataError, MissingPackageError, StorageError: the package cannot be fetched, or is not as expected.
    """
    with BIGBENCH.reading() as folder:
        records = json.loads((folder / COQA).read_bytes())["data"]
        stories = []
        for record in records:
            given = [record["answers"], *record["additional_answers"].values()]
            questions = []
            for k, asked in enumerate(record["questions"]):
                answers = [" ".join(answer[k]["input_text"].split()) for answer in given]
                if {"", "unknown"} & {answer.strip(" .").lower() for answer in answers}:
                    break
                questions.append(Question(asked["input_text"].strip(), tuple(dict.fromkeys(answers))))
            story = " ".join(record["story"].split())
            stories.append(Story(record["id"], record["source"], story, tuple(questions)))
    return sorted(stories, key=lambda story: unit(story.id))
