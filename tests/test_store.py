"""The store of memories: one contract for every kind; crashes, races, full disks and damaged bytes."""

from __future__ import annotations

import json
import math
import pickle
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors import torch as safetensors
from servers import PostgresqlServer, RedisServer, postgresql_server, redis_server

from ccm.errors import (
    CCMError,
    ConfigError,
    MemoryFileError,
    MissingPackageError,
    StorageError,
    UnknownNameError,
)
from ccm.memory import KV, Memory, Row
from ccm.serving.store import (
    ConflictError,
    Limits,
    NotFoundError,
    QuotaError,
    Snapshot,
    Store,
    Usage,
    list_stores,
    open_store,
    register,
    sql,
)
from ccm.serving.store.base import STORES, name_of
from ccm.serving.store.codec import DTYPES, decode, encode
from ccm.storage import memory_file

KINDS = ["sqlite", "dir", "redis", "postgresql"]
EMBEDDED = ["sqlite", "dir"]
Opener = Callable[..., Store]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_process() -> Iterator[PostgresqlServer]:
    with postgresql_server() as server:
        yield server


def empty_place(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """The URL of an empty store."""
    if kind == "redis":
        url = request.getfixturevalue("redis_process").url
        import redis

        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql_process").url
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url
    return f"{kind}://{folder}/{'store' if kind == 'dir' else 'store.db'}"


@pytest.fixture
def open_at(tmp_path: Path, clock: Clock) -> Iterator[Callable[[str], Opener]]:
    """Open stores at a URL, with limits; they are closed at the end."""
    opened: list[Store] = []

    def at(url: str) -> Opener:
        def open_it(**limits: Any) -> Store:
            opened.append(open_store(url, Limits(**limits), clock))
            return opened[-1]

        return open_it

    yield at
    for store in opened:
        store.close()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return empty_place(request.param, tmp_path, request)


@pytest.fixture
def opener(url: str, open_at: Callable[[str], Opener]) -> Opener:
    return open_at(url)


def snap(n: int = 0, size: int = 40) -> Snapshot:
    return Snapshot(bytes([n % 256]) * size, {"n": n, "text": "é\0\ud800", "deep": [1.5, None]})


# ---------------------------------------------------------------------- the contract


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


OPERATIONS: dict[str, Callable[[Store, str, str], Any]] = {
    "latest": lambda s, t, i: s.latest(t, i),
    "get": lambda s, t, i: s.get(t, i, 1),
    "info": lambda s, t, i: s.info(t, i),
    "commit": lambda s, t, i: s.commit(t, i, 1, snap(2)),
    "commit 0": lambda s, t, i: s.commit(t, i, 0, snap(2)),
    "fork": lambda s, t, i: s.fork(t, i),
    "delete": lambda s, t, i: s.delete(t, i),
    "transcript": lambda s, t, i: s.transcript(t, i),
    "versions": lambda s, t, i: s.versions(t, i),
}


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


def test_expired_sessions_are_not_there(opener, clock):
    store = opener(ttl=10, sessions=2)
    store.create("alice", "old")
    store.create("alice", "used")
    store.commit("alice", "old", 0, snap(1), transcript=[1])
    clock.now += 6
    store.commit("alice", "used", 0, snap(2))
    assert store.info("alice", "used").expires == clock.now + 10
    clock.now += 6
    for operation in ("latest", "info", "commit", "fork", "delete", "transcript", "versions"):
        with pytest.raises(NotFoundError):
            OPERATIONS[operation](store, "alice", "old")
    assert [info.session for info in store.sessions("alice")] == ["used"]
    assert store.usage("alice").sessions == 1
    store.create("alice", "old")  # the name and the place are free again
    assert store.latest("alice", "old") is None
    assert store.transcript("alice", "old") == []
    clock.now += 11
    store.create("bob", "new")
    assert store.purge() == 2
    assert store.purge() == 0
    assert store.usage("alice") == Usage(0, 0)
    assert [info.session for info in store.sessions("bob")] == ["new"]


def test_limits_per_tenant(opener, clock):
    each = 100 + len(json.dumps(snap(1).metadata))
    store = opener(sessions=2, nbytes=2 * each + 10, keep=1)
    store.create("alice", "one")
    store.create("alice", "two")
    for make in (lambda: store.create("alice"), lambda: store.fork("alice", "one")):
        with pytest.raises(QuotaError, match="3 sessions, the limit per tenant is 2"):
            make()
    store.create("bob", "one")  # others are not affected
    for n in range(3):  # replaced versions do not count
        store.commit("alice", "one", n, snap(1, 100))
    store.commit("alice", "two", 0, snap(1, 100))
    with pytest.raises(QuotaError, match=f"{2 * each + 11} bytes, the limit per tenant is {2 * each + 10}"):
        store.commit("alice", "two", 1, snap(1, 100), transcript=["x" * 9])
    assert store.info("alice", "two").version == 1
    assert store.transcript("alice", "two") == []
    store.commit("alice", "two", 1, snap(1, 100), transcript=["x" * 8])
    store.delete("alice", "one")
    store.create("alice", "three")
    with pytest.raises(QuotaError, match=r"this commit has \d+ bytes, the limit is 50"):
        opener(commit=50).commit("alice", "three", 0, snap(1, 60))


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


@pytest.mark.parametrize("limits", [{"keep": 0}, {"ttl": -1}, {"sessions": -1}, {"ttl": math.nan}])
def test_bad_limits(limits):
    with pytest.raises(ConfigError, match="limit "):
        Limits(**limits)


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


def test_limits_hold_when_many_write_at_once(opener):
    stores = [opener(sessions=4, nbytes=1000, keep=5) for _ in range(4)]
    refused: list[QuotaError] = []
    start = threading.Barrier(4)

    def work(store: Store) -> None:
        start.wait()
        for _ in range(4):
            try:
                session = store.create("alice")
                for n in range(3):
                    store.commit("alice", session, n, Snapshot(b"x" * 98, {}))
            except QuotaError as error:
                refused.append(error)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].usage("alice") == Usage(4, 1000)  # full to the last byte, and not beyond
    assert len(refused) >= 12


