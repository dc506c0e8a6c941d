"""Empty stores of every kind for tests, and a clock that they go by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import PostgresqlServer, RedisServer, postgresql_server, redis_server

from ccm.errors import CCMError
from ccm.serving.store import Limits, Snapshot, Store, open_store

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
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return empty_place(kind, tmp_path, request)


@pytest.fixture
def opener(url: str, open_at: Callable[[str], Opener]) -> Opener:
    return open_at(url)


def snap(n: int = 0, size: int = 40) -> Snapshot:
    return Snapshot(bytes([n % 256]) * size, {"n": n, "text": "é\0\ud800", "deep": [1.5, None]})


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
                payload = random.Random(tenant).randbytes(2000) + random.Random(f"{tenant}{n}").randbytes(
                    1000
                )
                cuts = () if n == 1 else (700, 2000)
                given = Snapshot(payload, {"n": n}, cuts=cuts)
                store.commit(tenant, "one", n - 1, given, [f"turn {n} of {tenant}"])
        return everything(store)
