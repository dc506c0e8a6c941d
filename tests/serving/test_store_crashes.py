"""Several processes on one store: races, kills, full disks and restarts."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from typing import Any

import pytest
from stores import EMBEDDED, KINDS, empty_place, snap

from ccm.errors import StorageError
from ccm.serving.store import Limits, NotFoundError, Snapshot, Store, open_store


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
    payload = hashlib.sha256(str(n).encode()).digest() * (1000 + 700 * (n % 7)) + b"shared" * 9000 * (n % 2)
    cuts = tuple(range(32000, len(payload), 9600))
    store.commit("alice", "busy", n - 1, Snapshot(payload, {"n": n}, cuts=cuts), [n])
    print(n, flush=True)
"""


def check_survivor(store: Store, acknowledged: int) -> int:
    """Nothing acknowledged is lost, everything kept is whole; returns the newest version."""
    import hashlib

    newest = store.info("alice", "busy").version
    assert acknowledged <= newest <= acknowledged + 1  # one more may have been cut off before its answer
    for n in range(max(1, newest - 2), newest + 1):
        found = store.get("alice", "busy", n)
        own = hashlib.sha256(str(n).encode()).digest() * (1000 + 700 * (n % 7))
        assert found.payload == own + b"shared" * 9000 * (n % 2)
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


NO_ROOM = """
import resource
store = open_store(sys.argv[1])
store.check_health()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # there is room for names, and none for bytes
from ccm.errors import StorageError
try:
    store.check_health()
    print("well")
except StorageError:
    print("not well")
"""


@pytest.mark.parametrize("kind", EMBEDDED)
def test_a_store_on_a_full_disk_is_not_well(kind, tmp_path, request):
    output, _ = run_code(NO_ROOM, empty_place(kind, tmp_path, request)).communicate()
    assert output == "not well\n"


def test_a_file_that_is_deleted_under_way_is_missed(tmp_path):
    """Commits still succeed, and end with the process."""
    with open_store(f"sqlite://{tmp_path}/memories.db") as store:
        store.create("alice", "a")
        (tmp_path / "memories.db").rename(tmp_path / "elsewhere.db")
        with pytest.raises(StorageError, match="was deleted or replaced under way"):
            store.check_health()
        (tmp_path / "memories.db").touch()
        with pytest.raises(StorageError, match="was deleted or replaced under way"):
            store.check_health()
        (tmp_path / "elsewhere.db").replace(tmp_path / "memories.db")
        store.check_health()


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