# ---------------------------------------------------------------------- against a model


class Machine(RuleBasedStateMachine):
    """Random operations on a store and on a dictionary side by side."""

    place: Callable[[], str]
    KEEP, SESSIONS, NBYTES, TTL = 2, 3, 900, 20.0
    tenants = st.sampled_from(["alice", "bob"])
    names = st.sampled_from(["s", "t", "alice", "../s"])

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        limits = Limits(self.KEEP, self.TTL, self.SESSIONS, self.NBYTES)
        self.store = open_store(self.place(), limits, self.clock)
        self.model: dict[tuple[str, str], dict[str, Any]] = {}
        self.n = 0

    def alive(self, tenant: str) -> dict[str, dict[str, Any]]:
        return {
            name: s for (t, name), s in self.model.items() if t == tenant and s["expires"] > self.clock.now
        }

    @staticmethod
    def size(session: dict[str, Any]) -> int:
        held = sum(len(p) + len(json.dumps(m)) for p, m in session["versions"].values())
        return held + sum(len(json.dumps(entry)) for _, entry in session["transcript"])

    def fits(self, tenant: str, changed: dict[str, dict[str, Any]]) -> bool:
        after = {**self.alive(tenant), **changed}
        return len(after) <= self.SESSIONS and sum(map(self.size, after.values())) <= self.NBYTES

    def session(self, versions: dict[int, Any], transcript: list[Any]) -> dict[str, Any]:
        kept = dict(sorted(versions.items())[-self.KEEP :])
        return {"versions": kept, "transcript": transcript, "expires": self.clock.now + self.TTL}

    def expect(self, error: type[Exception] | None, act: Callable[[], Any]) -> Any:
        if error is None:
            return act()
        with pytest.raises(error):
            act()

    def put(self, tenant: str, name: str, new: dict[str, Any], act: Callable[[], Any]) -> None:
        fits = self.fits(tenant, {name: new})
        self.expect(None if fits else QuotaError, act)
        if fits:
            self.model[tenant, name] = new

    @rule(tenant=tenants, name=names)
    def create(self, tenant: str, name: str) -> None:
        def act() -> Any:
            return self.store.create(tenant, name)

        if name in self.alive(tenant):
            self.expect(ConflictError, act)
        else:
            self.put(tenant, name, self.session({}, []), act)

    @rule(tenant=tenants, name=names, off=st.sampled_from([0, 0, 0, 1, -1]), size=st.integers(0, 200))
    def commit(self, tenant: str, name: str, off: int, size: int) -> None:
        self.n += 1
        old = self.alive(tenant).get(name)
        newest = max(old["versions"], default=0) if old else 0
        expected = max(newest + off, 0)
        payload, metadata, entry = bytes([self.n % 256]) * size, {"n": self.n}, {"turn": self.n}

        def act() -> Any:
            return self.store.commit(tenant, name, expected, Snapshot(payload, metadata), [entry])

        if old is None:
            self.expect(NotFoundError, act)
        elif expected != newest:
            self.expect(ConflictError, act)
        else:
            versions = {**old["versions"], newest + 1: (payload, metadata)}
            new = self.session(versions, [*old["transcript"], (newest + 1, entry)])
            self.put(tenant, name, new, act)

    @rule(tenant=tenants, name=names, twin=names)
    def fork(self, tenant: str, name: str, twin: str) -> None:
        old = self.alive(tenant).get(name)

        def act() -> Any:
            return self.store.fork(tenant, name, twin)

        if old is None:
            self.expect(NotFoundError, act)
        elif twin in self.alive(tenant):
            self.expect(ConflictError, act)
        else:
            copy = {1: old["versions"][max(old["versions"])]} if old["versions"] else {}
            self.put(tenant, twin, self.session(copy, [(1, entry) for _, entry in old["transcript"]]), act)

    @rule(tenant=tenants, name=names)
    def delete(self, tenant: str, name: str) -> None:
        there = name in self.alive(tenant)
        self.expect(None if there else NotFoundError, lambda: self.store.delete(tenant, name))
        self.model.pop((tenant, name), None)

    @rule(seconds=st.sampled_from([1.0, 7.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.model)
    @rule()
    def purge(self) -> None:
        self.store.purge()
        assert self.store.purge() == 0

    @invariant()
    def same(self) -> None:
        for tenant in ("alice", "bob"):
            alive = self.alive(tenant)
            infos = self.store.sessions(tenant)
            assert [info.session for info in infos] == sorted(alive)
            assert [info.nbytes for info in infos] == [self.size(alive[info.session]) for info in infos]
            assert self.store.usage(tenant) == Usage(len(alive), sum(map(self.size, alive.values())))
            for name, session in alive.items():
                newest = max(session["versions"], default=0)
                assert list(self.store.versions(tenant, name)) == sorted(session["versions"])
                for version, (payload, metadata) in session["versions"].items():
                    found = self.store.get(tenant, name, version)
                    assert (found.payload, found.metadata) == (payload, metadata)
                latest = self.store.latest(tenant, name)
                assert (latest.version if latest else 0) == newest
                assert self.store.transcript(tenant, name) == [entry for _, entry in session["transcript"]]
            for name in {"s", "t", "alice", "../s"} - set(alive):
                with pytest.raises(NotFoundError):
                    self.store.latest(tenant, name)

    def teardown(self) -> None:
        self.store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_random_operations_against_a_dictionary(kind, request, tmp_path):
    runs = iter(range(10**6))

    class Machine_(Machine):
        def place(self) -> str:
            folder = tmp_path / str(next(runs))
            return empty_place(kind, folder, request)

    few = settings(
        max_examples=12,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine_, settings=few)


# ---------------------------------------------------------------------- several processes


def run_code(code: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from ccm.serving.store import *\n" + code, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options)


RACE = """
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for n in range(10):
    while True:  # until this round's version is there, by whomever
        try:
            store.commit("alice", "raced", n, Snapshot(sys.argv[2].encode(), {}), [sys.argv[2]])
            print("won", n + 1, flush=True)
            break
        except ConflictError as error:
            if error.version > n:
                break
"""


def test_of_two_processes_that_commit_one_version_one_wins(url, opener):
    store = opener(keep=20)
    store.create("alice", "raced")
    racers = [run_code(RACE, url, name) for name in ("a", "b")]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {name: racer.communicate()[0].split()[1::2] for name, racer in zip("ab", racers, strict=True)}
    assert all(racer.returncode == 0 for racer in racers)
    assert sorted(map(int, won["a"] + won["b"])) == list(range(1, 11))
    winners = [name for n in range(1, 11) for name in "ab" if str(n) in won[name]]
    assert store.transcript("alice", "raced") == winners
    assert store.latest("alice", "raced").payload == winners[-1].encode()


@pytest.mark.parametrize("kind", KINDS)
def test_many_processes_open_a_new_store_at_once(kind, tmp_path, request):
    code = "sys.stdin.readline()\nwith open_store(sys.argv[1]) as s: s.create('t', sys.argv[2])"
    url = empty_place(kind, tmp_path, request)
    openers = [run_code(code, url, name) for name in "abcde"]
    time.sleep(0.5)  # they have imported
    for process in openers:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in openers:
        process.communicate()
        assert process.returncode == 0
    with open_store(url) as store:
        assert [info.session for info in store.sessions("t")] == list("abcde")


WRITER = """
import hashlib
store = open_store(sys.argv[1], Limits(keep=3))
n = store.info("alice", "busy").version
while True:
    n += 1
    payload = hashlib.sha256(str(n).encode()).digest() * (1000 + 700 * (n % 7))
    store.commit("alice", "busy", n - 1, Snapshot(payload, {"n": n}), [n])
    print(n, flush=True)
"""


def check_survivor(store: Store, acknowledged: int) -> int:
    """Nothing acknowledged is lost, everything kept is whole; returns the newest version."""
    import hashlib

    newest = store.info("alice", "busy").version
    assert acknowledged <= newest <= acknowledged + 1  # one more may have been cut off before its answer
    for n in range(max(1, newest - 2), newest + 1):
        found = store.get("alice", "busy", n)
        assert found.payload == hashlib.sha256(str(n).encode()).digest() * (1000 + 700 * (n % 7))
        assert found.metadata == {"n": n}
    assert store.transcript("alice", "busy") == list(range(1, newest + 1))
    return newest


def kill_during_commits(url: str, times: int, seed: int) -> int:
    """Kill a writing process again and again; returns how many commits were acknowledged in all."""
    rng = random.Random(seed)
    with open_store(url) as store:
        store.create("alice", "busy")
    acknowledged = 0
    for _ in range(times):
        writer = run_code(WRITER, url)
        for _ in range(rng.randint(1, 12)):  # it is writing
            line = writer.stdout.readline()
            acknowledged = int(line)
        time.sleep(rng.random() * 0.02)
        writer.kill()
        for line in writer.stdout.readlines():  # with what was read ahead, which communicate() leaves out
            acknowledged = int(line)
        writer.communicate()
        with open_store(url) as store:
            acknowledged = check_survivor(store, acknowledged)
    return acknowledged


@pytest.mark.parametrize("kind", EMBEDDED)
def test_kill_during_commits(kind, tmp_path, request):
    assert kill_during_commits(empty_place(kind, tmp_path, request), 10, seed=1) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", EMBEDDED)
def test_fifty_kills_during_commits(kind, tmp_path, request):
    assert kill_during_commits(empty_place(kind, tmp_path, request), 50, seed=2) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["redis", "postgresql"])
def test_kill_the_server_during_commits(kind, tmp_path, request):
    url = empty_place(kind, tmp_path, request)
    server = request.getfixturevalue(f"{kind}_process")
    acknowledged = 0
    with open_store(url) as store:
        store.create("alice", "busy")
        for _ in range(5):
            writer = run_code(WRITER, url, stderr=subprocess.DEVNULL)
            for _ in range(8):
                acknowledged = int(writer.stdout.readline())
            server.crash()
            for line in writer.stdout.readlines():
                acknowledged = int(line)
            writer.communicate()
            assert writer.returncode == 1  # a StorageError
            with pytest.raises(StorageError):
                store.check_health()
            server.start()
            acknowledged = check_survivor(store, acknowledged)  # the same store object goes on


FILL = """
import resource
store = open_store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writing past this size fails, like a full disk
from ccm.errors import StorageError
n = store.info("alice", "full").version
try:
    for n in range(n, 1000):
        store.commit("alice", "full", n, Snapshot(bytes([n % 256]) * int(sys.argv[2]), {"n": n}), ["x" * 5000])
        print(n + 1, flush=True)
except StorageError as error:
    print("StorageError", flush=True)
try:
    store.latest("alice", "full")
    print("readable", flush=True)
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [1_000, 10_000, 200_000])
@pytest.mark.parametrize("kind", EMBEDDED)
def test_a_full_disk_keeps_the_last_version(kind, size, tmp_path, request):
    url = empty_place(kind, tmp_path, request)
    with open_store(url, Limits(keep=1000)) as store:
        store.create("alice", "full")
        store.commit("alice", "full", 0, Snapshot(b"first", {}), ["first"])
    lines = run_code(FILL, url, str(size)).communicate()[0].split()
    assert lines[-2:] == ["StorageError", "readable"]
    acknowledged = int(lines[-3]) if len(lines) > 2 else 1
    with open_store(url) as store:
        newest = store.latest("alice", "full")
        assert newest.version == acknowledged
        assert newest.payload == (bytes([(acknowledged - 1) % 256]) * size if acknowledged > 1 else b"first")
        assert len(store.transcript("alice", "full")) == acknowledged
        store.commit("alice", "full", acknowledged, snap(1))  # and goes on once there is room
        store.check_health()


# ---------------------------------------------------------------------- damaged bytes


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, grow, overwrite or repeat a part."""
    data = bytearray(data)
    kind = rng.randrange(5)
    at = rng.randrange(len(data)) if data else 0
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data += rng.randbytes(rng.randint(1, 50))
    elif kind == 3:
        data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
    else:
        data[at:at] = data[at // 2 : at // 2 + 30]
    return bytes(data)


def everything(store: Store) -> list[Any]:
    """What a reader can see of both tenants; an error of our own in place of what is damaged."""
    seen: list[Any] = []
    for act in (
        *(lambda n=n: store.get("alice", "one", n).payload for n in (1, 2)),
        lambda: store.latest("alice", "one").metadata,
        lambda: store.transcript("alice", "one"),
        lambda: store.latest("bob", "one").payload,
        lambda: [info.session for info in store.sessions("alice")],
        lambda: store.info("alice", "one").version,
        lambda: store.usage("alice").sessions,
    ):
        try:
            seen.append(act())
        except CCMError as error:
            assert str(error)
            seen.append(error)
    return seen


def filled(url: str) -> list[Any]:
    with open_store(url) as store:
        for tenant in ("alice", "bob"):
            store.create(tenant, "one")
            for n in (1, 2):
                payload = random.Random(f"{tenant}{n}").randbytes(3000)
                store.commit(tenant, "one", n - 1, Snapshot(payload, {"n": n}), [f"turn {n} of {tenant}"])
        return everything(store)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_damaged_files_are_an_error_or_unchanged_values(kind, tmp_path, request):
    url = empty_place(kind, tmp_path, request)
    whole = filled(url)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    originals = {path: path.read_bytes() for path in files}
    rng = random.Random(5)
    hurt = 0
    for _ in range(250):
        path = rng.choice(files)
        path.write_bytes(damage(originals[path], rng))
        for extra in tmp_path.glob("*.db-*"):
            extra.unlink()
        try:
            with open_store(url) as store:
                seen = everything(store)
        except CCMError:
            hurt += 1
        else:
            # payloads, metadata and transcripts: as written, or an error; never something else
            assert all(isinstance(s, CCMError) or s == w for s, w in zip(seen[:5], whole[:5], strict=True))
            hurt += any(isinstance(s, CCMError) for s in seen)
        path.write_bytes(originals[path])
    assert hurt > 100
    for extra in tmp_path.glob("*.db-*"):
        extra.unlink()
    with open_store(url) as store:
        assert everything(store) == whole


def test_versions_cannot_be_moved_to_another_place(tmp_path, request):
    """A valid record at another session, version or tenant is refused: the digest covers where it belongs."""
    url = empty_place("sqlite", tmp_path, request)
    filled(url)
    swaps = [
        "UPDATE ccm_versions SET payload = (SELECT payload FROM ccm_versions WHERE tenant = 'bob' AND version = 1),"
        " metadata = (SELECT metadata FROM ccm_versions WHERE tenant = 'bob' AND version = 1),"
        " created = (SELECT created FROM ccm_versions WHERE tenant = 'bob' AND version = 1),"
        " digest = (SELECT digest FROM ccm_versions WHERE tenant = 'bob' AND version = 1)"
        " WHERE tenant = 'alice' AND version = 1",
        "UPDATE ccm_transcripts SET tenant = CASE tenant WHEN 'bob' THEN 'alice' ELSE 'carol' END",
        "UPDATE ccm_versions SET version = 7 - version",
    ]
    for swap in swaps:
        with sqlite3.connect(url.removeprefix("sqlite://")) as connection:
            connection.execute(swap)
    with open_store(url) as store:
        with pytest.raises(MemoryFileError, match="version 2 was damaged"):
            store.latest("alice", "one")
        with pytest.raises(MemoryFileError, match="transcript was damaged"):
            store.transcript("alice", "one")
        store.delete("alice", "one")  # and can be let go of
        store.create("alice", "one")
    url = empty_place("dir", tmp_path, request)
    filled(url)
    ones = sorted(tmp_path.glob("store/*/*/1.safetensors"))
    ones[0].write_bytes(ones[1].read_bytes())
    with open_store(url) as store, pytest.raises(MemoryFileError, match="version 1 was damaged"):
        store.get("alice", "one", 1)
        store.get("bob", "one", 1)
    manifests = sorted(tmp_path.glob("store/*/*/session.json"))
    manifests[0].write_bytes(manifests[1].read_bytes())
    owner = json.loads(manifests[1].read_bytes().partition(b"\n")[2])["tenant"]
    victim = "alice" if owner == "bob" else "bob"
    with open_store(url) as store:
        with pytest.raises(MemoryFileError, match="belongs to another session"):
            store.latest(victim, "one")
        assert store.sessions(victim) == []  # logged, and the others of this tenant stay usable
        store.create(victim, "two")
        store.delete(victim, "one")


def test_damaged_values_in_a_server(tmp_path, request):
    url = empty_place("redis", tmp_path, request)
    whole = filled(url)
    import redis

    client = redis.Redis.from_url(url)
    key = f"ccm:{name_of('alice')}:s:one"
    rng = random.Random(3)
    original = client.hgetall(key)
    for _ in range(60):
        field = rng.choice(sorted(original))
        client.hset(key, field, damage(original[field], rng))
        with open_store(url) as store:
            for seen, right in zip(everything(store)[:5], whole[:5], strict=True):
                assert isinstance(seen, CCMError) or seen == right
        client.delete(key)
        client.hset(key, mapping=original)
    with open_store(url) as store:
        assert everything(store) == whole
    client.close()


# ---------------------------------------------------------------------- opening


def test_every_kind_is_registered_and_one_class_adds_another(tmp_path):
    assert list_stores() == sorted(KINDS)

    @register("toy")
    class Toy(STORES["dir"]):  # type: ignore[misc]
        """Registered by being there."""

    try:
        assert "toy" in list_stores()
        with open_store(f"toy://{tmp_path}/x") as store:
            store.create("alice", "one")
            store.commit("alice", "one", 0, snap(1))
            assert isinstance(store, Toy)
            assert store.latest("alice", "one").payload == snap(1).payload
    finally:
        del STORES["toy"]
    with pytest.raises(UnknownNameError, match="unknown store 'mysql': expected one of dir, postgresql"):
        open_store("mysql://host/x")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memories.db", "expected a URL"),
        ("sqlite://host/x", "expected sqlite:///absolute/path"),
        ("sqlite:", "expected sqlite:///absolute/path"),
        ("dir://", "expected dir:///absolute/path"),
        ("redis://:secret@/0", "expected redis://user:password@host"),
        ("redis://:secret@host:port/0", "expected redis://user:password@host"),
        ("postgresql://u:secret@host:5432/db?nonsense=1", "expected postgresql://user:password@host"),
    ],
)
def test_bad_urls_say_what_is_expected_and_keep_secrets(url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@127.0.0.1:1/0",
        "postgresql://u:secret@127.0.0.1:1/x",
        "sqlite:///proc/x/y.db",
        "dir:///proc/x",
    ],
)
def test_a_store_that_cannot_be_reached(url):
    with pytest.raises(StorageError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("kind", "package"), [("redis", "redis"), ("postgresql", "psycopg")])
