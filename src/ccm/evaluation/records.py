"""What was measured, on disk: one line of JSON an item, and the item in hand, so that a killed run loses little.

FOLDER/settings.json    what was asked; records under other settings are never mixed
FOLDER/records.jsonl    one line per (task, method, item), written and synced when it is finished
FOLDER/in-hand-KEY.pt   the state of a long item, saved every minute; gone when its record is there
FOLDER/.claim-KEY       locked while a process measures an item; the system lets go of it when the process dies
FOLDER.old              what was there before everything was measured anew

Any number of processes may share a folder: each claims an item before it measures it, and sees what others have done.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..core.memory import KV, Memory, Row
from ..errors import ConfigError, DataError, StorageError
from ..files.atomic import write_atomically
from ..methods import Run
from .protocol import State

log = logging.getLogger(__name__)

SETTINGS, RECORDS = "settings.json", "records.jsonl"
#: Seconds between two savings of the item in hand.
SAVE_EVERY = 60.0
#: Seconds that a process may take to add one line.
_LOCKED = 60.0
#: Settings that grow when more tasks or methods are asked for; their entries must not change.
_GROWING = ("tasks", "methods")
#: In a record: it comes from another folder.
TAKEN = "taken_over"

#: (task, method, item)
Key = tuple[str, str, str]


class Records:
    """The records of one evaluation in a folder, which other processes may fill as well.

    Args:
        folder: made if it is not there.
        settings: plain JSON of all that the numbers depend on.

    Raises:
        ConfigError: the folder holds records of other settings (every difference is named).
        DataError: its files are damaged.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self._done: dict[Key, dict[str, Any]] = {}
        self._read_bytes = self._read_lines = 0
        self._in_hand: tuple[Key, State] | None = None
        self._saved = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(_cannot_write(folder, error)) from error
        with self._locked():
            self.settings = self._agree(json.loads(json.dumps(settings)))
            self._read()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process reads or writes the files meanwhile."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=_LOCKED)
        except Timeout as error:
            raise StorageError(
                f"{lock.lock_file} is held by a process that does not let go of it; stop that process"
            ) from error
        except OSError as error:
            raise StorageError(_cannot_write(self.folder, error)) from error
        try:
            yield
        finally:
            lock.release()

    # ------------------------------------------------------------------ finished items

    def __len__(self) -> int:
        return len(self._done)

    def all(self) -> list[dict[str, Any]]:
        """Every record, in the order of writing."""
        return list(self._done.values())

    def get(self, key: Key) -> dict[str, Any] | None:
        """The record of an item, None before it is finished; as of the last :meth:`refresh`."""
        return self._done.get(key)

    def refresh(self) -> None:
        """Take in what other processes have finished and the tasks and methods that they have added."""
        path = self.folder / RECORDS
        if path.exists() and path.stat().st_size != self._read_bytes:
            with self._locked():
                self._read()

    @contextmanager
    def claim(self, key: Key) -> Iterator[bool]:
        """Keep other processes from an item while it is measured; False if one of them is at it."""
        lock = FileLock(self.folder / f".claim-{_short(key)}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise StorageError(_cannot_write(self.folder, error)) from error
        try:
            self.refresh()
            yield True
        finally:
            with suppress(OSError):  # some systems delete no open file
                Path(lock.lock_file).unlink()
            lock.release()

    def add(self, key: Key, measured: Mapping[str, Any]) -> None:
        """Append the record of a finished item; it is on the disk when this returns.

        Raises:
            StorageError: it cannot be written; what was there is intact.
        """
        with self._locked():
            self._read()
            self._append({key: {"task": key[0], "method": key[1], **measured}})
        self._in_hand = None

    def take_over(self, other: Path, wanted: Iterable[Key]) -> None:
        """Copy records of another folder that are not here yet, each marked :data:`TAKEN`.

        Only records of the very same settings are taken: model, versions, seed, and those of the task and the method.

        Args:
            other: the folder; nothing happens if it has no settings.
            wanted: keys of records.

        Raises:
            DataError: files of the other folder are damaged.
            StorageError: as :meth:`add`.
        """
        theirs = _known(other)
        ours = json.loads(json.dumps(self.settings))
        plain = [{k: v for k, v in settings.items() if k not in _GROWING} for settings in (theirs, ours)]
        if plain[0] != plain[1] or other.resolve() == self.folder.resolve():
            return
        same = {
            group: {name for name, value in ours[group].items() if theirs[group].get(name) == value}
            for group in _GROWING
        }
        found = _records(other / RECORDS)
        with self._locked():
            self._read()
            new: dict[Key, dict[str, Any]] = {}
            for key in wanted:
                of_size = key[1].partition("@")[2] or key[1]  # whose number of keys a window has
                fits = key[0] in same["tasks"] and {key[1], of_size} <= same["methods"]
                if fits and key in found and key not in self._done:
                    new[key] = {**found[key], TAKEN: True}
            self._append(new)

    def _append(self, new: Mapping[Key, Mapping[str, Any]]) -> None:
        """Write records at the end. The folder is locked."""
        path = self.folder / RECORDS
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new.values()).encode()
        try:
            with path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            for key in new:
                self._in_hand_file(key).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}; what was measured before is intact"
            ) from error
        self._read_bytes += len(lines)
        self._read_lines += len(new)
        self._done |= {key: dict(record) for key, record in new.items()}

    # ------------------------------------------------------------------ the item in hand

    def hold(self, key: Key, state: State) -> None:
        """Take note of the item in hand, and save it once a minute.

        Args:
            key: the item.
            state: where it is.
        """
        self._in_hand = key, state
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Save the item in hand, if there is one.

        Raises:
            StorageError: it cannot be written; the last save is intact.
        """
        self._saved = time.monotonic()
        if self._in_hand is None:
            return
        key, state = self._in_hand
        buffer = io.BytesIO()
        saved = {"key": list(key), "step": state.step, "measured": json.dumps(state.measured)}
        torch.save({**saved, "held": state.run.held}, buffer)
        write_atomically(self._in_hand_file(key), buffer.getvalue())

    def _in_hand_file(self, key: Key) -> Path:
        return self.folder / f"in-hand-{_short(key)}.pt"

    def held(self, key: Key, opened: Run) -> State | None:
        """The saved state of an item, as a run that goes on from there; None if there is none.

        Args:
            key: the item.
            opened: a new run of its method, which gives the model.
        """
        path = self._in_hand_file(key)
        if not path.exists():
            return None
        try:
            with torch.serialization.safe_globals([Memory, Row, KV]):
                saved = torch.load(path, weights_only=True, map_location=opened.reader.model.device)
            if tuple(saved["key"]) != key:
                return None
            run = opened.fork()
            run.held = saved["held"]
            return State(saved["step"], run, json.loads(saved["measured"]))
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read (%s): the item starts anew", path, type(error).__name__)
            return None

    # ------------------------------------------------------------------ opening

    def _agree(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Settings of the folder and of this run together; refused if they contradict each other."""
        known = _known(self.folder)
        if known and (different := list(_differences(known, wanted))):
            raise ConfigError(
                f"{self.folder} holds results of other settings ({'; '.join(different)}); give --out another "
                "folder, --fresh to put them aside, or the settings of that run"
            )
        merged = wanted | {name: {**known.get(name, {}), **wanted.get(name, {})} for name in _GROWING}
        if merged != known:
            text = json.dumps(merged, indent=1, ensure_ascii=False) + "\n"
            write_atomically(self.folder / SETTINGS, text.encode())
        return merged

    def _read(self) -> None:
        """Take in the lines that are new, and the settings they go with. The folder is locked: nobody is writing."""
        path = self.folder / RECORDS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        if whole < len(new):  # a kill may leave half a line
            os.truncate(path, self._read_bytes + whole)
        self._done |= _parsed(new[:whole], path, self._read_lines + 1)
        if whole:
            self._read_bytes += whole
            self._read_lines += new.count(b"\n")
            self.settings = _known(self.folder)


