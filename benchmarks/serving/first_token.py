"""Time to first token late in a conversation, early in it, and without a memory, where the history is read again.

A hundred turns are played; copies of the conversation as it was after the first and after the 99th are then asked one
question in turns with a stateless request of the whole history, cut to 4,000 tokens, and the same question. Beside
them the plain model reads that history with transformers alone, in this process while the server is idle.

    python benchmarks/serving/first_token.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Others, parser, serving, spread, store, streamed, undisturbed
from texts import user_turns
from transformers import DynamicCache

import ccm

SEED = 3
QUESTION = "And what would you say about that, all in all?"
PREFILL = 4000


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
    turns, repeats, most, tokens = (12, 2, 300, 8) if arguments.quick else (100, 15, PREFILL, 24)
    model, tokenizer = ccm.load_default_model()
    said = [text for text in user_turns(SEED) if len(text) > 40][: turns - 1]
    with tempfile.TemporaryDirectory() as home, serving(Path(home), arguments.threads) as server:
        client, http = server.client(), server.http()
        history, curve = [], []
        for n, text in enumerate(said, 1):
            answer, first = streamed(client, text, "whole", max_tokens=tokens)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer or " "}]
            curve.append(round(first, 4))
            if n == 1:
                http.post("/v1/memories/whole/fork", json={"id": "early"}).raise_for_status()
        stats = http.get("/v1/memories/whole").json()["stats"]
        messages = shortened(tokenizer, history, most)
        ids = ids_of(tokenizer, messages)

        def once(n: int | str) -> dict[str, float]:
            others, taken = Others(server), {}
            for name, source in (("early", "early"), ("late", "whole")):
                copy = f"{name}-{n}"
                http.post(f"/v1/memories/{source}/fork", json={"id": copy}).raise_for_status()
                taken[name] = streamed(client, QUESTION, copy, max_tokens=4)[1]
            taken["stateless"] = streamed(client, messages, None, max_tokens=4)[1]
            taken["plain"] = prefill(model, ids)
            print(n, taken, file=sys.stderr)
            return {**taken, "others_cpu_share": others.share()}

        once("warm")
        rows, disturbed = undisturbed(repeats, once)
        http.close()
    seconds = {name: spread([row[name] for row in rows]) for name in ("early", "late", "stateless", "plain")}
    late = seconds["late"]["median"]
    result = {
        "task": "time to first token: second turn, hundredth turn, and the whole history read again",
        "turns": turns,
        "tokens_in_memory": stats["tokens_seen"],
        "memory": {name: stats[name] for name in ("slots", "sink", "window", "nbytes")},
        "stateless_prompt_tokens": len(ids),
        "repeats": repeats,
        "seed": SEED,
        "seconds": seconds,
        "late_over_early": round(late / seconds["early"]["median"], 3),
        "stateless_over_late": round(seconds["stateless"]["median"] / late, 2),
        "plain_over_late": round(seconds["plain"]["median"] / late, 2),
        "by_turn": curve,
        "others_cpu_share": [row["others_cpu_share"] for row in rows],
        "repeats_disturbed_by_others": disturbed,
        "criterion": "late / early at most 1.2, stateless / late at least 5",
    }
    result["reached"] = result["late_over_early"] <= 1.2 and result["stateless_over_late"] >= 5
    return store("first_token", result, arguments)


if __name__ == "__main__":
    sys.exit(not main())
