"""Damaged bytes in a store: an error, or the values that were written."""

from __future__ import annotations

import json
import random
import sqlite3

import pytest
from stores import EMBEDDED, damage, empty_place, everything, filled

from ccm.errors import CCMError, MemoryFileError
from ccm.serving.store import open_store
from ccm.serving.store.base import name_of


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
    keys = [f"ccm:{name_of('alice')}:{what}:one" for what in "sp"]
    rng = random.Random(3)
    originals = {key: client.hgetall(key) for key in keys}
    for n in range(80):
        key = keys[n % 4 == 0]
        original = originals[key]
        field = rng.choice([name for name, value in sorted(original.items()) if value])
        client.hset(key, field, damage(original[field], rng))
        with open_store(url) as store:
            for seen, right in zip(everything(store)[:5], whole[:5], strict=True):
                assert isinstance(seen, CCMError) or seen == right
        client.delete(key)
        client.hset(key, mapping=original)
    with open_store(url) as store:
        assert everything(store) == whole
    client.close()
