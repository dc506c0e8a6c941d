"""One contract for every kind of store."""

from __future__ import annotations

import json
import math
import random
import threading
from itertools import accumulate

import pytest
from stores import OPERATIONS, snap

from ccm.errors import ConfigError
from ccm.serving.store import ConflictError, NotFoundError, QuotaError, Snapshot, Usage
from ccm.serving.store.base import PART


def test_versions_are_immutable_and_follow_each_other(opener, clock):
    store = opener(keep=3)
    session = store.create("alice")
    assert store.latest("alice", session) is None
    assert store.info("alice", session).version == 0
    for n in range(1, 6):
        clock.now += 1
        kept = store.commit("alice", session, n - 1, snap(n))
        assert kept == store.latest("alice", session) == store.get("alice", session, n)
        assert (kept.version, kept.created, kept.payload, kept.metadata) == (
            n,
            clock.now,
            snap(n).payload,
            snap(n).metadata,
        )
    for n in (3, 4, 5):  # keep=3
        assert store.get("alice", session, n).payload == snap(n).payload
    for n in (1, 2, 6):
        with pytest.raises(NotFoundError, match=f"no version {n}"):
            store.get("alice", session, n)
    info = store.info("alice", session)
    assert (info.version, info.created, info.updated, info.expires) == (5, clock.now - 5, clock.now, None)
    assert info.nbytes == sum(40 + len(json.dumps(snap(n).metadata)) for n in (3, 4, 5))
    assert store.usage("alice") == Usage(1, info.nbytes)


def test_some_versions_far_back_stay(opener):
    """Newest four, and of those before at most four at distances that double: never one that had gone."""
    store = opener(keep=4, marks=3)
    session = store.create("alice")
    seen: list[int] = []
    for n in range(1, 101):
        store.commit("alice", session, n - 1, snap(n), transcript=[n] * (n % 3))
        kept = store.versions("alice", session)
        assert list(kept) == sorted(kept) and set(kept) <= {*seen, n} and len(kept) <= 8
        seen = list(kept)
        assert set(seen) >= set(range(max(1, n - 3), n + 1))
        assert all(kept[v] == sum(i % 3 for i in range(1, v + 1)) for v in kept)
        if n > 36:
            assert min(kept) <= n - 36  # so far back can a conversation go
            assert all(any(n - 4 - 2 * d < v <= n - 4 - d for v in kept) for d in (8, 16))
        for v in (1, 8, 16, n - 4):
            if v in kept:
                assert store.get("alice", session, v).payload == snap(v).payload
            elif v > 0:
                with pytest.raises(NotFoundError):
                    store.get("alice", session, v)
    assert seen == [64, 80, 88, 96, 97, 98, 99, 100]
    assert store.info("alice", session).nbytes == sum(
        len(store.get("alice", session, v).payload)
        + len(json.dumps(dict(store.get("alice", session, v).metadata)))
        for v in kept
    ) + sum(len(str(i)) * (i % 3) for i in range(1, 101))
    assert store.versions("alice", store.create("alice", "new")) == {}


def test_versions_that_are_dropped_make_room(opener):
    store = opener(keep=3, marks=1)
    session = store.create("alice")
    for n in range(1, 4):
        store.commit("alice", session, n - 1, snap(n))
    for n in range(4, 40):  # again and again in place of the last one
        store.commit("alice", session, n - 1, snap(n), drop=[n - 1, 77])
        assert list(store.versions("alice", session)) == [1, 2, n]
    assert store.info("alice", session).nbytes == sum(
        40 + len(json.dumps(dict(store.get("alice", session, n).metadata))) for n in (1, 2, 39)
    )
    store.commit("alice", session, 39, snap(40))
    store.commit("alice", session, 40, snap(41))
    assert list(store.versions("alice", session)) == [39, 40, 41]
    with pytest.raises(ConflictError):
        store.commit("alice", session, 40, snap(41), drop=[40])
    assert list(store.versions("alice", session)) == [39, 40, 41]


def cut(*pieces: bytes) -> Snapshot:
    """A payload of these pieces, which other versions may have as well."""
    return Snapshot(b"".join(pieces), {}, cuts=tuple(accumulate(map(len, pieces[:-1]))))


