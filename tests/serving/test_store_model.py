"""Random operations on a store and on a dictionary side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stores import KINDS, Clock, empty_place

from ccm.serving.store import ConflictError, Limits, NotFoundError, QuotaError, Snapshot, Usage, open_store
from ccm.serving.store.base import PART


class Machine(RuleBasedStateMachine):
    """Random operations on a store and on a dictionary side by side."""

    place: Callable[[], str]
    KEEP, SESSIONS, NBYTES, TTL = 2, 3, 900, 20.0
    shares = True
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

    def size(self, session: dict[str, Any]) -> int:
        held, parts = 0, set[bytes]()
        for payload, metadata, pieces in session["versions"].values():
            shared = self.shares and len(pieces) > 1
            held += len(json.dumps(metadata)) + (PART * len(pieces) if shared else len(payload))
            parts |= set(pieces) if shared else set()
        return held + sum(map(len, parts)) + sum(len(json.dumps(entry)) for _, entry in session["transcript"])

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

    @rule(
        tenant=tenants,
        name=names,
        off=st.sampled_from([0, 0, 0, 1, -1]),
        pieces=st.lists(st.sampled_from([b"a" * 60, b"b" * 60, b"c" * 5, b""]), min_size=1, max_size=4),
    )
    def commit(self, tenant: str, name: str, off: int, pieces: list[bytes]) -> None:
        self.n += 1
        old = self.alive(tenant).get(name)
        newest = max(old["versions"], default=0) if old else 0
        expected = max(newest + off, 0)
        payload, metadata, entry = b"".join(pieces), {"n": self.n}, {"turn": self.n}
        cuts = tuple(accumulate(map(len, pieces[:-1])))

        def act() -> Any:
            return self.store.commit(tenant, name, expected, Snapshot(payload, metadata, cuts=cuts), [entry])

        if old is None:
            self.expect(NotFoundError, act)
        elif expected != newest:
            self.expect(ConflictError, act)
        else:
            versions = {**old["versions"], newest + 1: (payload, metadata, pieces)}
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
                for version, (payload, metadata, _) in session["versions"].items():
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
        shares = kind != "dir"

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
