"""Markdown tables of what the benchmarks stored, for the README and ``docs/``.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def quality() -> str:
    methods = load("quality")["methods"]
    lines = [
        "| method | KV held | times less | perplexity | recovered share (95 % CI) | window of the same bytes |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, m in methods.items():
        if name.startswith("window"):
            continue
        beside = methods.get(f"window of the same bytes as {name}")
        share = f"{m['recovered_share']:.3f}"
        if beside:
            share = f"**{share}** ({m['share_ci'][0]:.2f} to {m['share_ci'][1]:.2f})"
        cells = [
            name,
            f"{m['kv_bytes'] / 1e6:.2f} MB",
            f"{m['times_less_kv']:.1f}×" if beside else "",
            f"{m['perplexity']:.1f}",
            share,
            f"{beside['recovered_share']:.3f}" if beside else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reach() -> str:
    result = load("reach")
    distances = list(dict.fromkeys(row["distance"] for row in result["rows"]))
    lines = [
        "| evidence in nats (accuracy) at a distance of | " + " | ".join(f"{d}" for d in distances) + " |"
    ]
    lines.append("|---|" + "---|" * len(distances))
    for name in result["methods"]:
        rows = [row for row in result["rows"] if row["method"] == name]
        cells = [f"{row['evidence']:+.2f} ({row['accuracy']:.1f})" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| memory | facts that its window has lost, turns back | evidence less the window's (95 % CI) |",
    ]
    lines.append("|---|---|---|")
    for row in result["gain_beyond_the_window"]:
        low, high = row["gain_ci"]
        far = ", ".join(map(str, row["distances"]))
        lines.append(f"| {row['method']} | {far} | **{row['gain']:+.2f}** ({low:+.2f} to {high:+.2f}) |")
    return "\n".join(lines)


def foreign_memory() -> str:
    lines = [
        "| adapter | keys | recovered share | memory alone | last tokens, as many: share | memory alone |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, m in load("foreign_memory")["adapters"].items():
        cells = [name, f"{m['keys']:.0f}"]
        for part in ("whole", "memory", "window_whole", "window_memory"):
            low, high = m[f"{part}_ci"]
            cells.append(f"{m[part]:.3f} ({low:.2f} to {high:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth() -> str:
    lines = [
        "| session | bytes after 100 turns | after 1,000 | full context | seconds per append, last / first |"
    ]
    lines.append("|---|---|---|---|---|")
    for row in load("growth")["rows"]:
        megabytes = [
            f"{row[key] / 1e6:.2f} MB"
            for key in ("nbytes_after_100", "nbytes_after_all", "full_context_nbytes")
        ]
        lines.append(f"| {row['session']} | " + " | ".join(megabytes) + f" | {row['ratio']:.2f} |")
    return "\n".join(lines)


def fold_cost() -> str:
    lines = ["| adapter | segment | slots in memory | fold / prefill |", "|---|---|---|---|"]
    for row in load("fold_cost")["rows"]:
        lines.append(f"| {row['adapter']} | {row['segment']} | {row['memory_slots']} | {row['ratio']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(*(table() for table in (quality, foreign_memory, reach, growth, fold_cost)), sep="\n\n")
