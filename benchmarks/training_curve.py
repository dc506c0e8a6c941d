"""Quality against tokens trained: every adapter that was ever shipped for small talk, on the same held-out rows.

Each is a commit further down one line of training: a run begins at the adapter before it, so tokens add up. The
older ones are read from the project's history, which has to be there (a shallow clone lacks it).

    python benchmarks/training_curve.py
    python benchmarks/training_curve.py --figure      docs/figures/training_curve.png from what is stored
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, store

import ccm
from ccm.core.compressor import Compressor
from ccm.data import load_chitchat
from ccm.data.rows import held_out_rows
from ccm.errors import ConfigError
from ccm.evaluation.share import bootstrap_share, parallel_nll, recovered_share, reference_nll

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "figures" / "training_curve.png"
TURNS, FIRST = 10, 4


@dataclass(frozen=True)
class Point:
    """An adapter as it was shipped at a commit; its run went on from the point before it where ``goes_on``."""

    commit: str
    adapter: str
    goes_on: bool = True


#: Line of training -> its adapters in order; merge's second is a later state of the same run.
LINES: dict[str, tuple[Point, ...]] = {
    "concat, 4 slots a turn": (
        Point("4f28f7f", "ccm-concat", goes_on=False),
        Point("7c7e2be", "ccm-concat"),
        Point("c55e8de", "ccm-chat"),
        Point("dbd7109", "ccm-chat"),
        Point("afce751", "ccm-chat"),
    ),
    "merge, 16 slots in all": (
        Point("4f28f7f", "ccm-merge", goes_on=False),
        Point("ff30b47", "ccm-merge", goes_on=False),
    ),
}


def fetch(point: Point, folder: Path) -> Path:
    """The adapter's folder as it was at its commit.

    Raises:
        ConfigError: the history does not have it.
    """
    inside = f"src/ccm/adapters/{point.adapter}"
    done = subprocess.run(
        ["git", "archive", point.commit, inside], cwd=ROOT, capture_output=True, check=False
    )
    if done.returncode:
        reason = done.stderr.decode().strip()
        raise ConfigError(f"{point.adapter} at {point.commit}: {reason} (git fetch --unshallow, then again)")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder / point.commit, filter="data")
    return folder / point.commit / inside


@torch.inference_mode()
def measure(limit: int | None) -> dict[str, Any]:
    tokenizer = ccm.load_default_model()[1]
    rows = held_out_rows(load_chitchat("test"), tokenizer, TURNS)[:limit]
    lines: dict[str, list[dict[str, Any]]] = {}
    references: tuple[Any, Any] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for line, points in LINES.items():
            tokens = 0
            for point in points:
                folder = fetch(point, Path(scratch))
                model, _ = ccm.load_default_model()  # an adapter stays in its model
                compressor = Compressor.from_pretrained(model, folder)
                none, full = references = references or tuple(
                    reference_nll(compressor, rows, context, FIRST) for context in ("none", "full")
                )
                own = json.loads((folder / "training.json").read_text())["report"]["tokens"]
                tokens = own + (tokens if point.goes_on else 0)
                nll = parallel_nll(compressor, rows, FIRST)
                scored = {
                    "commit": point.commit,
                    "adapter": point.adapter,
                    "tokens": tokens,
                    "recovered_share": round(recovered_share(none.mean, full.mean, nll.mean), 4),
                    "share_ci": [round(x, 4) for x in bootstrap_share(none, full, nll)],
                }
                lines.setdefault(line, []).append(scored)
                print(line, scored, flush=True)
    return {
        "task": f"chitchat, test users, rows of {TURNS} turns, targets from turn {FIRST + 1} on",
        "rows": len(rows),
        "lines": lines,
    }


def draw(result: dict[str, Any]) -> None:
    """Share against tokens on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for line, points in result["lines"].items():
        shares = [point["recovered_share"] for point in points]
        low, high = zip(*(point["share_ci"] for point in points), strict=True)
        spread = [
            [share - end for share, end in zip(shares, low, strict=True)],
            [end - share for share, end in zip(shares, high, strict=True)],
        ]
        tokens = [point["tokens"] / 1e6 for point in points]
        axes.errorbar(tokens, shares, spread, marker="o", capsize=3, label=line)
    axes.set(
        xscale="log", xlabel="tokens trained on, in millions", ylabel="recovered share, 95 % CI over rows"
    )
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--figure", action="store_true", help="draw what is stored and end")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    path = RESULTS / "training_curve.json"
    if given.figure:
        draw(json.loads(path.read_text()))
        return
    store("training_curve", measure(given.limit))


if __name__ == "__main__":
    main()
