"""The picture of a demo: what the memory is worth and what it costs, turn by turn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import needing
from ..files.atomic import write_atomically

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")


def plot(result: dict[str, Any], path: Path) -> None:
    """Save two panels as PNG: NLL gained over no context, and KV bytes, both against the turn.

    Args:
        result: of :func:`ccm.evaluation.demo.demo`.
        path: where to.

    Raises:
        MissingPackageError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    with needing("the plot needs matplotlib", "plot"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    quality, size = figure.subplots(1, 2)
    methods = result["methods"]
    turns = range(1, result["turns"] + 1)
    styles = _styles(methods)
    for name, values in methods.items():
        gain = [
            none - own
            for none, own in zip(methods["none"]["nll_by_turn"], values["nll_by_turn"], strict=True)
        ]
        quality.plot(turns, gain, label=name, **styles[name])
        size.plot(turns, [count / 1e6 for count in values["kv_bytes_by_turn"]], **styles[name])
    first, last = result["first_target_turn"] - 0.5, result["turns"] + 0.5
    quality.axvspan(first, last, color="0.95", zorder=0)
    quality.text(
        (first + last) / 2, 0.01, "scored in the table",
        transform=quality.get_xaxis_transform(), ha="center", va="bottom", color="0.45", fontsize=9,
    )  # fmt: skip
    quality.set(title="What the context is worth", ylabel="nats per token gained over no context")
    size.set(title="What it takes", ylabel="keys and values read (MB)", ylim=(0, None))
    quality.margins(y=0.12)
    for axes in (quality, size):
        axes.set(xlabel="turn", xlim=(0.5, result["turns"] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(methods)), frameon=False)
    count = result["conversations"]
    subject = f"{count} held-out conversation{'s' if count > 1 else ''}, {result['model']}"
    figure.suptitle(subject, fontsize=10, color="0.35")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def _styles(methods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A window is dashed, in the colour of the method whose bytes it has."""
    colors = {"none": "0.6", "full": "black"}
    free = iter(_COLORS * len(methods))
    for name, values in methods.items():
        if "same_bytes_as" not in values and name not in colors:
            colors[name] = next(free)
    return {
        name: {
            "color": colors[values.get("same_bytes_as", name)],
            "linestyle": "--" if "same_bytes_as" in values else ":" if name == "none" else "-",
            "marker": None if "same_bytes_as" in values or name == "none" else "o",
            "markersize": 4,
            "linewidth": 1.8,
        }
        for name, values in methods.items()
    }
