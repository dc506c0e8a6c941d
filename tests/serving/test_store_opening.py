"""Stores by their URLs: what is refused, and older and newer layouts."""

from __future__ import annotations

import sqlite3
import sys

import pytest
from stores import KINDS, empty_place, everything, filled, snap

from ccm.errors import ConfigError, MissingPackageError, StorageError, UnknownNameError
from ccm.serving.store import Limits, Snapshot, list_stores, open_store, register, sql
from ccm.serving.store.base import PART, STORES, digest_of, name_of


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
        (tmp_path / "store" / "ccm-store.json").write_text('{"schema": 9}')
    else:
        import redis

        with redis.Redis.from_url(url) as client:
            client.set("ccm:schema", 9)
    with pytest.raises(ConfigError, match=r"has schema 9, this release knows up to [12]: upgrade"):
        open_store(url)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_from_before_parts_were_shared_is_read_and_goes_on(kind, tmp_path, request, monkeypatch):
    url = empty_place(kind, tmp_path, request)
    with monkeypatch.context() as older:
        older.setattr(sql, "MIGRATIONS", sql.MIGRATIONS[:1])
        open_store(url).close()
    metadata, payload = '{"n": 1}', b"from before"
    digest = digest_of("alice", "old", 1, 5.0, metadata, payload)
    rows = {
        "ccm_sessions": ("alice", "old", 1, 5.0, 5.0, None, len(metadata) + len(payload), 0),
        "ccm_versions": ("alice", "old", 1, 5.0, metadata, payload, digest, len(metadata) + len(payload)),
    }
    if kind == "sqlite":
        connection = sqlite3.connect(url.removeprefix("sqlite://"))
    else:
        import psycopg

        connection = psycopg.connect(url)
    for table, row in rows.items():
        marks = ", ".join(["?" if kind == "sqlite" else "%s"] * len(row))
        connection.execute(f"INSERT INTO {table} VALUES ({marks})", row)
    connection.commit()
    connection.close()
    with open_store(url, Limits(keep=1)) as store:
        assert store.latest("alice", "old").payload == payload
        store.commit("alice", "old", 1, Snapshot(b"and after", {}, cuts=(4,)))
        assert store.latest("alice", "old").payload == b"and after"
        assert store.info("alice", "old").nbytes == len("{}") + 2 * PART + len("and after")


def test_a_server_from_before_parts_were_shared_is_read_and_goes_on(tmp_path, request):
    url = empty_place("redis", tmp_path, request)
    import redis

    with open_store(url) as store, redis.Redis.from_url(url) as client:
        store.create("alice", "old")
        store.commit("alice", "old", 0, snap(1))
        client.hdel(f"ccm:{name_of('alice')}:s:old", "1:recipe")  # as it was
        client.set("ccm:schema", 1)
        with open_store(url, Limits(keep=1)) as again:
            assert client.get("ccm:schema") == b"2"
            assert again.latest("alice", "old").payload == snap(1).payload
            again.commit("alice", "old", 1, Snapshot(b"and after", {}, cuts=(4,)))
            assert again.info("alice", "old").nbytes == len("{}") + 2 * PART + len("and after")


def test_ids_do_not_become_file_names(tmp_path, request):
    url = empty_place("dir", tmp_path, request)
    with open_store(url) as store:
        for name in ("../../escape", "/etc/passwd", "..", "CON", "a" * 200):
            store.create(name, name)
            store.commit(name, name, 0, snap(1))
    outside = [p for p in tmp_path.rglob("*") if "escape" in p.name or "passwd" in p.name]
    assert not outside
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


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
