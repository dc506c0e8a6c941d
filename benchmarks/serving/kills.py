"""kill -9 of the server while clients write, again and again, on one store that goes on.

Clients note what they sent and what was acknowledged. After every kill the store is opened directly, then by the
next server; every conversation must hold all that was acknowledged, in order, and of the turn that was under way
either all or nothing; its memory must decode, match its fingerprint and hold just the tokens of its transcript.

    python benchmarks/serving/kills.py
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from harness import ROOT, Server, ask, parser, spread, store
from tiny_folder import tiny_options

from ccm.serving.store import NotFoundError, Store, codec, open_store

sys.path.append(str(ROOT / "tests" / "helpers"))
from servers import postgresql_server, redis_server

SEED = 11
CLIENTS = 8
TENANT = "local"  # of a server without keys


@dataclass
class Session:
    """A conversation as its client knows it.

    Attributes:
        acked: texts of turns in the order in which they were acknowledged.
        pending: the text that was sent when the server died.
        version: the newest that was acknowledged.
    """

    name: str
    acked: list[str] = field(default_factory=list)
    pending: str | None = None
    version: int = 0


class Client(threading.Thread):
    """Writes turns into two conversations, one after the other, until the server is gone."""

    def __init__(self, server: Server, sessions: list[Session], seed: int, tokens: int):
        super().__init__()
        self.server, self.sessions, self.tokens = server, sessions, tokens
        self.rng = random.Random(seed)
        self.acked, self.error = Counter[str](), ""

    def run(self) -> None:
        client = self.server.client()
        while True:
            session = self.rng.choice(self.sessions)
            text = f"turn {len(session.acked)} of {session.name}, number {self.rng.random():.6f}"
            session.pending = text
            kind = self.rng.choice(["whole", "stream", "items"] if session.acked else ["whole", "stream"])
            try:
                session.version = getattr(self, kind)(client, session.name, text)
            except (openai.APIConnectionError, httpx.TransportError):
                return  # killed
            except Exception as error:  # a refusal would be a finding
                self.error = f"{type(error).__name__}: {error}"
                return
            session.acked.append(text)
            session.pending = None
            self.acked[kind] += 1

    def whole(self, client: openai.OpenAI, name: str, text: str) -> int:
        return int(ask(client, text, name, max_tokens=self.tokens).memory["version"])

    def stream(self, client: openai.OpenAI, name: str, text: str) -> int:
        version = 0
        for chunk in ask(client, text, name, max_tokens=self.tokens, stream=True):
            version = (getattr(chunk, "memory", None) or {}).get("version", version)
        if not version:
            raise httpx.ReadError("the stream broke off")
        return int(version)

    def items(self, client: openai.OpenAI, name: str, text: str) -> int:
        client.conversations.items.create(name, items=[{"role": "user", "content": text}])
        return 0


def check(kept: Store, session: Session, fingerprint: str | None) -> tuple[list[str], str]:
    """What is wrong with a conversation in the store, and the fingerprint of its memory.

    A pending turn that is there as a whole counts as acknowledged from now on.
    """
    wrong: list[str] = []
    try:
        newest = kept.latest(TENANT, session.name)
    except NotFoundError:
        newest = None
    if newest is None:  # nothing, or what a kill left between the two steps of a first commit
        return ([f"{session.name}: {len(session.acked)} turns are gone"] if session.acked else []), ""
    entries = kept.transcript(TENANT, session.name)
    said = [entry["content"] for entry in entries if entry["role"] == "user"]
    if said == [*session.acked, session.pending]:
        session.acked.append(said[-1])
    elif said != session.acked:
        wrong.append(f"{session.name}: {len(session.acked)} turns acknowledged, {len(said)} there, or others")
    session.pending = None
    if newest.version < session.version:
        wrong.append(f"{session.name}: version {newest.version} of {session.version}")
    memory, metadata = codec.decode(newest.payload)
    (row,) = memory.rows
    if row.tokens + row.window.length != sum(entry["tokens"] for entry in entries):
        wrong.append(f"{session.name}: memory and transcript differ in tokens")
    if newest.metadata["stats"]["turns"] != len(entries):
        wrong.append(f"{session.name}: {newest.metadata['stats']['turns']} turns, {len(entries)} entries")
    if newest.version != len(said):  # every turn here is one version
        wrong.append(f"{session.name}: version {newest.version} with {len(said)} turns")
    if metadata["fingerprint"] != newest.metadata["fingerprint"] or fingerprint not in (
        None,
        metadata["fingerprint"],
    ):
        wrong.append(f"{session.name}: fingerprint {metadata['fingerprint']}")
    return wrong, metadata["fingerprint"]


def seen_by(server: Server, sessions: list[Session]) -> list[str]:
    """What is wrong with the conversations as a new server shows them, and with its start."""
    with server.http() as http:
        ready = http.get("/readyz")
        wrong = [] if ready.status_code == 200 else [f"not ready: {ready.text}"]
        for session in sessions:
            shown = http.get(f"/v1/memories/{session.name}")
            turns = [turn["content"] for turn in shown.json().get("turns", []) if turn["role"] == "user"]
            if turns != session.acked:
                wrong.append(f"{session.name}: the server shows {len(turns)} turns of {len(session.acked)}")
    return wrong


def control(kept: Store, sessions: list[Session]) -> bool:
    """Whether the check sees a turn that was acknowledged and is not there."""
    session = next(session for session in sessions if session.acked)
    lost = Session(session.name, [*session.acked, "never stored"], version=session.version)
    return bool(check(kept, lost, None)[0])


def rounds(folder: Path, count: int, options: list[str], tokens: int, url: str | None) -> dict[str, Any]:
    """Kills of one server on one store."""
    rng = random.Random(SEED)
    url = url or f"sqlite://{folder}/memories.db"
    server = Server(folder, 1, "--store", url, *options)
    sessions: list[Session] = []
    wrong: list[str] = []
    acked, cut, whole, delays, starts = Counter[str](), 0, 0, [], []
    prints: set[str] = set()
    control_flagged = False
    for n in range(count):
        mine = [[Session(f"round-{n}-{c}-{i}") for i in range(2)] for c in range(CLIENTS)]
        # half of the clients go on with conversations of earlier rounds
        for c in range(0, CLIENTS, 2):
            mine[c] = rng.sample([s for s in sessions if s.acked], 2) if n and len(sessions) > 40 else mine[c]
        chosen = {session.name: session for pair in mine for session in pair}
        owned = [[chosen[s.name] for s in pair] for pair in mine]
        taken: set[str] = set()
        for pair in owned:  # no conversation has two clients
            pair[:] = [s for s in pair if s.name not in taken]
            taken |= {s.name for s in pair}
        clients = [Client(server, pair, SEED * n + c, tokens) for c, pair in enumerate(owned) if pair]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 60  # the first few answers are in, then at any moment
        while sum(sum(c.acked.values()) for c in clients) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        delay = rng.random() * 1.5
        time.sleep(delay)
        server.kill()
        for client in clients:
            client.join()
            acked += client.acked
            wrong += [f"round {n}: {client.error}"] if client.error else []
        delays.append(delay)
        sessions += [s for s in chosen.values() if s not in sessions]
        with open_store(url) as kept:
            for session in sessions:
                pending, before = session.pending, len(session.acked)
                found, fingerprint = check(kept, session, next(iter(prints), None))
                wrong += [f"round {n}: {line}" for line in found]
                prints |= {fingerprint} - {""}
                if pending is not None:
                    cut += 1
                    whole += len(session.acked) > before
            control_flagged = control(kept, sessions)
        sessions = [s for s in sessions if s.acked]
        server.start()
        starts.append(server.start_seconds)
        wrong += [f"round {n}: {line}" for line in seen_by(server, [s for s in chosen.values() if s.acked])]
        print(
            f"{n + 1}/{count} kills, {sum(acked.values())} acknowledged, {len(wrong)} wrong", file=sys.stderr
        )
    status = server.stop()
    return {
        "kills": count,
        "conversations": len(sessions),
        "turns_acknowledged": dict(acked),
        "turns_under_way_at_a_kill": cut,
        "of_these_there_as_a_whole": whole,
        "seconds_of_load_before_the_kill": spread(delays, 2),
        "seconds_to_start": spread(starts, 2),
        "fingerprints": len(prints),
        "wrong": wrong,
        "control_flagged": control_flagged,
        "exit_status_at_the_end": status,
    }


def main() -> bool:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    arguments.threads = 1
    plan = [
        ("sqlite", "tiny", 45),
        ("sqlite", "embedded", 5),
        ("redis", "tiny", 5),
        ("postgresql", "tiny", 5),
    ]
    if arguments.quick:
        plan = [("sqlite", "tiny", 3)]
    databases = {"redis": redis_server, "postgresql": postgresql_server}
    rows = []
    for kind, model, count in plan:
        place = databases[kind]() if kind in databases else nullcontext()
        with tempfile.TemporaryDirectory() as home, place as database:
            folder = Path(home)
            options = tiny_options(folder) if model == "tiny" else []
            url = database.url if database else None
            tokens = 8 if model == "tiny" else 4
            rows.append({"store": kind, "model": model, **rounds(folder, count, options, tokens, url)})
    embedded = [row for row in rows if row["store"] == "sqlite"]
    result = {
        "task": "kill -9 of the server while clients write, and what is there afterwards",
        "clients": CLIENTS,
        "seed": SEED,
        "rows": rows,
        "kills_on_sqlite": sum(row["kills"] for row in embedded),
        "criterion": "nothing wrong in any round: no acknowledged turn lost, no memory damaged, every start clean",
        "reached": not any(row["wrong"] for row in rows) and all(row["control_flagged"] for row in rows),
    }
    return store("kills", json.loads(json.dumps(result)), arguments)


if __name__ == "__main__":
    sys.exit(not main())
