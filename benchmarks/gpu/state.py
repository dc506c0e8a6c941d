"""What a slice leaves, in files of at most 16 MB that the next one goes on from: adapter, log, and the run's state.

The state is the trainer's checkpoint with the moments of the optimizer in bfloat16, split over several files. Where
it is too large even so it stays out, and the next slice begins with the adapter and a new optimizer.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from pieces import BundleError, below, digest

ADAPTER, LOG, CHECKPOINT, STATE = "adapter.zip", "log.jsonl", "checkpoint.pt", "state.json"
FILE = 16_000_000  # bytes of a file
FILES = 3  # that the state may take


def slim(checkpoint: Path) -> bytes:
    """A checkpoint with the optimizer's moments in half the bytes; the trainer reads it like any."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for moments in state["optimizer"]["state"].values():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # the count of steps has no dimension
                moments[name] = value.to(torch.bfloat16)
    return _bytes(state)


def begin_anew(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Let the schedule of a saved run begin where the run is now, with settings that belong to this machine."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    step, tokens, seconds, best, recall, *_ = state["counters"]
    state["counters"] = [step, tokens, seconds, best, recall, step, seconds]
    state["config"] = json.dumps({**json.loads(state["config"]), **settings})
    checkpoint.write_bytes(_bytes(state))


def leave(run: Path, out: Path) -> str:
    """Copy what a run has reached so far; returns a line that says what that is."""
    out.mkdir(parents=True, exist_ok=True)
    left = []
    if (adapter := run / "adapter").exists():
        with zipfile.ZipFile(out / ADAPTER, "w") as packed:
            for name, path in below(adapter):
                packed.write(path, name)
        left.append("adapter")
        if (size := (out / ADAPTER).stat().st_size) > FILE:
            left[-1] += f" ({size:,} bytes, more than a file may have)"
    if (run / LOG).exists():
        shutil.copyfile(run / LOG, out / LOG)
        left.append("log")
    if (run / CHECKPOINT).exists():
        content = slim(run / CHECKPOINT)
        parts = [content[at : at + FILE] for at in range(0, len(content), FILE)]
        if len(parts) <= FILES:
            for k, part in enumerate(parts):
                (out / f"{CHECKPOINT}.{k}").write_bytes(part)
            (out / STATE).write_text(json.dumps({"files": len(parts), "sha256": digest(content)}) + "\n")
            left.append(f"state in {len(parts)} files")
        else:
            left.append(
                f"no state: {len(content):,} bytes, more than {FILES * FILE:,}; the next slice warms up again"
            )
    return ", ".join(left) or "nothing yet"


def joined(folder: Path) -> bytes | None:
    """The checkpoint that a slice left, None if it left none.

    Raises:
        BundleError: parts of it are missing or damaged.
    """
    if not (folder / STATE).exists():
        return None
    described = json.loads((folder / STATE).read_text())
    names = [f"{CHECKPOINT}.{k}" for k in range(described["files"])]
    if missing := [name for name in names if not (folder / name).exists()]:
        raise BundleError(
            f"{folder} lacks {', '.join(missing)}: fetch it, or delete {STATE} to go on without the state"
        )
    content = b"".join((folder / name).read_bytes() for name in names)
    if digest(content) != described["sha256"]:
        raise BundleError(
            f"{folder} holds a damaged state (a slice was killed while it wrote?): delete {STATE} to go on with the "
            "adapter alone"
        )
    return content


def _bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
