"""64 clients for ten minutes: what they are answered, and what the process holds in memory meanwhile.

A client tells its conversation turns of real people, half of them streamed, sometimes appends without an answer,
looks at its memory or forks it, and begins a new conversation after ten turns. It never waits of its own accord; the
queue is shorter than the clients are many, so that some are told to come back, and do so after ``Retry-After``.

    python benchmarks/serving/load.py
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
from harness import MODEL, Others, Server, parser, serving, store
from texts import user_turns

SEED = 5
CLIENTS = 64
QUEUE = 32
TURNS = 10
FLAT = 0.05


class Load:
    """All clients of a run, and what they noted."""

    def __init__(self, server: Server, seconds: float, tokens: int):
        self.server, self.seconds, self.tokens = server, seconds, tokens
        self.texts = user_turns(SEED)
        self.statuses: Counter[str] = Counter()
        self.errors: list[str] = []
        self.latency: list[float] = []
        self.first: list[float] = []
        self.retry_after: list[int] = []
        self.written = 0
        self.lost: list[str] = []
        self.rss: list[tuple[float, float]] = []

    async def run(self) -> None:
        self.began = time.monotonic()
        limits = httpx.Limits(max_connections=2 * CLIENTS, max_keepalive_connections=2 * CLIENTS)
        async with httpx.AsyncClient(timeout=600, limits=limits) as transport:
            self.client = openai.AsyncOpenAI(
                base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, http_client=transport
            )
            sampling = asyncio.create_task(self.sample())
            await asyncio.gather(*(self.play(i) for i in range(CLIENTS)))
            await sampling

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    async def sample(self) -> None:
        while self.left() > 0:
            self.rss.append((time.monotonic() - self.began, self.server.rss()))
            await asyncio.sleep(1)

    async def play(self, number: int) -> None:
        rng, chapter = random.Random(SEED * 1000 + number), 0
        while self.left() > 0:
            name, expected = f"client-{number}-{chapter}", 0
            chapter += 1
            while self.left() > 0 and expected < TURNS:
                kind = rng.choices(["whole", "stream", "append", "look", "fork"], [4, 4, 1, 1, 1])[0]
                if not expected:
                    kind = "stream"
                done = await self.patiently(kind, getattr(self, kind)(name, rng.choice(self.texts)))
                expected += done and kind in ("whole", "stream", "append")
            if expected:  # nothing acknowledged is lost, nothing else is there
                info = (await self.client.get(f"/memories/{name}", cast_to=httpx.Response)).json()
                if info["version"] != expected:
                    self.lost.append(f"{name}: version {info['version']} after {expected} turns")

    async def patiently(self, kind: str, call: Any) -> bool:
        """One request; told to come back, its client waits as long as it is told. Whether it was done."""
        began = time.monotonic()
        try:
            await call
        except openai.RateLimitError as error:
            self.statuses["429"] += 1
            wait = error.response.headers.get("retry-after", "")
            if not wait.isdigit():
                self.errors.append("429 without Retry-After")
                return False
            self.retry_after.append(int(wait))
            await asyncio.sleep(int(wait))
            return False
        except Exception as error:  # whatever it is, it is a finding
            self.statuses[type(error).__name__] += 1
            self.errors.append(f"{kind}: {type(error).__name__}: {error}")
            return False
        self.statuses[kind] += 1
        if kind in ("whole", "stream"):
            self.latency.append(time.monotonic() - began)
        return True

    def ask(self, name: str, text: str, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            max_tokens=self.tokens,
            temperature=0.7,
            extra_headers={"X-Session-Id": name},
            **options,
        )

    async def whole(self, name: str, text: str) -> None:
        answer = await self.ask(name, text)
        self.written += answer.usage.completion_tokens

    async def stream(self, name: str, text: str) -> None:
        began, first, whole = time.monotonic(), 0.0, False
        async for chunk in await self.ask(name, text, stream=True, stream_options={"include_usage": True}):
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - began
            if chunk.usage:
                whole = True
                self.written += chunk.usage.completion_tokens
        if not whole:
            raise RuntimeError("the stream broke off")
        if first:
            self.first.append(first)

    async def append(self, name: str, text: str) -> None:
        await self.client.conversations.items.create(name, items=[{"role": "user", "content": text}])

    async def look(self, name: str, text: str) -> None:
        await self.client.get(f"/memories/{name}", cast_to=httpx.Response)

    async def fork(self, name: str, text: str) -> None:
        made = await self.client.post(f"/memories/{name}/fork", cast_to=httpx.Response)
        await self.client.delete(f"/memories/{made.json()['id']}", cast_to=httpx.Response)


def memory_of(samples: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
    """Resident memory: minutes 2 to 4 of ten (as shares of the run) against its last fifth, and the slope."""

    def between(start: float, stop: float) -> list[tuple[float, float]]:
        return [(t, mb) for t, mb in samples if start * seconds <= t < stop * seconds]

    early, late = (statistics.mean(mb for _, mb in part) for part in (between(0.2, 0.4), between(0.8, 1)))
    steady = between(0.2, 1)
    slope = statistics.linear_regression([t / 60 for t, _ in steady], [mb for _, mb in steady]).slope
    tenths = [statistics.mean(mb for _, mb in between(i / 10, (i + 1) / 10)) for i in range(10)]
    return {
        "start_mb": round(samples[0][1], 1),
        "mean_mb_from_a_fifth_to_two_fifths": round(early, 1),
        "mean_mb_in_the_last_fifth": round(late, 1),
        "growth": round(late / early - 1, 4),
        "slope_mb_per_minute": round(slope, 2),
        "mean_mb_by_tenth": [round(mb, 1) for mb in tenths],
        "criterion": f"growth at most {FLAT}",
    }


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {f"p{q}": round(cuts[q - 1], 3) for q in (50, 95, 99)}


def main() -> bool:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    seconds, tokens = (60, 4) if arguments.quick else (600, 16)
    options = ["--queue", str(QUEUE), "--batch", "16"]
    with tempfile.TemporaryDirectory() as home, serving(Path(home), arguments.threads, *options) as server:
        others = Others(server)
        load = Load(server, seconds, tokens)
        asyncio.run(load.run())
        share = others.share()
        with server.http() as http:
            counts = dict(
                line.split()
                for line in http.get("/metrics").text.splitlines()
                if line.startswith("ccm_") and "{" not in line
            )
            ready = http.get("/readyz").status_code
            held = float(counts["ccm_turns"])
        stored = sum(path.stat().st_size for path in Path(home).glob("memories.db*"))
        status = server.stop()
        log = server.log.read_text()
    memory = memory_of(load.rss, seconds)
    result = {
        "task": f"{CLIENTS} clients for {seconds} seconds",
        "clients": CLIENTS,
        "seconds": seconds,
        "rows_and_queue": [16, QUEUE],
        "tokens_per_answer_at_most": tokens,
        "seed": SEED,
        "requests": dict(sorted(load.statuses.items())),
        "errors": load.errors[:20],
        "refused_as_the_server_counts": int(float(counts["ccm_refused_total"])),
        "retry_after_seconds": sorted(set(load.retry_after)),
        "conversations_that_differ": load.lost[:20],
        "turns_per_second": round(len(load.latency) / seconds, 2),
        "tokens_per_second": round(load.written / seconds, 1),
        "seconds_per_turn": quantiles(load.latency),
        "seconds_to_first_token": quantiles(load.first),
        "memory": memory,
        "stored_mb": round(stored / 1e6, 1),
        "turns_left_in_the_engine": held,
        "ready_at_the_end": ready,
        "exit_status": status,
        "tracebacks_in_the_log": log.count("Traceback"),
        "others_cpu_share": share,
        "criterion": "no error but 429 with Retry-After, nothing lost, memory flat",
    }
    result["reached"] = (
        not (load.errors or load.lost or held or status or result["tracebacks_in_the_log"])
        and load.statuses["429"] == result["refused_as_the_server_counts"] > 0
        and memory["growth"] <= FLAT
        and ready == 200
    )
    return store("load", result, arguments)


if __name__ == "__main__":
    sys.exit(not main())
