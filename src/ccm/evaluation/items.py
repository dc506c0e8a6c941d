"""What evaluation asks: a stream of segments, and questions at certain time steps.

At time step t the segments c(1), ..., c(t) have arrived one after another and are in the memory; then the queries of
step t are put, one by one. A query never changes the memory (paper, section 4: the online scenario).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How well given tokens are foreseen.

    Attributes:
        ids: live tokens.
        scored: the columns that count, (start, stop). Column 0 never counts, as no live token stands before it.
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
        rule: what is written -> its score from 0 to 1, in place of exact match, F1 and ROUGE-L.
        lines: the answer may have several lines; only the end of the turn ends it.
    """

    prompt: Ids
    answers: tuple[str, ...]
    max_tokens: int = 24
    tag: str = ""
    rule: Callable[[str], float] | None = None
    lines: bool = False


Query = Likelihood | Choice | Generation


@dataclass(frozen=True)
class Item:
    """One conversation, user, task row or text.

    Attributes:
        name: the same in every run, for resuming and for pairing methods.
        segments: c(1), c(2), ...; all are token ids of one tokenizer.
        queries: t -> what is asked once t segments are in the memory; 0 is before the first.
        once: items of a task differ in length, so all queries count as those of step 1.
        cut: tokens that :func:`newest` has left out.
    """

    name: str
    segments: tuple[Ids, ...]
    queries: Mapping[int, tuple[Query, ...]]
    once: bool = False
    cut: int = 0

    def at(self, t: int) -> int:
        """The step that a query after t segments counts as."""
        return 1 if self.once else t


def newest(item: Item, room: int) -> Item:
    """The item with the first segment and the newest of the others, as many as ``room`` positions of a model hold.

    Beside them the longest question and its answer must fit, at every step. The item itself, if all of it fits.
    """
    asked = max(map(_length, (query for queries in item.queries.values() for query in queries)), default=0)
    last = max(item.queries, default=0)
    left = room - asked - sum(map(len, item.segments[:1]))
    begin = last
    while begin > 1 and len(item.segments[begin - 1]) <= left:
        begin -= 1
        left -= len(item.segments[begin])
    cut = sum(map(len, item.segments[1:begin]))
    if not cut:
        return item
    queries: dict[int, tuple[Query, ...]] = {}
    for t, some in item.queries.items():
        t = min(t, 1) + max(0, t - begin)
        queries[t] = (*queries.get(t, ()), *some)
    return replace(item, segments=item.segments[:1] + item.segments[begin:], queries=queries, cut=cut)


def _length(query: Query) -> int:
    if isinstance(query, Likelihood):
        return len(query.ids)
    if isinstance(query, Generation):
        return len(query.prompt) + query.max_tokens
    return len(query.prompt) + max(map(len, query.options))
