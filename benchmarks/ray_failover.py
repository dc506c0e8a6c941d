"""Two replicas on Ray Serve over one PostgreSQL store; one is killed (kill -9) every 20 seconds while clients talk.

Every client has conversations of its own. After an answer that did not arrive it looks which version the conversation
has, and goes on from there. In the end every conversation must hold all that was acknowledged, in its place; its
memory must have seen just the tokens of its transcript; and one of them is played again by a single process, which
must say the same.

    make ray-env && .venv-ray/bin/python benchmarks/ray_failover.py
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import ray
import torch
from common import parser, store

from ccm.models.load import DEFAULT_MODEL
from ccm.serving.build import build_service
from ccm.serving.options import Options
from ccm.serving.service import Message, Sampling

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
from rays import SIZES, RayServer, Said, Talk, tiny_folder
from servers import postgresql_server

QUESTIONS = (
    "I am {name} and it is my {n}th day here. What should I see?",
    "It rains today. What could I do inside, for the {n}th time?",
    "My sister comes at {n} o'clock. Any idea for the evening?",
    "Tell me something about the number {n}.",
)


class Client(threading.Thread):
    """Talks until it is told to stop.

    Attributes:
        talk: its conversation.
        seconds: of acknowledged turns.
        gaps: seconds between two acknowledged turns with a failure between them.
    """

    def __init__(self, talk: Talk, stop: threading.Event):
        super().__init__()
        self.talk, self.stopping = talk, stop
        self.seconds: list[float] = []
        self.gaps: list[float] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.talk.server.url, timeout=120) as http:
            last, failed = time.monotonic(), False
            while not self.stopping.is_set():
                n = self.talk.version
                question = QUESTIONS[n % len(QUESTIONS)].format(name=self.talk.session, n=n)
                began = time.monotonic()
                heard = self.talk.say(question, http)
                now = time.monotonic()
                if heard:
                    self.seconds.append(now - began)
                    if failed:
                        self.gaps.append(now - last)
                    last = now
                failed = not heard


def replayed(options: Options, said: list[Said], max_tokens: int) -> int:
    """How many answers of a conversation a single process gives word for word."""
    service = build_service(options)

    async def play() -> int:
        same = 0
        for turn in said:
            message, sampling = Message("user", turn.question), Sampling(max_tokens=max_tokens, temperature=0)
            answer = await service.answer("local", "again", [message], sampling, create=True)
            same += (await answer.finish()).text == turn.answer
        return same

    try:
        return asyncio.run(play())
    finally:
        service.close()


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {"median": round(ordered[len(ordered) // 2], 3), "longest": round(ordered[-1], 3)}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=300)
    arguments.add_argument("--every", type=float, default=20, help="seconds between two kills")
    arguments.add_argument("--clients", type=int, default=4)
    arguments.add_argument("--tiny", action="store_true", help="a random model of three layers")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name, postgresql_server() as database:
        folder = tiny_folder(Path(name))
        model: dict[str, Any] = {"model": None, "adapter": "ccm-merge"}
        if given.tiny:
            model = {"model": str(folder / "model"), "adapter": str(folder / "tiny")}
        words = [w for option, value in model.items() if value for w in (f"--{option}", value)]
        server = RayServer.start(folder, database.url, "--replicas", "2", model=words)
        server.wait_for_replicas(2)
        stop = threading.Event()
        clients = [Client(Talk(server, f"client-{n}"), stop) for n in range(given.clients)]
        began, kills, alive = time.monotonic(), 0, Counter[int]()
        for client in clients:
            client.start()
        while (now := time.monotonic() - began) < given.seconds:
            if now >= (kills + 1) * given.every and server.replicas():
                alive[len(server.replicas())] += 1
                server.kill_replica()
                kills += 1
            time.sleep(0.1)
        stop.set()
        for client in clients:
            client.join()
        server.wait_for_replicas(2)

        talks = [client.talk for client in clients]
        seen = [server.http.get(f"/v1/memories/{talk.session}").json() for talk in talks]
        lost = sum(len(talk.lost()) for talk in talks)
        wrong = sum(
            view["stats"]["tokens_seen"] != sum(turn["tokens"] for turn in view["turns"])
            or len(view["turns"]) != 2 * talk.version
            for talk, view in zip(talks, seen, strict=True)
        )
        texts = [turn["content"] for turn in seen[0]["turns"]]
        said = [Said(0, *pair, "") for pair in zip(texts[::2], texts[1::2], strict=True)]
        left = server.stop()
        same = replayed(Options(f"sqlite://{folder}/again.db", **model, **SIZES), said, talks[0].max_tokens)
    failures = sum((Counter(talk.failures) for talk in talks), Counter[str]())
    acknowledged = sum(len(talk.acknowledged) for talk in talks)
    result = {
        "task": "two replicas on Ray Serve, one killed with SIGKILL again and again while clients talk",
        "model": "a random model of three layers" if given.tiny else DEFAULT_MODEL,
        "store": "PostgreSQL",
        "ray": ray.__version__,
        "seconds": given.seconds,
        "seconds_between_kills": given.every,
        "kills": kills,
        "replica_processes_at_kills": dict(sorted(alive.items())),
        "clients": given.clients,
        "acknowledged_turns": acknowledged,
        "acknowledged_turns_lost": lost,
        "conversations_whose_memory_differs_from_their_transcript": wrong,
        "committed_but_unheard_turns": sum(talk.unheard for talk in talks),
        "failures_seen_by_clients": dict(failures),
        "replicas_that_answered": len({said.replica for talk in talks for said in talk.acknowledged}),
        "seconds_of_a_turn": spread([s for client in clients for s in client.seconds]),
        "seconds_without_an_answer_after_a_failure": spread([s for client in clients for s in client.gaps]),
        "replayed_by_one_process": {"turns": len(said), "same_answers": same},
        "processes_left_behind": len(left),
    }
    store("ray_failover", result)
    if lost or wrong or same != len(said):
        sys.exit(1)


if __name__ == "__main__":
    main()
