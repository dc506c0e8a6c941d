"""What ``benchmarks/*.py`` stored in ``results/*.json``, as sections of the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ...errors import DataError
from ..metrics import recovered_share
from .tables import markdown, number, size

#: name of a file -> its content
Stored = Mapping[str, dict[str, Any]]
_BASELINES, _WINDOW = "held_out_baselines", "window of the same bytes as "
#: figures of benchmarks/held_out.py at the bytes of four slots, and the one beside a window
_FIGURES = (
    "window as slots 4",
    "attention-matching",
    "slots-and-matching",
    "slots 4",
    "slots 4, window 64",
)
#: memories that need no training: the one that is taken without an adapter, and those that keep what was computed
_UNTRAINED = "attention-matching"
#: figures at a fifth of the bytes of the text, and what some of them are compared with
_FIFTH = {
    "window, a fifth": None,
    "attention-matching, a fifth": None,
    "slots-and-matching, a fifth": "attention-matching, a fifth",
    "attention-matching, a fifth, int4": None,
    "slots-and-matching, a fifth, int4": "attention-matching, a fifth, int4",
}
_EVICTION = ("streaming-llm", "key-norm", "keydiff", "lagkv", "snapkv", "tova", "h2o", "kvzip")


def load(folders: Sequence[Path]) -> Stored:
    """The files in folders that sections are made of.

    Raises:
        DataError: a file is not JSON.
    """
    found = {}
    for path in (
        path for folder in folders for part in ("", "serving") for path in (folder / part).glob("*.json")
    ):
        if path.stem in _SECTIONS or path.stem.startswith("held_out_"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: expected JSON as its benchmark writes it ({error})") from error
            if "suite" not in content:  # of ccm eval, under the same name
                found[path.stem] = content
    return {name: found[name] for name in sorted(found)}


def sections(stored: Stored) -> list[str]:
    """Title and table of every benchmark that is there."""
    there = {name: section for name, section in _SECTIONS.items() if name in stored}
    return [
        part
        for name, (title, table) in there.items()
        for part in (f"## {title}", table(stored[name], stored))
    ]


def _range(value: float, ends: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    return f"{number(value, digits, sign)} ({' to '.join(number(end, 2, sign) for end in ends)})"


def _quality(result: dict[str, Any], stored: Stored) -> str:
    rows = []
    for name, m in result["methods"].items():
        shares = [f"{m['recovered_share']:.3f}", ""]
        if beside := result["methods"].get(_WINDOW + name):
            shares = [_range(method["recovered_share"], method["share_ci"]) for method in (m, beside)]
        less = f"{m['times_less_kv']:.1f}×" if beside else ""
        if not name.startswith(_WINDOW):
            rows.append([name, size(m["kv_bytes"]), less, f"{m['perplexity']:.1f}", *shares])
    header = ["method", "KV held", "times less", "perplexity", "recovered share", "window of the same bytes"]
    return markdown(header, rows)


def _held_out(result: dict[str, Any], stored: Stored) -> str:
    """Recovered share by source, over the rows that all figures have."""
    others = [name for name in stored if name.startswith("held_out_") and name != _BASELINES]
    shares: dict[str, dict[str, float]] = {}  # title -> source -> share
    counts: dict[str, int] = {}
    for key, source in result["sources"].items():
        nats = {
            (name.removeprefix("held_out_").replace("baselines", ""), figure): found
            for name in (_BASELINES, *others)
            for figure in ("none", "full", *_FIGURES)
            if (found := stored[name]["sources"].get(key, {}).get("nats", {}).get(figure))
        }
        count = counts[source["source"]] = min(map(len, nats.values()))
        sums = {title: sum(values[:count]) for title, values in nats.items()}
        for (adapter, figure), own in sums.items():
            if figure in _FIGURES:
                share = recovered_share(sums["", "none"], sums["", "full"], own)
                shares.setdefault(f"{adapter} {figure}".strip(), {})[source["source"]] = share
    rows = [
        [name, *(number(of[name]) if name in of else "" for of in shares.values()), f"{count}"]
        for name, count in counts.items()
    ]
    whole = (fmean(of.values()) if len(of) == len(counts) else None for of in shares.values())
    mean = ["**mean**", *("" if value is None else f"**{number(value)}**" for value in whole), ""]
    tables = [markdown(["source", *shares, "rows"], [*rows, mean])]
    for name in others:
        if fifth := _fifth(result, stored[name]):
            of = name.removeprefix("held_out_")
            tables.append(
                f"In a fifth of the bytes of all text in front of the last segment. Fitted entries stand beside a "
                f"slot of {of} a segment. In 4 bits between the turns, a prompt reads 3.5 times as many."
                f"\n\n{fifth}"
            )
    for name in (_BASELINES, *others):
        of = "" if name == _BASELINES else f" on {name.removeprefix('held_out_')}"
        if beside := _untrained(stored[name]):
            tables.append(
                f"Without training{of}, in the same bytes: how far {_UNTRAINED} is ahead.\n\n{beside}"
            )
    return "\n\n".join(tables)


def _untrained(result: dict[str, Any]) -> str:
    """The share of Attention Matching by source, and what it is ahead of each eviction method, row by row."""
    header, rows = ["source", _UNTRAINED, *_EVICTION, "rows"], []
    for source in result["sources"].values():
        nats = {name: np.array(found) for name, found in source["nats"].items()}
        beside = [name for name in _EVICTION if name in nats]
        if _UNTRAINED not in nats or not beside:
            continue
        count = min(len(nats[name]) for name in ("none", "full", _UNTRAINED, *beside))
        none, full, own = (nats[name][:count] for name in ("none", "full", _UNTRAINED))
        ahead = [
            _drawn(nats[name][:count] - own, none - full, True) if name in nats else "" for name in _EVICTION
        ]
        rows.append([source["source"], _drawn(none - own, none - full), *ahead, f"{count}"])
    return markdown(header, rows) if rows else ""


def _fifth(result: dict[str, Any], adapter: dict[str, Any]) -> str:
    """Shares by source at a fifth of the bytes, and how far ahead, over the rows that all figures have."""
    shares: dict[str, dict[str, np.ndarray]] = {}
    counts: dict[str, str] = {}
    for key, source in result["sources"].items():
        nats = {**adapter["sources"].get(key, {}).get("nats", {}), **source["nats"]}
        if nats.keys() >= _FIFTH.keys():
            count = min(len(nats[name]) for name in ("none", "full", *_FIFTH))
            known = {name: np.array(found[:count]) for name, found in nats.items()}
            whole = known["none"] - known["full"]
            own = {name: _draws(known["none"] - known[name], whole, len(shares)) for name in _FIFTH}
            shares[source["source"]], counts[source["source"]] = own, f"{count}"
    if not shares:
        return ""
    shares["**mean**"] = {name: np.mean([own[name] for own in shares.values()], axis=0) for name in _FIFTH}
    header = ["source"]
    for name, rival in _FIFTH.items():
        header += [name.replace(", a fifth", ""), *(["ahead"] if rival else [])]
    rows = [[name, *_ahead(own), counts.get(name, "")] for name, own in shares.items()]
    return markdown([*header, "rows"], rows)


def _ahead(shares: dict[str, np.ndarray]) -> list[str]:
    """The share of each figure, and how far it is ahead of its rival, from all rows and from those drawn."""
    cells = []
    for name, rival in _FIFTH.items():
        cells.append(number(float(shares[name][0])))
        if rival:
            value, *drawn = (shares[name] - shares[rival]).tolist()
            cells.append(_range(value, np.quantile(drawn, (0.025, 0.975)).tolist(), 2, True))
    return cells


def _drawn(part: np.ndarray, whole: np.ndarray, sign: bool = False) -> str:
    """The sum of one over that of the other, with the 95 % interval over rows (R,)."""
    value, *drawn = _draws(part, whole).tolist()
    return _range(value, np.quantile(drawn, (0.025, 0.975)).tolist(), 2, sign)


def _draws(part: np.ndarray, whole: np.ndarray, seed: int = 0) -> np.ndarray:
    """The sum of one over that of the other: of all rows (R,), then of 2000 times as many drawn from them."""
    picks = np.random.default_rng(seed).integers(len(part), size=(2000, len(part)))
    picks = np.concatenate([np.arange(len(part))[None], picks])
    shares: np.ndarray = part[picks].sum(1) / whole[picks].sum(1)
    return shares


def _foreign(result: dict[str, Any], stored: Stored) -> str:
    parts = ("whole", "memory", "window_whole", "window_memory")
    rows = [
        [name, f"{m['keys']:.0f}", *(_range(m[part], m[f"{part}_ci"]) for part in parts)]
        for name, m in result["adapters"].items()
        if "/" not in name  # a run that came to nothing
    ]
    return markdown(["adapter", "keys", "recovered share", "memory alone", "window", "memory alone"], rows)


def _reach(result: dict[str, Any], stored: Stored) -> str:
    distances = list(dict.fromkeys(row["distance"] for row in result["rows"]))
    beyond = {
        gain["method"]: _range(gain["gain"], gain["gain_ci"], 2, True)
        for gain in result["gain_beyond_the_window"]
    }
    rows: dict[tuple[str, str], list[str]] = {}  # a window of the same bytes stands there once
    for name, method in result["methods"].items():
        own = [row for row in result["rows"] if row["method"] == name]
        nats = [f"{number(row['evidence'], 2, True)} ({row['accuracy']:.1f})" for row in own]
        title = "window" if name.startswith(_WINDOW) else name
        kept = size(method["kv_bytes"])
        rows.setdefault((title, kept), [title, kept, *nats, beyond.get(name, "")])
    return markdown(
        ["nats (accuracy)", "KV", *map(str, distances), "more than its window, where that has lost them"],
        list(rows.values()),
    )


def _growth(result: dict[str, Any], stored: Stored) -> str:
    keys = ("nbytes_after_100", "nbytes_after_all", "full_context_nbytes")
    rows = [
        [row["session"], *(size(row[key]) for key in keys), f"{row['ratio']:.2f}"] for row in result["rows"]
    ]
    return markdown(
        ["session", "after 100 turns", "after 1,000", "full context", "append, last / first"], rows
    )


def _fold_cost(result: dict[str, Any], stored: Stored) -> str:
    segments = sorted({row["segment"] for row in result["rows"]})
    ratios: dict[str, list[str]] = {}
    for row in sorted(result["rows"], key=lambda row: (row["adapter"], row["memory_slots"], row["segment"])):
        ratios.setdefault(f"{row['adapter']}, {row['memory_slots']} slots", []).append(f"{row['ratio']:.2f}")
    return markdown(
        ["adapter", *(f"{segment} tokens" for segment in segments)], [[k, *v] for k, v in ratios.items()]
    )


def _first_token(result: dict[str, Any], stored: Stored) -> str:
    names = {"early": "2nd turn", "settled": "10th", "late": "100th", "stateless": "all of it read again"}
    seconds = [f"{result['seconds'][name]['median']:.2f}" for name in names]
    return markdown(["answer to the", *names.values()], [["seconds", *seconds]])


#: name of a file -> title, and the table of its content
_SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any], Stored], str]]] = {
    "quality": ("Small talk: ten turns, scored from the fifth on", _quality),
    "quality_40_turns": ("Small talk: turns 31 to 40", _quality),
    _BASELINES: ("Other sources and formats: recovered share at the bytes of 4 slots", _held_out),
    "foreign_memory": ("What only the own conversation can tell", _foreign),
    "reach": ("Facts, so many turns back", _reach),
    "growth": ("Memory: a thousand turns in one session", _growth),
    "fold_cost": ("Speed: folding a segment, in times of prefilling it", _fold_cost),
    "first_token": ("Speed: seconds to the first token of the server", _first_token),
}
