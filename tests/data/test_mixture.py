from __future__ import annotations

import os
import random
from itertools import islice
from typing import Any

import psutil
import pytest

from ccm.data.mixture import POOL, Mixture, cut
from ccm.data.rows import ConversationRow
from ccm.data.sources import Source
from ccm.errors import ConfigError, DataError


class Letters(Source):
    """Rows whose ids say which source they come from, with as many tokens as chance wants."""

    def __init__(self, letter: int, least: int, most: int):
        super().__init__(None)
        self.letter, self.least, self.most = letter, least, most

    def draw(self, rng: random.Random) -> ConversationRow:
        length = rng.randint(self.least, self.most)
        return ConversationRow(str(rng.random()), ((self.letter,) * length,), ((1, length),))

    def held_out(self, split: Any, limit: int) -> list[ConversationRow]:
        return []


def mixture(**changes: Any) -> Mixture:
    settings: dict[str, Any] = {"tokens_per_batch": 400, "max_rows": 8, "seed": 3}
    return Mixture([Letters(1, 10, 60), Letters(2, 40, 200)], [3, 1], **{**settings, **changes})


def take(stream: Mixture, count: int) -> list[list[ConversationRow]]:
    return list(islice(stream, count))


def padded(batch: list[ConversationRow]) -> int:
    return len(batch) * max(row.tokens for row in batch)


def test_batches_keep_the_limits_and_waste_little():
    batches = take(mixture(), 8 * POOL)
    assert all(padded(batch) <= 400 and len(batch) <= 8 for batch in batches)
    assert any(len(batch) == 8 for batch in batches) and any(padded(batch) > 380 for batch in batches)
    assert sum(r.tokens for b in batches for r in b) > 0.85 * sum(map(padded, batches))
    shuffled = [row for batch in batches for row in batch]
    random.Random(0).shuffle(shuffled)  # the control: batches of the same sizes without regard to length
    rest = iter(shuffled)
    careless = [list(islice(rest, len(batch))) for batch in batches]
    assert sum(map(padded, careless)) > 1.2 * sum(map(padded, batches))


def test_rows_stay_what_the_sources_drew():
    """No row is joined with another, cut or given twice."""
    rows = [row for batch in take(mixture(), 4 * POOL) for row in batch]
    assert all(len(set(row.segments[0])) == 1 and len(row.segments) == 1 for row in rows)
    assert len({row.conversation for row in rows}) == len(rows)


def test_weights():
    rows = [row for batch in take(mixture(), 40 * POOL) for row in batch]
    assert sum(row.segments[0][0] == 2 for row in rows) / len(rows) == pytest.approx(0.25, abs=0.02)
    alone = Mixture([Letters(1, 5, 9), Letters(2, 5, 9)], [0, 2], 100, 4, 0)
    assert {row.segments[0][0] for batch in take(alone, POOL) for row in batch} == {2}


def test_stream_depends_on_the_seed_alone():
    assert take(mixture(), 40) == take(mixture(), 40)
    assert take(mixture(), 40) != take(mixture(seed=4), 40)


@pytest.mark.parametrize("start", [1, POOL - 1, POOL, 2 * POOL + 5])
def test_resume_anywhere(start):
    whole = take(mixture(), start + 20)
    again = mixture()
    again.served = start
    assert take(again, 20) == whole[start:] and again.served == start + 20
    fresh = mixture()
    take(fresh, 3)
    fresh.served = start  # also in the middle of another pool
    assert take(fresh, 1) == whole[start : start + 1]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_single_stream(world):
    single = take(mixture(), 30 * world)
    parts = [take(mixture(rank=rank, world=world), 30) for rank in range(world)]
    assert [batch for step in zip(*parts, strict=True) for batch in step] == single
    names = [{row.conversation for batch in part for row in batch} for part in parts]
    assert all(not a & b for i, a in enumerate(names) for b in names[:i])


def test_resume_with_another_number_of_processes():
    single = take(mixture(), 40)
    first = [mixture(rank=rank, world=2) for rank in range(2)]
    for stream in first:
        take(stream, 5)
    assert {stream.served for stream in first} == {10}
    alone = mixture()
    alone.served = first[0].served
    assert take(alone, 30) == single[10:]


def test_rows_drawn_ahead_are_the_same():
    """Two processes draw; the stream, and where it goes on, are those of one."""
    here = take(mixture(), 3 * POOL)
    assert take(mixture(workers=2), 3 * POOL) == here
    later = mixture(workers=2)
    later.served = POOL + 3
    assert take(later, POOL) == here[POOL + 3 : 2 * POOL + 3]


class Broken(Letters):
    """Its rows fail, or take their process with them."""

    def draw(self, rng: random.Random) -> ConversationRow:
        if self.letter:
            raise ValueError("row 7 is broken")
        os._exit(3)


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (Letters(1, 101, 150), ConfigError, "more than 100 tokens, the last one 1"),
        (Broken(1, 0, 0), DataError, "ValueError: row 7 is broken"),
        (Broken(0, 0, 0), DataError, "ended by itself .exit code 3"),
    ],
)
def test_what_fails_in_another_process_is_named(source, kind, words):
    stream = Mixture([source], [1], 100, 4, 0, workers=2)
    with pytest.raises(kind, match=words) as caught:
        next(stream)
    if "itself" not in words:
        assert "in draw" in str(caught.value.__cause__) or "_row" in str(caught.value.__cause__)
    stream.close()
    assert not children()


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_processes_end_with_their_stream():
    here = take(mixture(), 2 * POOL)
    stream = mixture(workers=2)
    assert take(stream, POOL) == here[:POOL] and len(children()) == 2
    stream.close()
    assert not children()
    assert take(stream, POOL) == here[POOL:] and len(children()) == 2, "it may be read on"
    del stream
    assert not children()


def test_too_long_rows_are_drawn_again_or_refused():
    batches = take(Mixture([Letters(1, 50, 150)], [1], 100, 4, 0), POOL)
    assert all(row.tokens <= 100 for batch in batches for row in batch)
    with pytest.raises(ConfigError, match="more than 100 tokens, the last one 1"):
        next(Mixture([Letters(1, 101, 150)], [1], 100, 4, 0))


def test_cut_gives_the_fewest_batches():
    rows = [ConversationRow(str(n), ((1,) * n,), ((1, n),)) for n in (1, 9, 3, 3, 5, 10)]
    assert [[row.tokens for row in batch] for batch in cut(rows, 20, 3)] == [[10, 9], [5, 3, 3], [1]]
    assert [len(batch) for batch in cut(rows, 20, 1)] == [1] * 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"max_rows": 0}, "max_rows 0"),
        ({"rank": 2, "world": 2}, "rank is 2 of 2"),
        ({"rank": 0, "world": 0}, "rank is 0 of 0"),
    ],
)
def test_wrong_settings(changes, words):
    with pytest.raises(ConfigError, match=words):
        mixture(**changes)


def test_wrong_weights():
    for weights in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(ConfigError, match="weight"):
            Mixture([Letters(1, 5, 9), Letters(2, 5, 9)], weights, 100, 4, 0)
