"""What ``ccm bench`` measured, as tables, as ``docs/performance.md``, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import needing

PAGE, PICTURE = "performance.md", "figures/performance.png"

_INTRO = """\
# How fast it is

Written by `ccm report` from `results/bench.json`, which `make bench` makes with `ccm bench`; nothing on this page is
typed by hand. All contenders run in the same number of threads and take turns within one run: what disturbs one
disturbs all, so ratios hold on a busy machine. With one thread, seconds are those of the processor, and what it did
for others does not count. Figures are medians; small numbers are the least and the most.

`ccm` and `streaming-llm` have one process, one model and one copy of its weights. The others have a process and a
model each. Where weights and caches lie in memory differs from process to process, and that moves a token by a tenth
and many at once by up to a fifth. These numbers do not show it, so contenders of two processes that are nearer than
that are not told apart.

A history is not read before: keys and values of the size that it leaves are put in place. `vllm` and `kvpress` read
it, once."""

#: What each contender is.
_WHAT = {
    "ccm": "the default memory on transformers. Texts and answers read a float16 copy of the weights, as in `ccm "
    "chat` and `ccm serve`.",
    "ccm in llama.cpp": "the same memory, read, folded and answered in llama.cpp ([how](llama.md)).",
    "llama.cpp": "the same file with its keys and values kept.",
    "vllm": "vLLM in bfloat16, compiled, whose prefix cache has the history; every turn sends all of it with another "
    "question. The last token of an answer is left to the next turn. Many at once have one history, which vLLM keeps "
    "once; conversations of their own would need as many times its blocks.",
    "full cache": "transformers with its cache kept.",
    "kvpress": "SnapKV of NVIDIA's kvpress, which leaves as many entries of the history as the memory has, and "
    "transformers behind it. A press reads the whole history before it chooses. What is said afterwards is kept "
    "whole, so the cache grows again.",
    "streaming-llm": "sink and window of as many entries as the memory has, in this library.",
    "window": "the newest as many tokens, read anew in every turn, in transformers.",
    "resend": "the whole history, read anew in every turn, in transformers.",
}

_TURN = """\
## A turn

24 tokens come in and 32 are written, greedily; it ends when the next question may come, with everything folded."""

_PARTS = """\
## What a turn is made of

`decode`, behind {among:,} tokens, and `prefill` have the share that they reach of what the machine could do at
most: the bytes of weights, keys and values that one token reads, over the measured bandwidth; two operations per
weight and token, over the measured rate in float32, on a GPU in the type of the weights. Weights in fewer bits than
that may reach more than all of the second. `fold` takes 200 tokens into a full memory and stands beside a prefill of
the same tokens behind nothing. `restore` goes from the bytes of a memory to the first token behind it. Peak memory is
that of the whole process, with the libraries and whatever else was measured in it, on a GPU that of tensors there;
`ccm` and `streaming-llm` have one process."""

_MANY = """\
## Many at once

