"""What the server's benchmarks stored, as Markdown tables for docs/serving.md.

python benchmarks/serving/table.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "results" / "serving"


def exactness(r: dict[str, Any]) -> tuple[str, str]:
    wrong = sum(len(row["differing"]) for row in r["runs"])
    twins = r["twins"]
    return (
        f"greedy answers of {r['conversations']} concurrent conversations equal each alone; twins never mix",
        f"{r['answers_compared']} answers, {wrong} conversations differ; {twins['pairs']} pairs of twins, "
        f"{len(twins['differing_from_alone'])} mixed (control: {len(twins['control_with_exchanged_keys_flagged'])} "
        f"of {2 * twins['pairs_whose_answers_alone_differ']} exchanged ones found)",
    )


def kills(r: dict[str, Any]) -> tuple[str, str]:
    rows = r["rows"]
    kills = ", ".join(f"{row['kills']} {row['store']} ({row['model']} model)" for row in rows)
    turns = sum(sum(row["turns_acknowledged"].values()) for row in rows)
    cut = sum(row["turns_under_way_at_a_kill"] for row in rows)
    wrong = sum(len(row["wrong"]) for row in rows)
    return (
        "kill -9 under load: no acknowledged turn lost, no memory damaged",
        f"kills: {kills}; {turns} turns acknowledged, {cut} cut off, {wrong} things wrong",
    )


def load(r: dict[str, Any]) -> tuple[str, str]:
    requests, memory = r["requests"], r["memory"]
    done = sum(count for kind, count in requests.items() if kind.islower() and not kind.isdigit())
    return (
        f"{r['clients']} clients for {r['seconds'] // 60} minutes: no error but 429, memory flat",
        f"{done} requests done, {requests.get('429', 0)} told to come back, {len(r['errors'])} errors; "
        f"{memory['mean_mb_from_a_fifth_to_two_fifths']:.0f} MB in minutes 2 to 4, "
        f"{memory['mean_mb_in_the_last_fifth']:.0f} MB in the last two ({memory['growth']:+.1%})",
    )


def first_token(r: dict[str, Any]) -> tuple[str, str]:
    seconds = {name: row["median"] for name, row in r["seconds"].items()}
    return (
        f"time to first token of turn {r['turns']} at most 1.2× turn 2, 5× faster than reading the history again",
        f"{seconds['late']:.2f} s and {seconds['early']:.2f} s: {r['late_over_early']:.2f}×; "
        f"{r['stateless_prompt_tokens']} tokens again: {seconds['stateless']:.2f} s, {r['stateless_over_late']:.0f}×",
    )


def throughput(r: dict[str, Any]) -> tuple[str, str]:
    ratio = r["ratio"]
    both = [r[name]["tokens_per_second"]["median"] for name in ("batched", "sequential")]
    return (
        f"{r['conversations']} conversations at once at least 2.5× one after the other",
        f"{both[0]:.0f} and {both[1]:.0f} tokens/s: {ratio['median']:.2f}× "
        f"({ratio['least']:.2f} to {ratio['most']:.2f})",
    )


def fuzz(r: dict[str, Any]) -> tuple[str, str]:
    suites = r["suites"].values()
    recorded = [(k, n) for suite in suites for k, n in suite["recorded"].items()]
    damages = sum(n for name, n in recorded if name.endswith("damages"))
    requests = sum(n for name, n in recorded if name.endswith("requests"))
    return (
        "schemathesis, the store against a model, damaged memories",
        f"{sum(s['tests'] for s in suites)} tests, {sum(s['failures'] + s['errors'] for s in suites)} fail; "
        f"{requests} generated requests, {damages} damages",
    )


ROWS: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    row.__name__: row for row in (exactness, kills, load, first_token, throughput, fuzz)
}


def main() -> None:
    print("| what it must reach | measured | reached |", "|---|---|---|", sep="\n")
    for name, row in ROWS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            must, measured = row(result)
            print(f"| {must} | {measured} | {'yes' if result['reached'] else '**no**'} |")
    clients()


def clients() -> None:
    """What stock clients sent, case by case."""
    path = RESULTS / "clients.json"
    if not path.exists():
        return
    print("\n| client | case | what happened | |", "|---|---|---|---|", sep="\n")
    for row in json.loads(path.read_text())["cases"]:
        what = " ".join(row["what"].replace("|", "\\|").split())
        print(f"| {row['client']} | {row['case']} | {what} | {'✓' if row['ok'] else '**✗**'} |")


if __name__ == "__main__":
    main()
