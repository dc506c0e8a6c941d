"""A thousand turns appended to one session: bytes held and time per append must not grow.

Real turns of long held-out conversations, played one after another.

    python benchmarks/growth.py
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from common import parser, store

import ccm
from ccm.data import load_chitchat

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "merge": ("ccm-merge", {}),
    "merge + window": ("ccm-merge", {"sink": 4, "window": 48}),
    "bounded concat (merge the oldest)": ("ccm-concat", {"rule": "bounded", "rule_options": {"blocks": 16}}),
    "bounded concat (drop the oldest)": (
        "ccm-concat",
        {"rule": "bounded", "rule_options": {"blocks": 16, "overflow": "drop"}},
    ),
}


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    turns = arguments.limit or 1000
    model, tokenizer = ccm.load_default_model()
    talks = itertools.cycle(load_chitchat("test", cap_per_user=None))
    texts = list(itertools.islice(((t.role, t.text) for talk in talks for t in talk.turns), turns))
    rows = []
    for name, (adapter, changes) in RULES.items():
        compressor = ccm.Compressor.from_pretrained(model, adapter, **changes)
        session = ccm.Session(compressor, tokenizer)
        per_token, held = [], []
        for role, text in texts:
            before = session.stats()["tokens_seen"]
            start = time.perf_counter()
            session.append(text, role)
            seconds = time.perf_counter() - start
            stats = session.stats()
            per_token.append((seconds, stats["tokens_seen"] - before))
            held.append(stats["nbytes"])
        tenth = turns // 10
        row = {
            "session": name,
            "turns": turns,
            "tokens": session.stats()["tokens_seen"],
            "nbytes_first": held[tenth],
            "nbytes_last": held[-1],
            "nbytes_most": max(held),
            "full_context_nbytes": session.stats()["full_context_nbytes"],
        }
        # turns differ in length, so times are compared per turn and per turn of equal length
        first, last = per_token[tenth : 2 * tenth], per_token[-tenth:]
        row["median_seconds_first"] = round(statistics.median(s for s, _ in first), 5)
        row["median_seconds_last"] = round(statistics.median(s for s, _ in last), 5)
        rows.append(row)
        print(row, flush=True)
    store("growth", {"task": "1000 turns appended to one session", "rows": rows})


if __name__ == "__main__":
    main()
