"""What a slice leaves, in a few files of at most 16 MB that the next one goes on from: adapter, log, and state.

    python benchmarks/gpu/state.py FOLDER RUN      (what came back, as the folder of a run)

The state is the trainer's checkpoint with the moments of the optimizer in bfloat16. Where that is too large the
moments stay out, and the next slice gathers them anew; where all is too large, it begins with the adapter alone.

torch is imported where it is needed: a slice starts its training before it reads any state, and seconds later.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from pieces import BundleError, archive, below, digest

LOG, CHECKPOINT = "log.jsonl", "checkpoint.pt"
DESCRIBED, PART = "left.json", "left.{}"
FILE, FILES = 16_000_000, 4  # bytes of a file, and how many there may be


def slim(checkpoint: Path, moments: bool = True) -> bytes:
    """A checkpoint with the optimizer's moments in half the bytes, or without them; the trainer reads it like any."""
    import torch

    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    optimizer = state["optimizer"]
    for held in optimizer["state"].values():
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # the count of steps has no dimension
                held[name] = value.to(torch.bfloat16)
    optimizer["state"] = optimizer["state"] if moments else {}
    return _bytes(state)


def begin_anew(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Let the schedule of a saved run begin where the run is now, with settings that belong to this machine."""
    import torch

    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    step, tokens, seconds, best, recall, *_ = state["counters"]
    state["counters"] = [step, tokens, seconds, best, recall, step, seconds]
    state["config"] = json.dumps({**json.loads(state["config"]), **settings})
    checkpoint.write_bytes(_bytes(state))


def leave(run: Path, out: Path) -> str:
    """Copy what a run has reached so far; returns a line that says what that is."""
    out.mkdir(parents=True, exist_ok=True)
    log, checkpoint = run / LOG, run / CHECKPOINT
    if not log.exists():
        return "nothing yet"
    shutil.copyfile(log, out / LOG)
    files: list[tuple[str, Path | bytes]] = [(LOG, log), *below(run / "adapter", "adapter/")]
    content, said = archive(files), "no state"
    for moments, words in ((True, "all of it"), (False, "no moments of the optimizer")):
        if checkpoint.exists():
            whole = archive([*files, (CHECKPOINT, slim(checkpoint, moments))])
            if len(whole) <= FILES * FILE:
                content, said = whole, words
                break
    parts = [content[at : at + FILE] for at in range(0, len(content), FILE)]
    for k, part in enumerate(parts):
        (out / PART.format(k)).write_bytes(part)
    (out / DESCRIBED).write_text(json.dumps({"files": len(parts), "sha256": digest(content)}) + "\n")
    return f"{said}, {len(content) / 1e6:.1f} MB" + ("" if len(parts) <= FILES else ", too many files")


def restore(folder: Path, run: Path) -> None:
    """Make the folder of a run from what a slice left.

    Raises:
        BundleError: parts of it are missing or damaged, or the run is there already.
    """
    if run.exists() and any(run.iterdir()):
        raise BundleError(f"{run} is there already: give another folder")
    try:
        described = json.loads((folder / DESCRIBED).read_text())
        content = b"".join((folder / PART.format(k)).read_bytes() for k in range(described["files"]))
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{folder} holds nothing that a slice left ({error}); fetch all its files"
        ) from error
    if digest(content) != described["sha256"]:
        raise BundleError(
            f"what {folder} holds is damaged: got {len(content):,} bytes, digest {digest(content)[:12]}, expected "
            f"{described['sha256'][:12]}; fetch its files again"
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(run, filter="data")


def _bytes(state: dict[str, Any]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    try:
        restore(Path(sys.argv[1]), Path(sys.argv[2]))
    except (BundleError, IndexError) as error:
        sys.exit(f"error: {error or __doc__}")
