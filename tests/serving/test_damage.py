"""Damaged memories under a running server: an error in OpenAI's shape, and nobody else notices."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import MODEL, serving, tiny_service

from ccm.errors import CCMError
from ccm.serving.store import open_store

SEED = 17
VICTIM, OTHER = "victim", "other"


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 100))


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two different bytes change places."""
    a = rng.randrange(len(data))
    b = next(i for i in rng.sample(range(len(data)), len(data)) if data[i] != data[a])
    changed = bytearray(data)
    changed[a], changed[b] = changed[b], changed[a]
    return bytes(changed)


def header(data: bytes, rng: random.Random) -> bytes:
    """A change in the first bytes, where lengths and shapes are."""
    at = rng.randrange(min(len(data), 64))
    return data[:at] + rng.randbytes(1 + rng.randrange(8)) + data[at + 8 :]


DAMAGES: Sequence[Callable[[bytes, random.Random], bytes]] = (flip, truncate, extend, swap, header)


class Talk:
    """A client of a server with two conversations."""

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=url, timeout=60)

    def say(self, session: str, text: str) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
        options = {"max_tokens": 4, "temperature": 0}
        return self.http.post(
            "/v1/chat/completions", json={**body, **options}, headers={"X-Session-Id": session}
        )

    def looks(self, session: str) -> list[httpx.Response]:
        """Every way to read a conversation."""
        places = ("memories/{}", "memories/{}/export", "conversations/{}", "conversations/{}/items")
        return [self.http.get(f"/v1/{place.format(session)}") for place in places]

    def uses(self, session: str) -> list[httpx.Response]:
        """Every way to go on from it; what works is taken back by the caller."""
        items = {"items": [{"role": "user", "content": "more"}]}
        return [
            self.say(session, "and now?"),
            self.http.post(f"/v1/conversations/{session}/items", json=items),
            self.http.post(f"/v1/memories/{session}/fork", json={"id": "copy"}),
            self.http.post(f"/v1/memories/{session}/rebuild"),
        ]


def told(answer: httpx.Response) -> bool:
    """Whether it is an error that the server meant to give; anything else but success fails."""
    if answer.status_code == 200:
        return False
    error = answer.json()["error"]
    assert error["message"] and error["type"]
    assert answer.status_code in (400, 404, 409, 503), answer.text  # never "the server failed"
    return True


#: Times and sizes of a conversation, which no digest covers: they decide nothing about its memory.
BOOKKEEPING = ("created", "created_at", "updated", "expires", "stored_nbytes")


def shown(answer: httpx.Response) -> Any:
    """What an answer says beside bookkeeping; the order of a file's metadata means nothing."""
    data = answer.content
    if answer.headers["content-type"] != "application/octet-stream":
        return {name: value for name, value in answer.json().items() if name not in BOOKKEEPING}
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


def check_victim(talk: Talk, whole: list[Any], ahead: str) -> int:
    """Every look and every use is an error that was meant, or as if nothing had happened; how many were errors."""
    looks = talk.looks(VICTIM)
    assert all(told(answer) or shown(answer) == before for answer, before in zip(looks, whole, strict=True))
    said, *uses = talk.uses(VICTIM)
    assert told(said) or text_of(said) == ahead
    return sum(map(told, (*looks, said, *uses)))


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture
def count(record_property):
    """Counts damages into the test's record."""
    counts = {"damages": 0, "seen": 0}
    yield counts
    for name, value in counts.items():
        record_property(name, value)


def begin(talk: Talk) -> tuple[list[Any], list[Any], str]:
    """Both conversations with two turns; what looking at them shows, and what the victim would say next."""
    for text in ("my cat is Miso", "and she is three"):
        for session in (VICTIM, OTHER):
            assert talk.say(session, text).status_code == 200
    talk.http.post(f"/v1/memories/{VICTIM}/fork", json={"id": "ahead"})
    ahead = text_of(talk.say("ahead", "and now?"))
    talk.http.delete("/v1/memories/ahead")
    return [shown(a) for a in talk.looks(VICTIM)], [shown(a) for a in talk.looks(OTHER)], ahead


# ------------------------------------------------------------------ values in the database

COLUMNS = {
    "ccm_versions": ("recipe", "payload", "metadata", "digest", "created"),
    "ccm_parts": ("part", "name"),
    "ccm_transcripts": ("entry", "digest", "place"),
    "ccm_sessions": ("version", "updated", "nbytes", "lines"),
}


def kept_rows(database: sqlite3.Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {table: database.execute(f"SELECT * FROM {table}").fetchall() for table in COLUMNS}


def restore(database: sqlite3.Connection, kept: dict[str, list[tuple[Any, ...]]]) -> None:
    with database:
        for table, rows in kept.items():
            database.execute(f"DELETE FROM {table}")
            marks = ",".join("?" * len(rows[0]))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)