def put_aside(folder: Path) -> None:
    """Begin anew: what a folder holds is in ``FOLDER.old`` afterwards, in place of what was there.

    Raises:
        StorageError: it cannot be moved.
    """
    if not folder.exists():
        return
    old = folder.with_name(folder.name + ".old")
    try:
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    except OSError as error:
        raise StorageError(_cannot_write(folder, error)) from error


def _known(folder: Path) -> dict[str, Any]:
    """Settings of a folder; empty if it is new."""
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}); give --out another folder, or delete this one"
        ) from error


def _records(path: Path) -> dict[Key, dict[str, Any]]:
    """All whole lines of a file of records; none if it is not there."""
    content = path.read_bytes() if path.exists() else b""
    return _parsed(content[: content.rfind(b"\n") + 1], path, 1)


def _parsed(lines: bytes, path: Path, first: int) -> dict[Key, dict[str, Any]]:
    found = {}
    for number, line in enumerate(lines.splitlines(), first):
        try:
            record = json.loads(line)
            found[record["task"], record["method"], record["item"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is not a record ({error}); delete the line, and it is measured again"
            ) from error
    return found


def _short(key: Key) -> str:
    """A key as a part of a file's name."""
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]


def _cannot_write(folder: Path, error: OSError) -> str:
    return f"cannot write {folder}: {error.strerror or error}; give --out another folder"


def _differences(known: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Every setting that is another one, in words; a task or method that only one side has is none."""
    if not isinstance(known, dict) or not isinstance(wanted, dict):
        if known != wanted:
            yield f"{name}: it has {known}, got {wanted}"
        return
    for key in known | wanted:
        if (key in known and key in wanted) or name not in _GROWING:
            label = f"{name} {key}".strip()
            yield from _differences(known.get(key, "nothing"), wanted.get(key, "nothing"), label)