def test_a_missing_package_is_named(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"needs {package}.*compressed-context-memory\[serve\]"):
        open_store(f"{kind}://127.0.0.1/0")


def test_relative_and_escaped_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_store("sqlite:a%20b/x.db").close()
    open_store("dir:folder").close()
    assert {path.name for path in tmp_path.iterdir()} == {"a b", "folder"}
    assert (tmp_path / "a b" / "x.db").stat().st_mode & 0o077 == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'letter\.txt' and is no store"):
        open_store("dir:full")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_migration_keeps_what_is_there_and_newer_schemas_are_refused(kind, tmp_path, request, monkeypatch):
    url = empty_place(kind, tmp_path, request)
    whole = filled(url)
    now = len(sql.MIGRATIONS)
    two = [*sql.MIGRATIONS, ["ALTER TABLE ccm_sessions ADD COLUMN title {text}"]]
    with monkeypatch.context() as newer:
        newer.setattr(sql, "MIGRATIONS", two)
        for _ in range(2):  # the second time there is nothing to do
            with open_store(url) as store:
                assert everything(store) == whole
    with pytest.raises(ConfigError, match=f"has schema {now + 1}, this release knows up to {now}: upgrade"):
        open_store(url)
    with monkeypatch.context() as broken:  # a migration that fails leaves the old schema
        broken.setattr(sql, "MIGRATIONS", [*two, ["CREATE TABLE ccm_x (a {text})", "NONSENSE"]])
        with pytest.raises(StorageError):
            open_store(url)
        broken.setattr(sql, "MIGRATIONS", [*two, ["CREATE TABLE ccm_x (a {text})"]])
        with open_store(url) as store:
            assert everything(store) == whole


