"""Tokens per second of conversations that are answered at the same time, against one after the other.

Every conversation has a memory already (a copy of one that was prepared) and gets the same question in both cases;
its whole turn is counted: HTTP, reading the question, the answer, folding both, the commit. Both cases take turns.

    python benchmarks/serving/throughput.py
    python benchmarks/serving/throughput.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from exactness import at_once
from harness import Others, Server, ask, placed, placed_parser, serving, spread, store, undisturbed
from texts import conversations

QUESTION = (
    "Tell me a long story about what we have talked of, with many details, from its beginning to its end."
)


def measure(server: Server, names: list[str], batched: bool, tokens: int, label: str) -> dict[str, Any]:
    """One turn of every conversation, in copies of them; seconds, tokens and answers."""
    client = server.client()
    with server.http() as http:
        copies = [f"{name}-{label}" for name in names]
        for name, copy in zip(names, copies, strict=True):
            http.post(f"/v1/memories/{name}/fork", json={"id": copy}).raise_for_status()
    began, cpu = time.perf_counter(), server.cpu_seconds()
    calls = [lambda copy=copy: ask(client, QUESTION, copy, max_tokens=tokens) for copy in copies]  # type: ignore[misc]
    answers = at_once(calls) if batched else [call() for call in calls]
    seconds = time.perf_counter() - began
    written = sum(answer.usage.completion_tokens for answer in answers)
    return {
        "seconds": seconds,
        "tokens": written,
        "tokens_per_second": written / seconds,
        "cpu_seconds": server.cpu_seconds() - cpu,
        "texts": [answer.choices[0].message.content for answer in answers],
    }


def main() -> bool:
    arguments = placed_parser(__doc__.splitlines()[0]).parse_args()
    count, repeats, tokens = (4, 1, 16) if arguments.quick else (8, 7, 64)
    talks = conversations(count, 12)
    with (
        tempfile.TemporaryDirectory() as home,
        serving(Path(home), arguments.threads, *placed(arguments)) as server,
    ):
        client = server.client()
        names = [f"base-{i}" for i in range(count)]
        for name, talk in zip(names, talks, strict=True):
            ask(client, talk[: 2 * (len(talk) // 2) - 1], name, max_tokens=8)
        measure(server, names, True, 8, "warm")

        def pair(n: int) -> dict[str, Any]:
            others = Others(server)
            order = ("sequential", "batched") if n % 2 == 0 else ("batched", "sequential")
            both: dict[str, Any] = {
                name: measure(server, names, name == "batched", tokens, f"{n}-{name}") for name in order
            }
            both["ratio"] = both["batched"]["tokens_per_second"] / both["sequential"]["tokens_per_second"]
            both["others_cpu_share"] = others.share()
            print(n, round(both["ratio"], 2), both["others_cpu_share"], file=sys.stderr)
            return both

        pairs, disturbed = undisturbed(repeats, pair)
    ratios = spread([both["ratio"] for both in pairs], 3)
    rows = {
        name: {
            "tokens_per_second": spread([both[name]["tokens_per_second"] for both in pairs], 2),
            "seconds": spread([both[name]["seconds"] for both in pairs], 2),
            "server_cpu_seconds": spread([both[name]["cpu_seconds"] for both in pairs], 2),
            "tokens": sorted({both[name]["tokens"] for both in pairs}),
        }
        for name in ("sequential", "batched")
    }
    result = {
        "task": f"{count} conversations answered at once against one after the other",
        "conversations": count,
        "tokens_per_answer": tokens,
        "repeats": repeats,
        **rows,
        "ratio": ratios,
        "answers_equal": all(both["sequential"]["texts"] == both["batched"]["texts"] for both in pairs),
        "others_cpu_share": [both["others_cpu_share"] for both in pairs],
        "repeats_disturbed_by_others": disturbed,
        "criterion": "median ratio at least 2.5",
        "reached": ratios["median"] >= 2.5,
    }
    return store("throughput", result, arguments)


if __name__ == "__main__":
    sys.exit(not main())
