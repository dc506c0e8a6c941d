"""Held-out chitchat: what each memory recovers of what the earlier turns tell about a turn.

Rows of ten turns, of which turns from the fifth on are targets; or of ``--turns`` turns, of which the last ten are.

Memories are scored by parallel passes, which equal the recurrent ones (tests/core/test_contract.py; checked here once
more on the first rows). Beside each stands a window of sink and recent tokens that holds, turn by turn, exactly as
many KV bytes.

    python benchmarks/quality.py
    python benchmarks/quality.py --only ccm-chat      memories with this in their name; the stored others are kept
    python benchmarks/quality.py --turns 40 --only chat:
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from common import RESULTS, parser, store
from rich.progress import track

import ccm
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, held_out_rows
from ccm.errors import ConfigError
from ccm.evaluation.protocol import run_item
from ccm.evaluation.share import Nll, bootstrap_share, parallel_nll, recovered_share, reference_nll, turn_nll
from ccm.evaluation.tasks.conversation import row_item
from ccm.methods.compressed import shared_compressor
from ccm.methods.default import CHAT

MEMORIES: dict[str, tuple[str, dict[str, int]]] = {
    "ccm-chat, 4 slots a turn": ("ccm-chat", {}),  # ccm-concat has the same weights
    "ccm-chat, 2 slots a turn": ("ccm-chat", {"slots": 2}),
    "ccm-merge, 16 slots": ("ccm-merge", {}),
    "ccm-merge, 8 slots": ("ccm-merge", {"slots": 8}),
    "chat: ccm-merge, 16 slots + sink + window": ("ccm-merge", dict(CHAT)),
    "chat: ccm-chat, 4 slots a turn + sink + window": ("ccm-chat", dict(CHAT)),
    # chosen on validation rows among sizes that are five times less (docs/experiments.md)
    "small: ccm-chat, 2 slots a turn + sink + window of 24": (
        "ccm-chat",
        {"slots": 2, "sink": 4, "window": 24},
    ),
}


def entries_before(compressor: ccm.Compressor, row: ConversationRow, sizes: dict[str, int]) -> list[int]:
    """Keys that each turn finds in the memory: the canonical position of its first token."""
    layout = compressor.lay_out([row.segments], **sizes)
    return [int(layout.position[0, start]) for start, _ in layout.spans[0]]


def window_nll(
    model: Any, tokenizer: Any, rows: list[ConversationRow], entries: list[list[int]], first: int, name: str
) -> Nll:
    """Sink and recent tokens with the same number of keys at every turn."""
    totals, counts = [], []
    for row, budget in track(list(zip(rows, entries, strict=True)), description=f"window beside {name}"):
        item = row_item(row, range(first, len(row.segments)))
        scored = run_item(ccm.get_method("window").open(model, tokenizer), item, entries=budget[1:])[
            "queries"
        ]
        totals.append(sum(turn["nll"] for turn in scored))
        counts.append(sum(turn["tokens"] for turn in scored))
    return Nll(tuple(totals), tuple(counts))


def recurrent_gap(compressor: ccm.Compressor, row: ConversationRow, sizes: dict[str, int]) -> float:
    """Largest difference of a turn's NLL per token between the parallel pass and living through the row."""
    output, memory, worst = compressor([row.segments], **sizes), compressor.empty(), 0.0
    for turn, (ids, content) in enumerate(zip(row.segments, row.content, strict=True)):
        alone, tokens = turn_nll(compressor.logits([list(ids)], memory)[0], ids, content)
        together, _ = turn_nll(output.segment_logits(0, turn), ids, content)
        worst = max(worst, abs(alone - together) / tokens)
        memory = compressor.compress([list(ids)], memory, **sizes)
    return worst


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--turns", type=int, default=10, help="of a row")
    options.add_argument("--only", default="", metavar="TEXT", help="memories with this in their name")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    turns, first = arguments.turns, max(4, arguments.turns - 10)
    memories = {name: memory for name, memory in MEMORIES.items() if arguments.only in name}
    if turns <= 4 or not memories:
        raise ConfigError(f"got --turns {turns} --only {arguments.only!r}: more than 4, and part of a name")
    model, tokenizer = ccm.load_default_model()
    rows = held_out_rows(load_chitchat("test"), tokenizer, turns)[: arguments.limit]
    reader = shared_compressor(model, "ccm-concat")
    per_token = reader.kv_bytes_per_token()
    batch = max(1, 40 // turns)
    none, full = (reference_nll(reader, rows, context, first, batch) for context in ("none", "full"))
    context = [row.tokens - len(row.segments[-1]) for row in rows]

    def report(nll: Nll, entries: list[int]) -> dict[str, Any]:
        return {
            "nll": round(nll.mean, 4),
            "perplexity": round(math.exp(nll.mean), 2),
            "recovered_share": round(recovered_share(none.mean, full.mean, nll.mean), 4),
            "share_ci": [round(x, 4) for x in bootstrap_share(none, full, nll)],
            "kv_bytes": round(sum(entries) / len(entries)) * per_token,
            "times_less_kv": round(sum(context) / max(1, sum(entries)), 2),
        }

    file = "quality" if turns == 10 else f"quality_{turns}_turns"
    methods = {"none": report(none, [0] * len(rows)), "full": report(full, context)}
    fingerprints: dict[str, str] = {}
    if arguments.only and (RESULTS / f"{file}.json").is_file():
        stored = json.loads((RESULTS / f"{file}.json").read_text())
        moved = [abs(stored["methods"][name]["nll"] - methods[name]["nll"]) for name in methods]
        if stored["rows"] != len(rows) or max(moved) > 1e-3:
            raise ConfigError(f"results/{file}.json is of other rows or another model: measure all memories")
        methods, fingerprints = stored["methods"], stored["adapters"]
    for name, (adapter, sizes) in memories.items():
        compressor = shared_compressor(model, adapter)
        entries = [entries_before(compressor, row, sizes) for row in rows]
        last = [e[-1] for e in entries]
        fingerprints[adapter] = compressor.fingerprint()
        methods[name] = report(parallel_nll(compressor, rows, first, batch, **sizes), last)
        methods[name]["parallel_recurrent_gap"] = max(
            recurrent_gap(compressor, row, sizes) for row in rows[:2]
        )
        beside = f"window of the same bytes as {name}"
        # a window knows no adapter, only sizes
        if methods.get(beside, {}).get("kv_bytes") != methods[name]["kv_bytes"]:
            methods[beside] = report(window_nll(model, tokenizer, rows, entries, first, name), last)
        print(name, methods[name], methods[beside], flush=True)
    order = ["none", "full", *(n for name in MEMORIES for n in (name, f"window of the same bytes as {name}"))]
    store(
        file,
        {
            "task": f"chitchat, test users, rows of {turns} turns, targets from turn {first + 1} on",
            "rows": len(rows),
            "target_tokens": sum(none.tokens),
            "adapters": fingerprints,
            "methods": {name: methods[name] for name in order if name in methods},
        },
    )


if __name__ == "__main__":
    main()
