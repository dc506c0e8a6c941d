"""How far back a memory reaches: facts planted at known distances, answered by choosing among candidates.

Held-out conversations of a hundred turns. At each distance a speaker states a fact (kinds, wordings and values
that training has never seen); at the end every fact is asked for, each from a copy of the same memory. Two figures:

* accuracy: the candidate, out of eight, whose first token gains most over the same question asked with no
  context at all (calibrated choice; chance is 1/8);
* evidence: by how many nats the true value gains on the mean of the other candidates, over the same baseline.
  Zero means that the memory says nothing about the fact.

A window of sink and recent tokens stands beside each memory, with as many KV bytes as the memory has at the end.

    python benchmarks/reach.py
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import torch
from common import parser, store
from rich.progress import track

import ccm
from ccm.chat import render
from ccm.data import load_chitchat
from ccm.data.facts import Fact, draw_facts
from ccm.data.rows import render_turns
from ccm.methods import Run
from ccm.session import CHAT

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 100)
LENGTH = 104
MEMORIES: dict[str, tuple[str, dict[str, int]]] = {
    "ccm-concat": ("ccm-concat", {}),
    "chat: ccm-merge + sink + window": ("ccm-merge", dict(CHAT)),
}


def interval(values: list[float], draws: int = 1000) -> list[float]:
    """95 % bootstrap interval of a mean."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return [round(means[int(0.025 * draws)], 3), round(means[int(0.975 * draws)], 3)]


def answers(run: Run, tokenizer: Any, fact: Fact) -> torch.Tensor:
    """Log-probabilities of the first token of each candidate, after the question."""
    asked = run.fork()
    asked.append(render(tokenizer, "user", fact.question).ids)
    stem = render(tokenizer, "assistant", fact.answer_with("").rstrip())
    firsts = [tokenizer.encode(" " + value, add_special_tokens=False)[0] for value in fact.candidates]
    return asked.logits(stem.ids[: stem.content[1] - 1])[-1].log_softmax(-1)[firsts]


def live_through(model: Any, tokenizer: Any, history: list[Any]) -> dict[str, Run]:
    """Every method after the whole history."""
    runs = {"full": ccm.get_method("full").open(model, tokenizer)}
    for start in range(0, len(history), 16):  # the same tokens in fewer calls
        runs["full"].append(sum((turn.ids for turn in history[start : start + 16]), ()))
    for name, (method, options) in MEMORIES.items():
        runs[name] = ccm.get_method(method, **options).open(model, tokenizer)
        for turn in history:
            runs[name].append(turn.ids)
        entries = runs[name].memory.length
        beside = runs[f"window of the same bytes as {name}"] = ccm.get_method(
            "window", sink=4, window=entries - 4
        ).open(model, tokenizer)
        for turn in history:
            beside.append(turn.ids)
    return runs


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ccm.load_default_model()
    talks = [t for s in ("test", "validation") for t in load_chitchat(s, cap_per_user=None)]
    talks = [t for t in talks if len(t.turns) >= LENGTH][: arguments.limit or 10]
    right: dict[tuple[str, int], list[float]] = defaultdict(list)
    evidence: dict[tuple[str, int], list[float]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    reached: dict[str, list[int]] = defaultdict(list)
    for number, talk in enumerate(track(talks, description="conversations")):
        facts = dict(zip(DISTANCES, draw_facts(random.Random(number), "test", len(DISTANCES)), strict=True))
        history = render_turns(talk, tokenizer)[:LENGTH]
        for distance, fact in facts.items():
            history[LENGTH - distance] = render(tokenizer, "user", fact.statement)
        nothing = ccm.get_method("full").open(model, tokenizer)  # the question is then its only context
        for name, run in live_through(model, tokenizer, history).items():
            sizes[name].append(run.kv_bytes)
            if name.startswith("window"):
                lengths = [len(turn.ids) for turn in reversed(history)]
                held = run.memory.length
                reached[name].append(sum(sum(lengths[: k + 1]) <= held for k in range(LENGTH)))
            for distance, fact in facts.items():
                gain = answers(run, tokenizer, fact) - answers(nothing, tokenizer, fact)
                true = fact.candidates.index(fact.value)
                others = torch.cat([gain[:true], gain[true + 1 :]])
                right[name, distance].append(float(int(gain.argmax()) == true))
                evidence[name, distance].append(float(gain[true] - others.mean()))
    names = list(dict.fromkeys(name for name, _ in right))
    store(
        "reach",
        {
            "task": f"planted facts in {LENGTH} turns of held-out conversations",
            "conversations": len(talks),
            "chance": 1 / 8,
            "methods": {
                name: {
                    "kv_bytes": round(sum(sizes[name]) / len(sizes[name])),
                    "turns_held_raw": round(sum(reached[name]) / len(reached[name]), 1)
                    if reached[name]
                    else None,
                }
                for name in names
            },
            "rows": [
                {
                    "method": name,
                    "distance": distance,
                    "accuracy": round(sum(right[name, distance]) / len(talks), 3),
                    "accuracy_ci": interval(right[name, distance]),
                    "evidence": round(sum(evidence[name, distance]) / len(talks), 3),
                    "evidence_ci": interval(evidence[name, distance]),
                    "n": len(talks),
                }
                for name in names
                for distance in DISTANCES
            ],
        },
    )


if __name__ == "__main__":
    main()
