"""What evaluation asks: a stream of segments, and questions at certain time steps.

At time step t the segments c(1), ..., c(t) have arrived one after another and are in the memory; then the queries of
step t are put, one by one. A query never changes the memory (paper, section 4: the online scenario).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How well given tokens are foreseen.

    Attributes:
        ids: live tokens.
        scored: the columns that count, (start, stop); the first of all never does: no live token stands before it.
        tag: what kind of query this is, for tables by kind.
    """

    ids: Ids
    scored: tuple[int, int]
    tag: str = ""


@dataclass(frozen=True)
class Choice:
    """Which of several continuations is the likeliest, after what each is worth without content.

        argmax_k  log p(option_k | Mem, prompt) - log p(option_k | Mem, blank)

    Attributes:
        prompt: live tokens before the answer.
        options: the continuations.
        answer: index of the right one.
        blank: the prompt with its content taken out ("N/A"), whose scores are subtracted; empty subtracts nothing.
        groups: option -> group, for a second, coarser accuracy by summed probability (ratings -> liked or not).
        tag: kind of query.
    """

    prompt: Ids
    options: tuple[Ids, ...]
    answer: int
    blank: Ids = ()
    groups: tuple[int, ...] = ()
    tag: str = ""


@dataclass(frozen=True)
class Generation:
    """What the model writes, greedily, against one or more right answers.

    Attributes:
        prompt: live tokens.
        answers: any of these is right.
        max_tokens: at most so many are written; the end of a line or of the turn ends the answer earlier.
        tag: kind of query.
    """

    prompt: Ids
    answers: tuple[str, ...]
    max_tokens: int = 24
    tag: str = ""


Query = Likelihood | Choice | Generation


@dataclass(frozen=True)
class Item:
    """One conversation, user, task row or text.

    Attributes:
        name: the same in every run, for resuming and for pairing methods.
        segments: c(1), c(2), ...; all are token ids of one tokenizer.
        queries: t -> what is asked once t segments are in the memory; 0 is before the first.
    """

    name: str
    segments: tuple[Ids, ...]
    queries: Mapping[int, tuple[Query, ...]]