def hurt(database: sqlite3.Connection, rng: random.Random) -> None:
    """Damage one value of the victim."""
    table = rng.choice(sorted(COLUMNS))
    column = "part" if rng.random() < 0.4 else rng.choice(COLUMNS[table])
    table = "ccm_parts" if column == "part" else table
    rows = database.execute(f"SELECT rowid, {column} FROM {table} WHERE session = ?", [VICTIM]).fetchall()
    row, value = rows[-1] if rng.random() < 0.6 else rng.choice(rows)  # most often the newest
    new: Any
    damage = rng.choice(DAMAGES) if value else extend
    if isinstance(value, bytes):
        new = damage(value, rng)
    elif isinstance(value, str):
        new = damage(value.encode(), rng)
        if rng.random() < 0.7:  # otherwise it becomes a blob
            new = new.decode("utf-8", "replace")
    else:
        new = rng.choice([None, "x", -1, value + 1, value * 1000 + 7, float("nan"), b"\0"])
    try:
        with database:
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [new, row])
    except sqlite3.IntegrityError:  # the schema itself refuses it
        hurt(database, rng)


def damage_values(tmp_path: Path, rounds: int, count: dict[str, int]) -> None:
    rng = random.Random(SEED)
    with serving(tiny_service(tmp_path)) as running:
        talk = Talk(running.url)
        whole, other, ahead = begin(talk)
        database = sqlite3.connect(tmp_path / "memories.db", timeout=30)
        kept = kept_rows(database)
        for _ in range(rounds):
            hurt(database, rng)
            count["damages"] += 1
            count["seen"] += check_victim(talk, whole, ahead) > 0
            assert [shown(a) for a in talk.looks(OTHER)] == other
            assert talk.http.get("/healthz").status_code == talk.http.get("/readyz").status_code == 200
            restore(database, kept)
        assert shown(talk.looks(VICTIM)[0]) == whole[0]
        assert text_of(talk.say(OTHER, "and now?")) == ahead
        database.close()


def test_damaged_values(tmp_path, count):
    damage_values(tmp_path, 40, count)
    assert count["seen"] > 20


@pytest.mark.slow
def test_many_damaged_values(tmp_path, count):
    damage_values(tmp_path, 400, count)
    assert count["seen"] > 200


# ------------------------------------------------------------------ files of a store


def damage_files(kind: str, tmp_path: Path, rounds: int, count: dict[str, int]) -> None:
    """Damage to a file while no server runs; the next one starts, or says in one error why it does not."""
    rng = random.Random(SEED)
    url = f"{kind}://{tmp_path}/store"
    with serving(tiny_service(tmp_path, store=url)) as running:
        whole, other, ahead = begin(Talk(running.url))
    place = tmp_path / "store"
    shutil.copytree(place, tmp_path / "kept") if place.is_dir() else shutil.copy(place, tmp_path / "kept")
    for _ in range(rounds):
        if place.is_dir():
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "kept", place)
        else:
            shutil.copy(tmp_path / "kept", place)
        files = [
            path for path in sorted((place, *place.rglob("*"))) if path.is_file() and path.stat().st_size
        ]
        path = rng.choice(files)
        path.write_bytes(rng.choice(DAMAGES)(path.read_bytes(), rng))
        count["damages"] += 1
        try:
            open_store(url).close()
        except CCMError:
            count["seen"] += 1
            continue
        with serving(tiny_service(tmp_path, store=url)) as running:
            talk = Talk(running.url)
            seen = 0
            for session, before in ((VICTIM, whole), (OTHER, other)):
                looks = talk.looks(session)
                assert all(told(a) or shown(a) == b for a, b in zip(looks, before, strict=True))
                said = talk.say(session, "and now?")
                new = said.status_code == 200 and said.json()["memory"]["version"] == 1
                assert told(said) or new or text_of(said) == ahead  # a lost one begins anew
                seen += any(a.status_code != 200 for a in (*looks, said))
            assert seen < 2 or kind == "sqlite"  # in a folder nobody shares a file
            assert talk.say("new", "hello").status_code in (200, 503)
            assert talk.http.get("/healthz").status_code == 200
            count["seen"] += seen > 0


@pytest.mark.parametrize("kind", ["sqlite", "dir"])
def test_damaged_files(kind, tmp_path, count):
    damage_files(kind, tmp_path, 8, count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "dir"])
def test_many_damaged_files(kind, tmp_path, count):
    damage_files(kind, tmp_path, 50, count)
    assert count["seen"] > 10


# ------------------------------------------------------------------ exported files


def damage_exports(tmp_path: Path, rounds: int, count: dict[str, int]) -> None:
    rng = random.Random(SEED)
    with serving(tiny_service(tmp_path)) as running:
        talk = Talk(running.url)
        _, other, _ = begin(talk)
        data = talk.http.get(f"/v1/memories/{VICTIM}/export").content
        names = [row["id"] for row in talk.http.get("/v1/memories").json()["data"]]
        for _ in range(rounds):
            bad = rng.choice(DAMAGES)(data, rng)
            count["damages"] += 1
            answer = talk.http.post("/v1/memories/import", content=bad, params={"id": "taken"})
            assert told(answer) and answer.status_code in (400, 409)
            count["seen"] += 1
        assert [row["id"] for row in talk.http.get("/v1/memories").json()["data"]] == names
        assert [shown(a) for a in talk.looks(OTHER)] == other
        taken = talk.http.post("/v1/memories/import", content=data, params={"id": "taken"})
        assert taken.status_code == 200  # the whole one is


def test_damaged_exports(tmp_path, count):
    damage_exports(tmp_path, 150, count)


@pytest.mark.slow
def test_many_damaged_exports(tmp_path, count):
    damage_exports(tmp_path, 1500, count)
