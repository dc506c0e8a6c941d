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
from rich.progress import track

import ccm
from ccm.data import load_chitchat

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "merge": ("ccm-merge", {}),
    "merge + window": ("ccm-merge", {"sink": 4, "window": 48}),
    "bounded concat (merge the oldest)": ("ccm-concat", {"rule": "bounded", "rule_options": {"blocks": 16}}),
}


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    turns = arguments.limit or 1000
    model, tokenizer = ccm.load_default_model()
    talks = itertools.cycle(load_chitchat("test", cap_per_user=None))
    texts = list(
        itertools.islice(((t.role, t.text) for talk in talks for t in talk.turns), turns - turns // 10)
    )
    texts += texts[: turns // 10]  # the last tenth is the first again, so that times compare
    rows = []
    for name, (adapter, changes) in RULES.items():
        session = ccm.Session(ccm.Compressor.from_pretrained(model, adapter, **changes), tokenizer)
        session.append("Hello!")
        session.reset()
        seconds, held = [], []
        for role, text in track(texts, description=name):
            start = time.perf_counter()
            session.append(text, role)
            seconds.append(time.perf_counter() - start)
            held.append(session.memory.nbytes)
        first, last = statistics.median(seconds[: turns // 10]), statistics.median(seconds[-turns // 10 :])
        rows.append(
            {
                "session": name,
                "turns": turns,
                "tokens": session.stats()["tokens_seen"],
                "nbytes_after_100": held[turns // 10 - 1],
                "nbytes_after_all": held[-1],
                "nbytes_most": max(held),
                "full_context_nbytes": session.stats()["full_context_nbytes"],
                "median_seconds_first_tenth": round(first, 5),
                "median_seconds_last_tenth": round(last, 5),
                "ratio": round(last / first, 3),
            }
        )
        print(rows[-1], flush=True)
    store("growth", {"task": "1000 turns appended to one session", "rows": rows})


if __name__ == "__main__":
    main()
