"""How far back a memory reaches: facts planted at known distances, answered by choosing among candidates.

Held-out conversations of a hundred turns. At each distance a speaker states a fact (kinds, wordings and values
that training has never seen); at the end every fact is asked for, each from a copy of the same memory. Two figures:

* accuracy: the candidate, out of eight, whose first token gains most over the same question asked with no
  context at all (calibrated choice; chance is 1/8);
* evidence: by how many nats the true value gains on the mean of the other candidates, over the same baseline.
  Zero means that the memory says nothing about the fact.

A window of sink and recent tokens stands beside each memory, with as many KV bytes as the memory has at the end. The
gain is the difference of their evidence on the same facts, by distance and for all facts that the window has lost.

    python benchmarks/reach.py
    python benchmarks/reach.py --only ccm-concat      this memory; what is stored of the others is kept
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from common import RESULTS, parser, store
from rich.progress import track

import ccm
from ccm.chat.turns import render
from ccm.data import load_chitchat
from ccm.data.facts import Fact, draw_facts
from ccm.data.rows import render_turns
from ccm.methods import Run
from ccm.methods.spec import parse

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 100)
LENGTH = 104
#: Memories as they are written, by the names of their results.
MEMORIES = {
    "ccm-concat": "ccm-concat",
    "chat: ccm-chat + sink + window": "ccm-chat:sink=4,window=64",
    "chat: ccm-merge + sink + window": "ccm-merge:sink=4,window=64",
    "chat: slots-and-words + sink + window": "slots-and-words:sink=4,window=64",
    "slots-and-words, slots of ccm-concat": "slots-and-words:adapter=ccm-concat,sink=4",
    "attention-matching": "attention-matching",
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


def remember(
    model: Any, tokenizer: Any, histories: list[list[Any]], names: Sequence[str]
) -> dict[str, list[Run]]:
    """Every memory after each whole history, all histories turn by turn in one batch."""
    runs: dict[str, list[Run]] = {}
    for name in names:
        method = parse(MEMORIES[name]).method().bind(model, tokenizer)
        memory = method.empty(len(histories))
        for turns in track(list(zip(*histories, strict=True)), description=name):
            width = max(len(turn.ids) for turn in turns)
            ids = torch.tensor([turn.ids + (0,) * (width - len(turn.ids)) for turn in turns])
            mask = torch.tensor([[1] * len(turn.ids) + [0] * (width - len(turn.ids)) for turn in turns])
            memory = method.fold(memory, ids, mask)
        runs[name] = [Run(method) for _ in histories]
        for k, run in enumerate(runs[name]):
            run.held = memory[k]
    return runs


def read_raw(model: Any, tokenizer: Any, history: list[Any], method: str, turns: int, **options: int) -> Run:
    """A method that holds raw text after the whole history, some turns at a time."""
    run = ccm.get_method(method, **options).open(model, tokenizer)
    for start in range(0, len(history), turns):
        run.append(sum((turn.ids for turn in history[start : start + turns]), ()))
    return run


def beside(stored: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The result with what is stored of full context and of other memories, in the order of ``MEMORIES``."""
    if any(stored[key] != result[key] for key in ("task", "conversations", "chance")):
        raise SystemExit("results/reach.json was made on other conversations: run it without --only")
    places = ["full", *(name for memory in MEMORIES for name in (memory, window_of(memory)))]
    methods = stored["methods"] | result["methods"]
    merged = {**result, "methods": {name: methods[name] for name in places if name in methods}}
    for part in ("rows", "gain_by_distance", "gain_beyond_the_window"):
        kept = [row for row in stored[part] if row["method"] not in result["methods"]]
        merged[part] = sorted(kept + result[part], key=lambda row: places.index(row["method"]))
    return merged


def window_of(name: str) -> str:
    return f"window of the same bytes as {name}"


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", metavar="MEMORY", choices=MEMORIES, help="these memories")
    arguments = options.parse_args()
    memories = arguments.only or list(MEMORIES)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ccm.load_default_model()
    talks = [t for s in ("test", "validation") for t in load_chitchat(s, cap_per_user=None)]
    talks = [t for t in talks if len(t.turns) >= LENGTH][: arguments.limit or 16]
    right: dict[tuple[str, int], list[float]] = defaultdict(list)
    evidence: dict[tuple[str, int], list[float]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    reached: dict[str, list[int]] = defaultdict(list)
    planted, histories = [], []
    for number, talk in enumerate(talks):
        planted.append(dict(zip(DISTANCES, draw_facts(random.Random(number), "test", 8), strict=True)))
        histories.append(render_turns(talk, tokenizer)[:LENGTH])
        for distance, fact in planted[-1].items():
            histories[-1][LENGTH - distance] = render(tokenizer, "user", fact.statement)
    remembered = remember(model, tokenizer, histories, memories)
    nothing = ccm.get_method("full").open(model, tokenizer)  # the question is then its only context
    for k, (facts, history) in enumerate(track(list(zip(planted, histories, strict=True)), "questions")):
        runs = {} if arguments.only else {"full": read_raw(model, tokenizer, history, "full", 16)}
        for name in memories:
            runs[name] = remembered[name][k]
            held = runs[name].memory.length
            # eight turns at a time: the window sees a little more than it may hold, never less
            window = read_raw(model, tokenizer, history, "window", 8, sink=4, window=held - 4)
            runs[window_of(name)] = window
            lengths = [len(turn.ids) for turn in reversed(history)]
            reached[window_of(name)].append(sum(sum(lengths[: i + 1]) <= held for i in range(LENGTH)))
        without = {d: answers(nothing, tokenizer, fact) for d, fact in facts.items()}
        for name, run in runs.items():
            sizes[name].append(run.kv_bytes)
            for distance, fact in facts.items():
                gain = answers(run, tokenizer, fact) - without[distance]
                true = fact.candidates.index(fact.value)
                others = torch.cat([gain[:true], gain[true + 1 :]])
                right[name, distance].append(float(int(gain.argmax()) == true))
                evidence[name, distance].append(float(gain[true] - others.mean()))
    names = list(dict.fromkeys(name for name, _ in right))

    def turns_held(name: str) -> float:
        return sum(reached[name]) / len(reached[name])

    def over_window(name: str, distances: Sequence[int]) -> dict[str, Any]:
        """Evidence of a memory less that of its window, by conversation."""
        pairs = [(evidence[name, d], evidence[window_of(name), d]) for d in distances]
        each = [sum(a[i] - b[i] for a, b in pairs) / len(pairs) for i in range(len(talks))]
        return {"gain": round(sum(each) / len(each), 3), "gain_ci": interval(each), "n": len(each)}

    result = {
        "task": f"planted facts in {LENGTH} turns of held-out conversations",
        "conversations": len(talks),
        "chance": 1 / 8,
        "methods": {
            name: {
                "kv_bytes": round(sum(sizes[name]) / len(sizes[name])),
                "turns_held_raw": round(turns_held(name), 1) if reached[name] else None,
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
        "gain_by_distance": [
            {"method": name, "distance": d, **over_window(name, [d])} for name in memories for d in DISTANCES
        ],
        "gain_beyond_the_window": [
            {"method": name, "distances": far, **over_window(name, far)}
            for name in memories
            for far in [[d for d in DISTANCES if d > turns_held(window_of(name))]]
        ],
    }
    if arguments.only:
        result = beside(json.loads((RESULTS / "reach.json").read_text()), result)
    store("reach", result)


if __name__ == "__main__":
    main()