New tokens per second of conversations that are answered at the same time, whole turns, each behind a history of
{among:,} tokens."""

_TRIED = """\
What was tried on the way and kept or dropped: [one pass a turn](decisions.md#a-turn-goes-through-the-model-once),
[decoding](decisions.md#decoding), [memories at rest](decisions.md#memories-rest-in-half-of-the-bytes)."""


def page(result: Mapping[str, Any]) -> str:
    """``docs/performance.md``."""
    made = result["environment"]
    loads = made["load_before_and_after"]
    found = [
        f"{name} {version}"
        for row in result["rows"].values()
        for name, version in row.get("packages", {}).items()
    ]
    versions = ", ".join(dict.fromkeys(found))
    where = "; ".join(dict.fromkeys(row["device"] for row in result["rows"].values() if "device" in row))
    how = (
        f"{made['threads']} thread{'s' if made['threads'] > 1 else ''} of {made['cores']} cores each; {versions}; "
        f"transformers on {where}; "
        f"{result['repeats']} repetitions{' (quick)' if result['quick'] else ''}; load of the machine {loads[0]} "
        f"before and {loads[1]} after, of which one is this run; "
        f"bandwidth {result['limits']['bandwidth'] / 1e9:.1f} GB/s, "
        f"{result['limits']['operations'] / 1e9:.0f} GFLOP/s."
    )
    picture = f"![A turn by history, and many at once]({PICTURE})"
    what = "\n".join(f"- **{name}**: {_WHAT[name]}" for name in result["rows"])
    return "\n\n".join([_INTRO, what, picture, *tables(result), "## How it was measured", how, _TRIED]) + "\n"


def tables(result: Mapping[str, Any]) -> list[str]:
    """Titles and tables."""
    rows = result["rows"]
    among = 1_000 if result["quick"] else 4_000
    return [
        _TURN,
        _table(rows, "turns", "behind {:,} tokens", lambda turn: _seconds(turn["total"])),
        *_read(rows, among),
        "To the first token:",
        _table(rows, "turns", "behind {:,} tokens", lambda turn: _seconds(turn["first"])),
        "Keys and values that are kept between turns:",
        _table(rows, "turns", "behind {:,} tokens", lambda turn: f"{turn['kv_bytes'] / 1e6:.1f} MB"),
        _PARTS.format(among=among),
        _parts(rows, among),
        _MANY.format(among=among),
        _table(rows, "many", "{:,} at once", lambda found: _spread(found, "{:.1f}")),
    ]


def _table(rows: Mapping[str, Any], kind: str, title: str, cell: Callable[[Any], str]) -> str:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row[kind]))
    lines = [
        "| | " + " | ".join(title.format(int(key)) for key in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        if row[kind]:
            cells = [cell(row[kind][key]) if key in row[kind] else "" for key in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(rows: Mapping[str, Any], among: int) -> list[str]:
    """What it took to be behind a history, for those that read it."""
    key = str(among)
    found = [
        f"{row['turns'][key]['read']:.1f} s for {name}"
        for name, row in rows.items()
        if "read" in row["turns"].get(key, {})
    ]
    return [f"To read {among:,} tokens of history once: {', '.join(found)}."] if found else []


def _parts(rows: Mapping[str, Any], among: int) -> str:
    header = [
        "",
        "decode, tokens/s",
        "of the limit",
        "prefill, tokens/s",
        "of the limit",
        "fold",
        "restore",
        "peak memory",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        turn = row["turns"].get(str(among)) or next(reversed(row["turns"].values()))
        cells = [f"{1 / turn['between']['median']:.1f}", f"{turn['decode_share']:.0%}"]
        if "prefill" in row:
            cells += [f"{1024 / row['prefill']['median']:.0f}", f"{row['prefill_share']:.0%}"]
        else:
            cells += ["", ""]
        if "fold" in row:
            fold, plain = row["fold"]["median"], row["prefill_of_it"]["median"]
            cells += [f"{_seconds(row['fold'])}, {fold / plain:.1f}× a prefill", _seconds(row["restore"])]
        else:
            cells += ["", ""]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{row['peak_bytes'] / 1e9:.2f} GB"]) + " |")
    return "\n".join(lines)


def _seconds(values: Mapping[str, float]) -> str:
    return _spread(values, "{:.2f}" if values["median"] >= 0.1 else "{:.3f}") + " s"


def _spread(values: Mapping[str, float], form: str) -> str:
    median, least, most = (form.format(values[name]) for name in ("median", "least", "most"))
    return f"{median} <small>({least}-{most})</small>"


def picture(result: Mapping[str, Any]) -> bytes:
    """A turn against the history, and many at once, as PNG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needing("the picture needs matplotlib", "plot"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    turns, many = figure.subplots(1, 2)
    for index, (name, row) in enumerate(result["rows"].items()):
        ours = name.startswith("ccm")
        style = {"color": f"C{index}", "marker": "o", "markersize": 4, "linewidth": 2.4 if ours else 1.4}
        for axes, kind, value in (
            (turns, "turns", lambda turn: turn["total"]["median"]),
            (many, "many", lambda found: found["median"]),
        ):
            points = row[kind]
            if points:
                label = name if axes is turns else None
                axes.plot(
                    [int(key) for key in points], [value(v) for v in points.values()], label=label, **style
                )
    turns.set(title="A turn", xlabel="tokens of history", ylabel="seconds", xscale="log", yscale="log")
    many.set(
        title="Many at once",
        xlabel="conversations",
        ylabel="new tokens per second",
        xscale="log",
        yscale="log",
    )
    for axes in (turns, many):
        axes.grid(axis="y", which="both", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    for axes, kind in ((turns, "turns"), (many, "many")):
        axes.set_xticks([int(key) for key in next(iter(result["rows"].values()))[kind]])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks([], minor=True)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
