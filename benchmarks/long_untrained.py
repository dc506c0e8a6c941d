"""Attention Matching over hundreds of turns: does a memory of fixed size wear out?

Held-out conversations of 300 turns are lived through, each turn folded. Ten turns are scored at several places, with
the recovered share of full context and of no context. Beside it, a sink and recent tokens of the same size.

    python benchmarks/long_untrained.py
"""

from __future__ import annotations

from typing import Any

import torch
from common import parser, store
from rich.progress import track

import ccm
from ccm import get_method
from ccm.core.reader import Reader
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, render_turns, row
from ccm.evaluation.share import recovered_share, turn_nll

TURNS, SCORED = 300, 10
#: Last turns of the places where turns are scored.
PLACES = (40, 100, 200, 300)
#: Entries of a memory, the sink included: those of the default.
ENTRIES = (65,)
#: What is read in long pieces between the places: nothing is lost of it.
RAW = ("none", "full")


def conversations(tokenizer: Any, count: int) -> list[ConversationRow]:
    """Conversations of the same people, one behind the other, until there are turns enough."""
    turns: list[Any] = []
    rows = []
    for talk in load_chitchat("test", cap_per_user=None):
        turns += render_turns(talk, tokenizer)
        if len(turns) >= TURNS:
            rows.append(row(talk.id, turns[:TURNS]))
            turns = []
        if len(rows) == count:
            break
    return rows


def scored(turn: int) -> int | None:
    """The place at which a turn is scored."""
    return next((place for place in PLACES if place - SCORED <= turn < place), None)


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ccm.load_default_model()
    reader = Reader(model)
    rows = conversations(tokenizer, arguments.limit or 3)
    methods = {"none": get_method("none"), "full": get_method("full")}
    for entries in ENTRIES:
        methods[f"attention-matching, {entries}"] = get_method("attention-matching", slots=entries - 1)
        methods[f"streaming-llm, {entries}"] = get_method("streaming-llm", sink=1, window=entries - 1)
    totals: dict[str, dict[int, list[float]]] = {}
    largest: dict[str, float] = {}
    for name, unbound in methods.items():
        method = unbound.bind(reader, tokenizer)
        found = totals[name] = {place: [0.0, 0] for place in PLACES}
        for one in track(rows, description=name):
            memory, unread = method.empty(), []
            for turn, (ids, content) in enumerate(zip(one.segments, one.content, strict=True)):
                place = scored(turn)
                if unread and (place or name not in RAW):
                    memory, unread = method.fold(memory, [unread]), []
                if place:
                    logits = reader.logits([ids], method.recall(memory))[0]
                    nats, tokens = turn_nll(logits, ids, content)
                    found[place][0] += nats
                    found[place][1] += tokens
                unread += ids
            if memory.slots:
                most = float(memory.rows[0].slots.values.abs().max())
                largest[name] = max(largest.get(name, 0.0), most)
    nll = {name: {p: nats / tokens for p, (nats, tokens) in found.items()} for name, found in totals.items()}
    store(
        "long_untrained",
        {
            "task": f"chitchat, test users, {TURNS} turns; the last {SCORED} turns before each place are scored",
            "rows": len(rows),
            "tokens": [one.tokens for one in rows],
            "scored_tokens": {p: totals["none"][p][1] for p in PLACES},
            "largest_value": {name: round(value, 2) for name, value in largest.items()},
            "nll": {name: {p: round(value, 4) for p, value in each.items()} for name, each in nll.items()},
            "recovered_share": {
                name: {
                    p: round(recovered_share(nll["none"][p], nll["full"][p], value), 4)
                    for p, value in each.items()
                }
                for name, each in nll.items()
                if name not in ("none", "full")
            },
        },
    )


if __name__ == "__main__":
    main()