def test_equal_parts_of_versions_are_kept_once(opener, kind):
    store = opener(keep=3)
    session = store.create("alice")
    pieces = [bytes([n]) * 1000 for n in range(9)]
    for n in range(1, 7):  # one piece goes, one comes
        given = cut(*pieces[n - 1 : n + 3], pieces[n])  # and one is there twice
        kept = store.commit("alice", session, n - 1, given)
        assert kept == store.latest("alice", session) == store.get("alice", session, n)
        if kind != "dir":
            assert store.latest("alice", session).cuts == given.cuts
        versions = min(n, 3)
        shared = versions * (2 + 5 * PART) + 1000 * (3 + versions)
        assert store.info("alice", session).nbytes == (versions * 5002 if kind == "dir" else shared)
    assert store.usage("alice").nbytes == store.info("alice", session).nbytes
    for n in (4, 5, 6):
        assert store.get("alice", session, n).payload == cut(*pieces[n - 1 : n + 3], pieces[n]).payload
    twin = store.fork("alice", session, version=5)  # has parts of its own
    store.create("bob", session)
    store.commit("bob", session, 0, cut(pieces[5], pieces[6]))
    store.commit("alice", session, 6, Snapshot(b"whole", {}))
    for n in range(7, 10):
        store.commit("alice", session, n, Snapshot(b"whole", {}), drop=[4, 5, 6])
    assert store.info("alice", session).nbytes == 3 * len("{}whole")
    assert store.latest("alice", twin).payload == cut(*pieces[4:8], pieces[5]).payload
    assert store.latest("bob", session).payload == pieces[5] + pieces[6]
    store.delete("alice", twin)
    assert store.usage("alice").nbytes == 3 * len("{}whole")
    store.create("alice", twin)
    store.commit("alice", twin, 0, cut(b"", pieces[1], b""))
    assert store.latest("alice", twin).payload == pieces[1]


def test_a_commit_that_shares_its_parts_is_within_the_quota(opener, kind):
    store = opener(nbytes=3000, keep=2)
    session = store.create("alice")
    store.commit("alice", session, 0, cut(b"a" * 1800, b"b"))
    again = cut(b"a" * 1800, b"c")
    if kind == "dir":  # whole files
        with pytest.raises(QuotaError):
            store.commit("alice", session, 1, again)
        return
    assert store.commit("alice", session, 1, again).version == 2
    with pytest.raises(QuotaError):
        store.commit("alice", session, 2, cut(b"d" * 1800, b"c"))
    assert store.latest("alice", session).payload == again.payload
    assert store.get("alice", session, 1).payload == cut(b"a" * 1800, b"b").payload


def test_what_is_committed_is_there_after_opening_again(opener):
    with opener() as store:
        session = store.create("alice", "kept")
        store.commit("alice", session, 0, snap(1), transcript=[{"role": "user", "content": "hi"}])
    again = opener()
    assert again.latest("alice", "kept").payload == snap(1).payload
    assert again.transcript("alice", "kept") == [{"role": "user", "content": "hi"}]


def test_an_empty_payload_and_a_large_one(opener):
    store = opener()
    session = store.create("alice")
    store.commit("alice", session, 0, Snapshot(b"", {}))
    assert store.latest("alice", session).payload == b""
    large = random.Random(1).randbytes(3_000_001)
    store.commit("alice", session, 1, Snapshot(large, {}))
    assert store.latest("alice", session).payload == large


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_a_commit_behind_another_version_conflicts_and_changes_nothing(opener, expected):
    store = opener()
    session = store.create("alice")
    for n in (1, 2):
        store.commit("alice", session, n - 1, snap(n), transcript=[n])
    with pytest.raises(ConflictError, match=f"is at version 2, expected {expected}") as caught:
        store.commit("alice", session, expected, snap(9), transcript=[9])
    assert caught.value.version == 2
    assert store.latest("alice", session).payload == snap(2).payload
    assert store.transcript("alice", session) == [1, 2]


def test_an_id_is_taken_once_per_tenant(opener):
    store = opener()
    store.create("alice", "one")
    store.commit("alice", "one", 0, snap(1))
    with pytest.raises(ConflictError, match="already") as caught:
        store.create("alice", "one")
    assert caught.value.version == 1
    store.create("bob", "one")  # another tenant's names are not in the way
    assert store.latest("bob", "one") is None
    assert store.latest("alice", "one").payload == snap(1).payload
    assert len({store.create("alice") for _ in range(3)}) == 3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_foreign_id_is_exactly_like_one_that_is_not_there(opener, operation):
    store = opener()
    store.create("alice", "private")
    store.commit("alice", "private", 0, snap(1), transcript=["secret"])
    store.create("bob", "own")
    messages = []
    for absent in ("private", "missing"):
        with pytest.raises(NotFoundError) as caught:
            OPERATIONS[operation](store, "bob", absent)
        messages.append(str(caught.value).replace(absent, "ID"))
    assert messages[0] == messages[1]
    OPERATIONS[operation](store, "alice", "private") if operation != "commit 0" else None  # control
    assert [info.session for info in store.sessions("bob")] == ["own"]


def test_pages_of_sessions(opener):
    store = opener()
    names = sorted(["b", "a", "ä", "Z", "z/../..", "%", "'; DROP TABLE ccm_sessions; --", "😀", "c:d", "10"])
    for name in reversed(names):
        store.create("alice", name)
        store.create("bob", name + "2")
    found: list[str] = []
    while page := store.sessions("alice", found[-1] if found else None, limit=5):
        assert len(page) <= 5
        found += [info.session for info in page]
    assert found == names
    assert [info.session for info in store.sessions("alice")] == names
    assert store.sessions("nobody") == []
    with pytest.raises(ConfigError, match="page limit: got 0"):
        store.sessions("alice", limit=0)


