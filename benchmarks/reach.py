"""How far back a memory reaches: facts planted at known distances, answered by choosing among candidates.

Held-out conversations of a hundred turns and more. A speaker states a fact (kinds, wordings and values that
training has never seen), the conversation goes on for ``distance`` turns, then the question is asked and the
candidate with the most likely first token is the answer, out of eight. Every method reads the same text; the window
holds the same KV bytes as the memory that it stands beside.

    python benchmarks/reach.py
"""

from __future__ import annotations

import math
import random
from collections import defaultdict

import torch
from common import parser, store

import ccm
from ccm.chat import render
from ccm.data import load_chitchat
from ccm.data.facts import draw_facts
from ccm.data.rows import render_turns

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 100)
LENGTH = 104


def interval(hits: list[float], draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(hits, k=len(hits))) / len(hits) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ccm.load_default_model()
    talks = [t for s in ("test", "validation") for t in load_chitchat(s, cap_per_user=None)]
    talks = [t for t in talks if len(t.turns) >= LENGTH][: arguments.limit or 16]
    hits: dict[tuple[str, int], list[float]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    for number, talk in enumerate(talks):
        rng = random.Random(number)
        facts = dict(zip(DISTANCES, draw_facts(rng, "test", len(DISTANCES)), strict=True))
        history = render_turns(talk, tokenizer)[:LENGTH]
        for distance, fact in facts.items():
            history[LENGTH - distance] = render(tokenizer, "user", fact.statement)
        for name, run in open_runs(model, tokenizer, history).items():
            sizes[name].append(run.kv_bytes)
            for distance, fact in facts.items():
                hits[name, distance].append(float(ask(run, tokenizer, fact)))
        done = {name: round(sum(h) / len(h), 2) for (name, d), h in hits.items() if d == 32}
        print(f"{number + 1}/{len(talks)} accuracy at distance 32: {done}", flush=True)
    names = dict.fromkeys(name for name, _ in hits)
    rows = [
        {
            "method": name,
            "distance": distance,
            "accuracy": round(sum(h) / len(h), 4),
            "ci": [round(x, 4) for x in interval(h)],
            "n": len(h),
        }
        for (name, distance), h in sorted(hits.items())
    ]
    summary = {name: {"kv_bytes": round(sum(sizes[name]) / len(sizes[name]))} for name in names}
    chance = 1 / 8
    store(
        "reach",
        {"task": f"planted facts in {LENGTH} turns", "chance": chance, "methods": summary, "rows": rows},
    )


def ask(run, tokenizer, fact) -> bool:
    """Whether the method, asked, finds the true value more likely than every other candidate."""
    asked = run.fork()
    asked.append(render(tokenizer, "user", fact.question).ids)
    stem = render(tokenizer, "assistant", fact.answer_with("").rstrip())
    firsts = [tokenizer.encode(" " + value, add_special_tokens=False)[0] for value in fact.candidates]
    logits = asked.logits(stem.ids[: stem.content[1] - 1])[-1]
    return fact.candidates[int(logits[firsts].argmax())] == fact.value


def open_runs(model, tokenizer, history):
    """Every method after the whole history; windows get the KV bytes of the memory they stand beside."""
    runs = {}
    for name, options in (
        ("full", {}),
        ("ccm-concat", {}),
        ("ccm-merge", {}),
        ("ccm-merge + window", {"sink": 4, "window": 48}),
    ):
        method = ccm.get_method(name.split(" ")[0], **options)
        run = method.open(model, tokenizer)
        for turn in history:
            run.append(turn.ids)
        runs[name] = run
        if name != "full":
            entries = math.ceil(run.kv_bytes / (runs["full"].kv_bytes / sum(len(t.ids) for t in history)))
            beside = ccm.get_method("streaming-llm", sink=4, window=max(1, entries - 4)).open(
                model, tokenizer
            )
            for turn in history:
                beside.append(turn.ids)
            runs[f"window as {name}"] = beside
    return runs


if __name__ == "__main__":
    main()