@pytest.mark.parametrize("kind", ["dir", "redis"])
def test_newer_layouts_are_refused(kind, tmp_path, request):
    url = empty_place(kind, tmp_path, request)
    open_store(url).close()
    if kind == "dir":
        (tmp_path / "store" / "ccm-store.json").write_text('{"schema": 2}')
    else:
        import redis

        with redis.Redis.from_url(url) as client:
            client.set("ccm:schema", 2)
    with pytest.raises(ConfigError, match="has schema 2, this release knows up to 1: upgrade"):
        open_store(url)


def test_ids_do_not_become_file_names(tmp_path, request):
    url = empty_place("dir", tmp_path, request)
    with open_store(url) as store:
        for name in ("../../escape", "/etc/passwd", "..", "CON", "a" * 200):
            store.create(name, name)
            store.commit(name, name, 0, snap(1))
    outside = [p for p in tmp_path.rglob("*") if "escape" in p.name or "passwd" in p.name]
    assert not outside
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_a_session_half_made_or_half_deleted_is_not_there(tmp_path, request, clock):
    url = empty_place("dir", tmp_path, request)
    with open_store(url, Limits(), clock) as store:
        store.create("alice", "one")
        store.commit("alice", "one", 0, snap(1), [1])
        (folder,) = tmp_path.glob("store/*/*/")
        (folder / "session.json").unlink()
        with pytest.raises(NotFoundError):
            store.latest("alice", "one")
        assert store.sessions("alice") == []
        store.create("alice", "one")
        assert store.transcript("alice", "one") == []
        assert [p.name for p in folder.iterdir()] == ["session.json"]
        (folder / "session.json").unlink()
        assert store.purge() == 0
        assert not folder.exists()