def test_labels_are_the_newest_metadata_of_a_page(opener):
    store = opener()
    for name in ("a", "b", "c", "empty"):
        store.create("alice", name)
    for version, title in enumerate(("old", "new ü")):
        store.commit("alice", "a", version, Snapshot(b"x" * 1000, {"user": {"title": title}}))
    store.commit("alice", "b", 0, Snapshot(b"x", {}))
    store.commit("alice", "c", 0, Snapshot(b"x", {"user": {}}))
    assert store.labels("alice") == {"a": {"user": {"title": "new ü"}}, "b": {}, "c": {"user": {}}}
    assert list(store.labels("alice", "a", 1)) == ["b"]
    assert store.labels("bob") == {}


def test_fork(opener):
    store = opener(keep=2)
    session = store.create("alice")
    for n in (1, 2, 3):
        store.commit("alice", session, n - 1, snap(n), transcript=[n, str(n)])
    twin = store.fork("alice", session)
    older = store.fork("alice", session, "older", version=2)
    assert store.latest("alice", twin).payload == snap(3).payload
    assert store.transcript("alice", twin) == [1, "1", 2, "2", 3, "3"]
    assert (store.latest("alice", older).payload, store.latest("alice", older).version) == (
        snap(2).payload,
        1,
    )
    assert store.transcript("alice", older) == [1, "1", 2, "2"]
    store.commit("alice", twin, 1, snap(7), transcript=[7])  # independent
    store.delete("alice", session)
    assert store.latest("alice", twin).payload == snap(7).payload
    assert store.transcript("alice", "older") == [1, "1", 2, "2"]
    assert store.fork("alice", store.create("alice", "new"), "empty") == "empty"
    assert store.latest("alice", "empty") is None
    with pytest.raises(ConflictError, match="already"):
        store.fork("alice", twin, "older")
    with pytest.raises(NotFoundError, match="no version 9"):
        store.fork("alice", twin, version=9)


def test_delete(opener):
    store = opener()
    for tenant in ("alice", "bob"):
        store.create(tenant, "one")
        store.commit(tenant, "one", 0, snap(1), transcript=[1])
    store.delete("alice", "one")
    with pytest.raises(NotFoundError):
        store.latest("alice", "one")
    assert store.usage("alice") == Usage(0, 0)
    assert store.latest("bob", "one").payload == snap(1).payload
    store.create("alice", "one")  # nothing of the old one comes back
    assert store.latest("alice", "one") is None
    assert store.transcript("alice", "one") == []


def test_transcript_up_to_a_version(opener):
    store = opener(keep=1)
    session = store.create("alice")
    turns = [{"role": "user", "content": "a\nb\u2028\0"}, ["x", 1, None], "plain"]
    for n, turn in enumerate(turns):
        store.commit("alice", session, n, snap(n), transcript=[turn, turn])
    assert store.transcript("alice", session) == [turn for turn in turns for _ in range(2)]
    assert store.transcript("alice", session, 1) == [turns[0], turns[0]]  # versions go, the transcript stays


@pytest.mark.parametrize("bad", ["", "x" * 201, "a\0b", "a\nb", "\ud800", 7, None])
def test_bad_ids(opener, bad):
    store = opener()
    store.create("alice", "x" * 200)
    for operation in OPERATIONS.values():
        with pytest.raises(ConfigError, match="expected 1 to 200 printable characters"):
            operation(store, "alice", bad)
        with pytest.raises(ConfigError):
            operation(store, bad, "x")
    with pytest.raises(ConfigError):
        store.create(bad, "x")


def test_bad_values_change_nothing(opener):
    store = opener()
    session = store.create("alice")
    for metadata in ({"x": math.nan}, {"x": b"bytes"}, {"x": object()}):
        with pytest.raises(ConfigError, match="metadata is not JSON"):
            store.commit("alice", session, 0, Snapshot(b"x", metadata))
    with pytest.raises(ConfigError, match="transcript entry is not JSON"):
        store.commit("alice", session, 0, snap(1), transcript=[{1, 2}])
    for version in (-1, "1", True, 1.0, 1 << 60):
        with pytest.raises(ConfigError, match="version: got"):
            store.commit("alice", session, version, snap(1))
    with pytest.raises(ConfigError, match="version: got 0"):
        store.get("alice", session, 0)
    assert store.latest("alice", session) is None


def test_health_and_threads(opener):
    store = opener(keep=2)
    store.check_health()
    session = store.create("alice")
    won: list[int] = []

    def work(seed: int) -> None:
        while True:
            now = store.info("alice", session).version
            if now >= 40:
                return
            try:
                won.append(store.commit("alice", session, now, snap(seed), transcript=[seed]).version)
            except ConflictError as error:
                assert error.version > now
            store.latest("alice", session)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = store.info("alice", session).version
    assert sorted(won) == list(range(1, last + 1))  # every version was won by exactly one
    assert len(store.transcript("alice", session)) == last
