"""The state of a run on disk: one file, written as a whole or not at all, and a log that never repeats a step."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, MismatchError, StorageError
from ..files import adapter_folder
from ..files.atomic import write_atomically
from .config import FREE, TrainConfig, flat

FORMAT = "ccm-training/2"
FILE, LOG = "checkpoint.pt", "log.jsonl"
#: Settings of the past that checkpoints may name, at the one value that is left.
RETIRED = {f"compressor.{name}": value for name, value in adapter_folder.RETIRED.items()}


def save(folder: Path, config: TrainConfig, fingerprint: str, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Raises:
        StorageError: it cannot be written; the last one is intact.
    """
    buffer = io.BytesIO()
    torch.save(
        {"format": FORMAT, "model": fingerprint, "config": json.dumps(_plain(config)), **state},
        buffer,
    )
    write_atomically(folder / FILE, buffer.getvalue())


def load(folder: Path, config: TrainConfig, fingerprint: str) -> dict[str, Any] | None:
    """The last checkpoint of a run, None if there is none yet.

    Raises:
        ConfigError: it is damaged, or belongs to a run with other settings; every one that differs is named.
        MismatchError: it belongs to another model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        # the optimizer puts its state on the device of this run, which may be another one
        state = torch.load(path, weights_only=True, map_location="cpu")
        known = state.get("format") == FORMAT
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}); give another folder, or delete it"
        ) from error
    if not known:
        raise ConfigError(
            f"{path}: got format {state.get('format')!r}, expected {FORMAT!r}; give another folder"
        )
    saved = json.loads(state["config"])
    saved = {name: value for name, value in saved.items() if (name, value) not in RETIRED.items()}
    if different := _differences(saved, _plain(config)):
        raise ConfigError(
            f"{folder} holds a run with another configuration ({'; '.join(different)}); "
            "give another folder, or the settings of that run"
        )
    if state["model"] != fingerprint:
        raise MismatchError(
            f"{folder} holds a run of model {state['model']}, this is {fingerprint}; load that model, or give "
            "another folder"
        )
    return state


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as a checkpoint has them."""
    plain: dict[str, Any] = json.loads(json.dumps(flat(config), default=str))
    return plain


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A key that the run does not name came after it: by default it changes nothing. Sources have none."""
    nothing = "nothing"
    defaults = {key: value for key, value in _plain(TrainConfig()).items() if not key.startswith("data.")}
    keys = sorted(key for key in {*saved, *wanted} if key.split(".")[0] not in FREE)
    held = {key: saved.get(key, defaults.get(key, nothing)) for key in keys}
    return [
        f"{key}: it has {held[key]}, got {wanted.get(key, nothing)}"
        for key in keys
        if held[key] != wanted.get(key, nothing)
    ]


def append_log(folder: Path, report: dict[str, Any]) -> None:
    """One line more.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with (folder / LOG).open("a") as file:
            file.write(json.dumps(report) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {folder / LOG}: {error.strerror or error}; the last checkpoint is intact"
        ) from error


def prepare(folder: Path, step: int) -> None:
    """Make the folder if it is not there; drop the log's lines after ``step``, which are made again.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror or error}; give another folder") from error
    path = folder / LOG
    if path.exists():
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        write_atomically(path, "".join(kept).encode())


def last_report(folder: Path) -> dict[str, Any]:
    """The last line of the log, empty if there is none."""
    path = folder / LOG
    lines = _whole_lines(path) if path.exists() else ()
    return json.loads(lines[-1]) if lines else {}


def _whole_lines(path: Path) -> Sequence[str]:
    """A kill may leave half a line at the end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
