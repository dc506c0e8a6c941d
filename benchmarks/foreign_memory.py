"""How much of a recovered share is memory: the last turn of a conversation, read from its own memory and from that of
another conversation.

A slot can carry what was said, and it can carry how people talk in this kind of data, which any conversation would
teach. The second part is there with a foreign memory, too; the first is what the own memory is better by. Beside each
memory stand the last tokens of the conversation, as many as it has keys.

    whole    = (none - own) / (none - full)               the usual recovered share
    memory   = (foreign - own) / (full foreign - full)    of what only this conversation can tell

    python benchmarks/foreign_memory.py ccm-concat ccm-merge runs/mine/adapter
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from common import RESULTS, parser, store
from quality import entries_before

import ccm
from ccm.core.compressor import Compressor
from ccm.data import load_chitchat
from ccm.data.rows import ConversationRow, held_out_rows
from ccm.evaluation.share import parallel_nll, recovered_share, reference_nll
from ccm.files import base_stage

TURNS, ROWS, AWAY = 10, 96, 7
ADAPTERS = ("ccm-concat", "ccm-chat", "ccm-merge", "ccm-concat-short")


def foreign(rows: Sequence[ConversationRow]) -> list[ConversationRow]:
    """Every row's last turn behind the earlier turns of another row."""
    return [
        replace(
            row,
            segments=(*other.segments[:-1], row.segments[-1]),
            content=(*other.content[:-1], row.content[-1]),
            recall=(),
        )
        for row, other in zip(rows, [*rows[AWAY:], *rows[:AWAY]], strict=True)
    ]


def last_tokens(rows: Sequence[ConversationRow], counts: Sequence[int]) -> list[ConversationRow]:
    """Rows of two segments: the last tokens before the last turn, so many of each row, and that turn."""
    return [
        replace(
            row,
            segments=(sum(row.segments[:-1], ())[-count:], row.segments[-1]),
            content=((0, 0), row.content[-1]),
            recall=(),
        )
        for row, count in zip(rows, counts, strict=True)
    ]


def shares(nll: dict[str, Sequence[float]], draws: int = 2000) -> dict[str, Any]:
    """The two shares, of the memory and of the window beside it, each with its 95 % interval over rows."""
    names = ("none", "full", "full foreign", "own", "foreign", "window", "window foreign")
    totals = torch.tensor([nll[k] for k in names], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(totals.shape[1], (draws, totals.shape[1]), generator=generator)

    def of(sums: torch.Tensor) -> dict[str, torch.Tensor]:
        none, full, full_foreign, own, other, window, window_foreign = sums
        return {
            "whole": recovered_share(none, full, own),
            "memory": (other - own) / (full_foreign - full),
            "window_whole": recovered_share(none, full, window),
            "window_memory": (window_foreign - window) / (full_foreign - full),
        }

    exact, drawn = of(totals.sum(1)), of(totals[:, picks].sum(2))
    result: dict[str, Any] = {}
    for name, value in exact.items():
        spread = drawn[name].sort().values
        result[name] = round(float(value), 4)
        result[f"{name}_ci"] = [round(float(spread[int(q * draws)]), 4) for q in (0.025, 0.975)]
    return result


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("adapters", nargs="*", default=ADAPTERS, help="names or folders")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = ccm.load_default_model()[1]
    rows = held_out_rows(load_chitchat("validation", cap_per_user=None), tokenizer, TURNS, per_conversation=2)
    rows = rows[: given.limit or ROWS]
    last, others = TURNS - 1, foreign(rows)
    references: dict[str | None, dict[str, Sequence[float]]] = {}  # by the first stage that the model has
    results: dict[str, Any] = {}
    for name in given.adapters:
        model, _ = ccm.load_default_model(dtype=getattr(torch, given.dtype))
        compressor = Compressor.from_pretrained(model, name)
        if (stage := base_stage.present(model)) not in references:
            references[stage] = {
                "none": reference_nll(compressor, rows, "none", last).total,
                "full": reference_nll(compressor, rows, "full", last).total,
                "full foreign": reference_nll(compressor, others, "full", last).total,
            }
        entries = [entries_before(compressor, row, {})[-1] for row in rows]
        nll = {
            **references[stage],
            "window": reference_nll(compressor, last_tokens(rows, entries), "full", 1).total,
            "window foreign": reference_nll(compressor, last_tokens(others, entries), "full", 1).total,
            "own": parallel_nll(compressor, rows, last).total,
            "foreign": parallel_nll(compressor, others, last).total,
        }
        results[name] = (
            {"keys": sum(entries) / len(entries), "dtype": given.dtype}
            | shares(nll)
            | {k: round(sum(v), 1) for k, v in nll.items()}
        )
        print(name, results[name], flush=True)
    path = RESULTS / "foreign_memory.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("rows") == len(rows):  # what was measured of other adapters stays
        results = stored["adapters"] | results
    store(
        "foreign_memory",
        {
            "task": f"chitchat, validation users, the last of {TURNS} turns",
            "rows": len(rows),
            "adapters": results,
        },
        given.dtype,
    )


if __name__ == "__main__":
    main()
