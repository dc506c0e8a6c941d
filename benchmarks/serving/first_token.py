"""Time to first token late in a conversation, early in it, and without a memory, where the history is read again.

Conversations of real people are taken in, a hundred turns each but the last. Copies of each as it was after its
first, its 9th and its 99th turn are asked one question, in turns with a stateless request of one whole history, cut
to 4,000 tokens, and the same question. Beside them the plain model reads that history with transformers alone, in
this process while the server is idle. The window has room for a greeting and a question, so nothing is folded before
the second answer yet; from when it is full, whether a question makes it overflow depends on the texts before: hence
several conversations, and turn 10 beside turn 2.

    python benchmarks/serving/first_token.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from exactness import at_once
from harness import Others, parser, serving, spread, store, streamed, undisturbed
from texts import long_histories
from transformers import DynamicCache

import ccm

SEED = 3
QUESTION = "And what would you say about that, all in all?"
PREFILL = 4000
TURNS = ("early", "settled", "late")
CASES = (*TURNS, "stateless", "plain")


def ids_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def shortened(tokenizer: Any, history: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """The newest exchanges that fit, with the question, into so many tokens."""
    question = {"role": "user", "content": QUESTION}
    while len(ids_of(tokenizer, [*history, question])) > most:
        history = history[2:]
    return [*history, question]


@torch.inference_mode()
def prefill(model: Any, ids: list[int]) -> float:
    """Seconds of the plain model for a prompt, to its first token."""
    began = time.perf_counter()
    out = model(
        input_ids=torch.tensor([ids]), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1
    )
    int(out.logits[0, -1].argmax())
    return time.perf_counter() - began


def main() -> bool:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    count, turns, repeats, most = (2, 12, 2, 300) if arguments.quick else (5, 100, 7, PREFILL)
    model, tokenizer = ccm.load_default_model()
    histories = long_histories(count, turns - 1, SEED)
    with tempfile.TemporaryDirectory() as home, serving(Path(home), arguments.threads) as server:
        client, http = server.client(), server.http()

        def prepare(name: str, messages: list[dict[str, str]]) -> None:
            items = [{"type": "message", **message} for message in messages]
            made = http.post("/v1/conversations", json={"items": items}).raise_for_status().json()
            http.post(f"/v1/memories/{made['id']}/fork", json={"id": name}).raise_for_status()

        jobs = [(f"early-{i}", history[:2]) for i, history in enumerate(histories)]
        jobs += [(f"settled-{i}", history[:18]) for i, history in enumerate(histories)]
        jobs += [(f"late-{i}", history) for i, history in enumerate(histories)]
        at_once([lambda job=job: prepare(*job) for job in jobs])  # type: ignore[misc]
        stats = http.get("/v1/memories/late-0").json()["stats"]
        messages = shortened(tokenizer, histories[0], most)
        ids = ids_of(tokenizer, messages)

        def once(n: int | str) -> dict[str, Any]:
            others = Others(server)
            taken: dict[str, list[float]] = {name: [] for name in CASES}
            for i in range(count):
                for name in TURNS:
                    copy = f"{name}-{i}-{n}"
                    http.post(f"/v1/memories/{name}-{i}/fork", json={"id": copy}).raise_for_status()
                    taken[name].append(streamed(client, QUESTION, copy, max_tokens=4)[1])
            taken["stateless"].append(streamed(client, messages, None, max_tokens=4)[1])
            taken["plain"].append(prefill(model, ids))
            print(n, {name: f"{statistics.median(row):.3f}" for name, row in taken.items()}, file=sys.stderr)
            return {"seconds": taken, "others_cpu_share": others.share()}

        once("warm")
        rows, disturbed = undisturbed(repeats, once)
        http.close()
    seconds = {name: spread([t for row in rows for t in row["seconds"][name]]) for name in CASES}
    late = seconds["late"]["median"]
    by_conversation = [
        {name: spread([row["seconds"][name][i] for row in rows])["median"] for name in TURNS}
        for i in range(count)
    ]
    result = {
        "task": f"time to first token: turns 2, 10 and {turns}, and the whole history read again",
        "conversations": count,
        "turns": turns,
        "tokens_in_memory": stats["tokens_seen"],
        "memory": {name: stats[name] for name in ("slots", "sink", "window", "nbytes")},
        "stateless_prompt_tokens": len(ids),
        "repeats": repeats,
        "seed": SEED,
        "seconds": seconds,
        "median_seconds_by_conversation": by_conversation,
        "late_over_early": round(late / seconds["early"]["median"], 3),
        "late_over_settled": round(late / seconds["settled"]["median"], 3),
        "stateless_over_late": round(seconds["stateless"]["median"] / late, 2),
        "plain_over_late": round(seconds["plain"]["median"] / late, 2),
        "others_cpu_share": [row["others_cpu_share"] for row in rows],
        "repeats_disturbed_by_others": disturbed,
        "criterion": "medians: late / early at most 1.2, stateless / late at least 5",
    }
    result["reached"] = result["late_over_early"] <= 1.2 and result["stateless_over_late"] >= 5
    return store("first_token", result, arguments)


if __name__ == "__main__":
    sys.exit(not main())
