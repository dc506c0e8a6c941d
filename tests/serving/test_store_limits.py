"""What a store keeps for how long, and what a tenant may hold."""

from __future__ import annotations

import json
import math
import threading

import pytest
from stores import OPERATIONS, snap

from ccm.errors import ConfigError
from ccm.serving.store import Limits, NotFoundError, QuotaError, Snapshot, Store, Usage


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


@pytest.mark.parametrize("limits", [{"keep": 0}, {"ttl": -1}, {"sessions": -1}, {"ttl": math.nan}])
def test_bad_limits(limits):
    with pytest.raises(ConfigError, match="limit "):
        Limits(**limits)


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