def test_a_server_with_weak_settings_is_warned_about(tmp_path, request, caplog):
    url = empty_place("redis", tmp_path, request)
    open_store(url).close()
    assert not caplog.records
    import redis

    with redis.Redis.from_url(url) as client:
        client.config_set("appendfsync", "everysec")
        try:
            open_store(url).close()
        finally:
            client.config_set("appendfsync", "always")
    assert "can lose memories" in caplog.text


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
def test_a_restart_of_the_server_is_survived(kind, tmp_path, request):
    url = empty_place(kind, tmp_path, request)
    server = request.getfixturevalue(f"{kind}_process")
    with open_store(url) as store:
        store.create("alice", "one")
        store.commit("alice", "one", 0, snap(1))
        server.stop()
        with pytest.raises(StorageError):
            store.commit("alice", "one", 1, snap(2))
        server.start()
        assert store.commit("alice", "one", 1, snap(2)).version == 2
        assert store.get("alice", "one", 1).payload == snap(1).payload


# ---------------------------------------------------------------------- memories as bytes


def memory_of(seed: int = 0, window: torch.dtype = torch.bfloat16) -> Memory:
    """Two rows, with parts of length zero and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)

    def kv(length: int, dtype: torch.dtype = torch.float32) -> KV:
        sizes = 10.0 ** torch.arange(-3, 5)  # per channel
        return KV(*(torch.randn(2, 3, 2, length, 8, generator=generator) * sizes).to(dtype))

    return Memory(
        (
            Row(kv(1, window), kv(6), kv(5, window), (2, 3), steps=3, tokens=40, recent=(8, 9)),
            Row(kv(0, window), kv(2), kv(0, window), steps=1, tokens=7, dropped=2),
        ),
        "print",
    )


def tensors_of(memory: Memory) -> list[torch.Tensor]:
    return [t for row in memory.rows for kv in (row.sink, row.slots, row.window) for t in kv]


def same(a: Memory, b: Memory) -> bool:
    counters = [
        [{k: v for k, v in row.__dict__.items() if not isinstance(v, KV)} for row in m.rows] for m in (a, b)
    ]
    return (
        counters[0] == counters[1]
        and a.fingerprint == b.fingerprint
        and all(
            x.dtype == y.dtype and torch.equal(x, y)
            for x, y in zip(tensors_of(a), tensors_of(b), strict=True)
        )
    )


@pytest.mark.parametrize("window", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_comes_back_with_the_error_that_is_stated(dtype, window):
    memory = memory_of(window=torch.float32)
    memory = Memory(
        tuple(replace(row, sink=row.sink.to(window), window=row.window.to(window)) for row in memory.rows),
        "print",
    )
    data, metadata = encode(memory, dtype)
    back, read = decode(data)
    assert read == metadata == json.loads(json.dumps(metadata))
    assert metadata["nbytes"] == len(data)
    assert same(memory, back) == (dtype == "float32")
    assert [t.dtype for t in tensors_of(back)] == [t.dtype for t in tensors_of(memory)]
    for place, part in enumerate(("keys", "values")):
        pairs = list(zip(tensors_of(memory)[place::2], tensors_of(back)[place::2], strict=True))
        off, whole = (
            torch.cat([f(x.double(), y.double()).flatten() for x, y in pairs]).norm()
            for f in (lambda x, y: x - y, lambda x, y: x)
        )
        assert metadata["error"][part] == pytest.approx((off / whole).item(), rel=1e-6)
    bounds = {"float32": (0, 0), "bfloat16": (1e-5, 3e-3), "int8": (1e-4, 5e-3)}[dtype]
    assert all(bounds[0] <= error <= bounds[1] for error in metadata["error"].values())


def test_int8_scales_each_channel_by_itself():
    """Every channel keeps its own precision, though the largest is 10 million times the smallest."""
    memory = memory_of(window=torch.float32)
    back, _ = decode(encode(memory, "int8")[0])
    x, y = memory.rows[0].slots.keys, back.rows[0].slots.keys
    assert ((x - y).norm(dim=2) / x.norm(dim=2)).max() < 0.02
    step = x.abs().max() / 127  # negative control: one scale for all loses the small channels
    z = (x / step).round() * step
    assert ((x - z).norm(dim=2) / x.norm(dim=2)).max() == 1


def test_smaller_dtypes_are_smaller():
    memory = memory_of(window=torch.float32)
    wide = KV(*torch.randn(2, 3, 2, 400, 8))
    memory = Memory((Row(wide, wide, wide, (400,)),), "print")
    whole, half, quarter = (len(encode(memory, dtype)[0]) / memory.nbytes for dtype in DTYPES)
    assert 1 <= whole < 1.05
    assert 0.5 <= half < 0.53
    assert 0.25 <= quarter < 0.29


def test_constant_tiny_and_huge_values():
    for value in (0.0, 1e-45, -1e-38, 1e30):
        kv = KV(*torch.full((2, 1, 1, 3, 2), value))
        for dtype in DTYPES:
            back, metadata = decode(encode(Memory((Row(kv, kv, kv, (3,)),), "p"), dtype)[0])
            assert all(math.isfinite(e) for e in metadata["error"].values())
            if value in (0.0, 1e30):
                assert torch.allclose(back.rows[0].slots.keys, kv.keys, rtol=5e-3)
    top = KV(*torch.full((2, 1, 1, 3, 2), torch.finfo(torch.float32).max))
    with pytest.raises(MemoryFileError, match="too large for bfloat16; store it as float32"):
        encode(Memory((Row(top, top, top, (3,)),), "p"), "bfloat16")


def test_what_cannot_be_encoded():
    memory = memory_of()
    with pytest.raises(
        UnknownNameError, match="unknown dtype 'int4': expected one of bfloat16, float32, int8"
    ):
        encode(memory, "int4")
    memory.rows[0].slots.keys[0, 0, 0, 0] = math.nan
    with pytest.raises(MemoryFileError, match="NaN"):
        encode(memory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_memories_are_refused(dtype):
    data = encode(memory_of(), dtype)[0]
    rng = random.Random(11)
    for _ in range(400):
        broken = damage(data, rng)
        if broken == data:
            continue
        with pytest.raises(MemoryFileError, match=r"no usable stored memory|limit is|newer ccm") as caught:
            decode(broken, 2 * len(data))
        assert len(str(caught.value)) < 500
    assert same(decode(data)[0], decode(data, len(data))[0])


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def forged(change: Callable[..., Any]) -> bytes:
    """A memory that was changed by somebody who knows how to make a digest."""
    data = encode(memory_of(), "int8")[0]
    tensors, metadata = safetensors.load(data), parts_of(data)[0]["__metadata__"]
    del metadata["digest"]
    rows = json.loads(metadata["rows"])
    change(tensors, metadata, rows)
    if metadata.get("rows"):
        metadata["rows"] = json.dumps(rows)
    metadata["digest"] = memory_file.content_digest(tensors, metadata)
    return safetensors.save(tensors, metadata)


def put(target: Any, key: Any, value: Any) -> None:
    target[key] = value


FORGERIES: dict[str, tuple[Callable[..., None], str]] = {
    "nan scale": (lambda t, m, r: t["0.slots.keys.scale"].fill_(math.nan), "NaN"),
    "infinite product": (lambda t, m, r: t["0.slots.keys.scale"].fill_(3e38), "NaN or infinite"),
    "missing tensor": (lambda t, m, r: t.pop("0.slots.keys"), "0.slots.keys"),
    "extra tensor": (lambda t, m, r: put(t, "x", torch.zeros(1)), "tensors, expected"),
    "other dtype": (lambda t, m, r: put(t, "0.slots.keys", torch.zeros(3, 2, 6, 8)), "has dtype 'F32'"),
    "int64": (lambda t, m, r: put(t, "0.sink.keys", torch.zeros(3, 2, 1, 8).long()), "has dtype 'I64'"),
    "flat": (lambda t, m, r: put(t, "0.slots.keys", t["0.slots.keys"].flatten()), "impossible shape|zip"),
    "keys longer": (
        lambda t, m, r: put(t, "0.slots.keys", torch.zeros(3, 2, 7, 8).char()),
        "differ in shape",
    ),
    "wide scale": (
        lambda t, m, r: put(t, "0.slots.keys.scale", torch.ones(3, 2, 6, 8)),
        "scale .* another shape",
    ),
    "heads": (
        lambda t, m, r: [
            put(t, f"1.sink.{p}{s}", torch.zeros(3, 9, 0, 8).to(d))
            for p in ("keys", "values")
            for s, d in (("", torch.int8), (".scale", torch.float32))
        ],
        "layers, heads or channels differ",
    ),
    "segments": (lambda t, m, r: put(r[0], "segments", [2, 4]), "segments are not its window"),
    "negative": (lambda t, m, r: put(r[0], "tokens", -1), "impossible counters"),
    "fraction": (lambda t, m, r: put(r[0], "steps", 1.5), "impossible counters"),
    "true": (lambda t, m, r: put(r[0], "steps", True), "impossible counters"),
    "other field": (
        lambda t, m, r: put(r[0], "__class__", 1),
        "written by a newer ccm: row 0 counts '__class__'",
    ),
    "no counter": (lambda t, m, r: r[0].pop("tokens"), "other fields"),
    "merged": (lambda t, m, r: put(r[0], "merged", -1), "impossible counters"),
    "not rows": (lambda t, m, r: r.__setitem__(slice(None), [7]), "TypeError"),
    "no rows": (lambda t, m, r: r.clear(), "rows are not as expected"),
    "dtypes": (lambda t, m, r: put(r[0]["dtypes"], "slots", "load"), "KeyError"),
    "no metadata rows": (lambda t, m, r: m.pop("rows"), "KeyError"),
    "deep json": (lambda t, m, r: put(m, "error", "[" * 100_000), "not a number"),
    "error": (lambda t, m, r: put(m, "error", '{"keys": NaN, "values": 0.0}'), "not a number"),
    "format": (
        lambda t, m, r: put(m, "format", "ccm-memory/1"),
        "its format is 'ccm-memory/1', expected 'ccm-snapshot'",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_memories_are_refused(name):
    change, message = FORGERIES[name]
    with pytest.raises(MemoryFileError, match=message):
        decode(forged(change))


def test_the_forger_could_make_a_good_one():
    assert decode(forged(lambda t, m, r: None))[0].tokens == 47


def test_a_snapshot_from_before_merged_tokens_were_counted_is_read():
    golden = Path(__file__).parent / "golden" / "snapshot-without-merged.bin"
    (row,) = decode(golden.read_bytes())[0].rows
    assert (row.steps, row.tokens, row.merged, row.merged_segments, row.recent) == (4, 24, 0, 0, ())
    data = encode(Memory((replace(row, merged=12, merged_segments=2, recent=(6, 6)),), "p"))[0]
    (back,) = decode(data)[0].rows
    assert (back.merged, back.merged_segments, back.recent) == (12, 2, (6, 6))
    exported = Path(golden).with_name("memory-without-merged.ccm").read_bytes()
    assert Memory.loads(exported)[0].rows[0].tokens == 24


def test_nothing_is_allocated_for_what_a_header_claims(monkeypatch):
    data = encode(memory_of(), "float32")[0]
    header, body = parts_of(data)
    monkeypatch.setattr(
        memory_file.safetensors, "load", lambda data: pytest.fail("allocated before it was checked")
    )
    claims: list[bytes] = [
        b"",
        b"\x05",
        (1 << 60).to_bytes(8, "little") + data[8:],
        joined(b"[" * 100_000, body),
        joined(b"7", body),
        joined({**header, "__metadata__": 7}, body),
        joined({**header, "__metadata__": {}}, body),
        pickle.dumps(memory_of()),
        b"PK\x03\x04" + data,
    ]
    for shape in (
        [1 << 40, 2, 6, 8],
        [3, 2, 1 << 62, 8],
        [3, 2, -6, 8],
        [3, 2, 6.0, 8],
        [3, 2, 6],
        "3268",
        None,
    ):
        claims.append(joined({**header, "0.slots.keys": {**header["0.slots.keys"], "shape": shape}}, body))
    for claim in claims:
        with pytest.raises(MemoryFileError, match="no usable stored memory"):
            decode(claim)
    with pytest.raises(MemoryFileError, match=f"of {len(data)} bytes, the limit is 100"):
        decode(data, 100)


def test_the_header_of_one_memory_does_not_fit_the_tensors_of_another():
    a, b = (encode(memory_of(seed), "float32")[0] for seed in (1, 2))
    (head_a, body_a), (head_b, body_b) = parts_of(a), parts_of(b)
    assert same(decode(joined(head_a, body_a))[0], memory_of(1))
    for swapped in (joined(head_a, body_b), joined(head_b, body_a)):
        with pytest.raises(MemoryFileError, match="digest differs"):
            decode(swapped)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_a_conversation_goes_on_from_a_store(kind, tmp_path, request):
    from tiny import history, random_rows, tiny_compressor

    compressor = tiny_compressor(window=8, sink=2)
    first, second, prompt = random_rows([[6, 9, 7], [5], [4]], seed=3)
    told = history(compressor, first, window=8, sink=2)
    with open_store(empty_place(kind, tmp_path, request)) as store:
        session = store.create("alice")
        store.commit("alice", session, 0, Snapshot(*encode(told)))
        back, metadata = decode(store.latest("alice", session).payload)
        assert metadata == store.latest("alice", session).metadata
    compressor.check(back, 1)
    logits = [
        compressor.logits(prompt, memory=compressor.compress(second, memory, window=8, sink=2))
        for memory in (told, back, compressor.empty())
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
