"""``dir:///path/of/folder``: plain safetensors files, to look at, copy and back up with ordinary tools."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...errors import ConfigError, MemoryFileError, StorageError
from ...files.atomic import PRIVATE, write_atomically
from .base import (
    Info,
    Limits,
    Line,
    Record,
    Store,
    Usage,
    conflict,
    damaged,
    digest_of,
    exists,
    name_of,
    not_found,
    register,
)
from .errors import NotFoundError
from .paths import path_of

log = logging.getLogger(__name__)

SCHEMA = 1
_ROOT, _LOCK, _SESSION, _TRANSCRIPT = "ccm-store.json", ".lock", "session.json", "transcript.jsonl"


@dataclass(frozen=True)
class Manifest:
    """``session.json``: what counts. Files and bytes that it does not name are leftovers of a crash."""

    tenant: str
    session: str
    version: int
    created: float
    updated: float
    expires: float | None
    records: list[dict[str, Any]]  # versions kept, oldest first: a Record with ``size`` for its payload
    transcript: int  # bytes
    lines_nbytes: int

    def info(self) -> Info:
        """What is told of the conversation."""
        held = self.lines_nbytes + sum(r["size"] + len(r["metadata"]) for r in self.records)
        return Info(self.session, self.version, self.created, self.updated, self.expires, held)


@register("dir")
class DirectoryStore(Store):
    """Memories in a folder: tenant / session / ``1.safetensors``, ``2.safetensors``, …, ``session.json``.

    Folders are named by digests of the ids. A commit writes the new files, syncs them, and then replaces
    ``session.json``, atomically. Operations of one tenant take turns (a lock file, which the system frees when a
    process dies). Listing and limits read one small file per session: for thousands of them use SQLite.
    """

    def __init__(self, root: Path, limits: Limits | None, clock: Callable[[], float]):
        super().__init__(limits, clock)
        self.root = root

    @classmethod
    def open(cls, url: str, limits: Limits | None, clock: Callable[[], float]) -> Store:
        store = cls(path_of(url), limits, clock)
        with store._errors():
            store.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # conversations: for the owner alone
            with FileLock(store.root / _LOCK):
                store._check_schema()
        return store

    def _check_schema(self) -> None:
        path = self.root / _ROOT
        if not path.exists():
            others = [p.name for p in self.root.iterdir() if not p.name.startswith(".")]
            if others:
                raise ConfigError(
                    f"{self.root} holds {others[0]!r} and is no store: expected an empty folder"
                )
            self._write(path, json.dumps({"schema": SCHEMA}).encode())
            return
        try:
            number = json.loads(path.read_bytes())["schema"]
        except (ValueError, KeyError, TypeError, RecursionError):
            number = None
        if not isinstance(number, int):
            raise MemoryFileError(f"{path} was damaged: restore it from a backup")
        if number > SCHEMA:
            raise ConfigError(
                f"store {self.root} has schema {number}, this release knows up to {SCHEMA}: "
                "upgrade compressed-context-memory"
            )

    def check_health(self) -> None:
        with self._errors():
            self._write(self.root / ".health", bytes(4096))  # a full disk still takes empty files

    # ------------------------------------------------------------------ files

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"store {self.root}: {error.strerror or error}; see to the disk, then try again"
            ) from error

    @contextmanager
    def _locked(self, tenant: str) -> Iterator[Path]:
        """The folder of a tenant, for one operation alone."""
        folder = self.root / name_of(tenant)
        with self._errors():
            folder.mkdir(mode=0o700, exist_ok=True)
            with FileLock(folder / _LOCK, poll_interval=0.005):
                yield folder

    def _write(self, path: Path, data: bytes) -> None:
        write_atomically(path, data, PRIVATE)
        _sync_folder(path.parent)  # the new name, too

    def _read(self, folder: Path, session: str, now: float) -> Manifest:
        """The manifest in a session's folder.

        Raises:
            NotFoundError: there is none, or it has expired.
            MemoryFileError: it was damaged.
        """
        try:
            data = (folder / _SESSION).read_bytes()
        except FileNotFoundError:
            raise not_found(session) from None
        digest, _, text = data.partition(b"\n")
        if digest_of(text) != digest.decode("ascii", "replace"):
            raise damaged(session, _SESSION)
        manifest = Manifest(**json.loads(text))
        if folder.name != name_of(manifest.session) or folder.parent.name != name_of(manifest.tenant):
            raise damaged(session, f"{_SESSION}, which belongs to another session,")
        if manifest.expires is not None and manifest.expires <= now:
            raise not_found(session)
        return manifest

    def _manifests(self, tenant: Path, now: float) -> list[Manifest]:
        """All readable ones of a tenant; a damaged one must not stop the others."""
        found = []
        for folder in tenant.iterdir():
            if (folder / _SESSION).exists():
                try:
                    found.append(self._read(folder, "", now))
                except NotFoundError:
                    continue
                except MemoryFileError:
                    log.warning("store: %s was damaged and is left out", folder / _SESSION)
        return found

    # ------------------------------------------------------------------ reading

    def _get(self, tenant: str, session: str, version: int | None, now: float) -> Record | None:
        with self._locked(tenant) as home:
            folder = home / name_of(session)
            manifest = self._read(folder, session, now)
            wanted = manifest.version if version is None else version
            for fields in manifest.records:
                if fields["version"] == wanted:
                    break
            else:
                return None
            path = folder / f"{wanted}.safetensors"
            try:
                payload = path.read_bytes() if path.stat().st_size == fields["size"] else None
            except FileNotFoundError:
                payload = None
        if payload is None:
            raise damaged(session, f"version {wanted}")
        return Record(wanted, fields["created"], fields["metadata"], payload, fields["digest"])

    def _label(self, tenant: str, session: str, version: int, now: float) -> str | None:
        with self._locked(tenant) as home:
            records = self._read(home / name_of(session), session, now).records
        return next((fields["metadata"] for fields in records if fields["version"] == version), None)

    def _versions(self, tenant: str, session: str, now: float) -> list[int]:
        with self._locked(tenant) as home:
            return [fields["version"] for fields in self._read(home / name_of(session), session, now).records]

    def _transcript(self, tenant: str, session: str, now: float) -> list[Line]:
        with self._locked(tenant) as home:
            folder = home / name_of(session)
            manifest = self._read(folder, session, now)
            if not manifest.transcript:
                return []
            try:
                with (folder / _TRANSCRIPT).open("rb") as file:
                    data = file.read(manifest.transcript)
            except FileNotFoundError:
                data = b""
        if len(data) != manifest.transcript:
            raise damaged(session, "its transcript")
        try:
            return [Line(**json.loads(line)) for line in data.splitlines()]
        except (ValueError, TypeError, RecursionError):
            raise damaged(session, "its transcript") from None

    def _info(self, tenant: str, session: str, now: float) -> Info:
        with self._locked(tenant) as home:
            return self._read(home / name_of(session), session, now).info()

    def _sessions(self, tenant: str, after: str, limit: int, now: float) -> list[Info]:
        with self._locked(tenant) as home:
            infos = [manifest.info() for manifest in self._manifests(home, now) if manifest.session > after]
        return sorted(infos, key=lambda info: info.session)[:limit]

    def _usage(self, tenant: str, now: float) -> Usage:
        with self._locked(tenant) as home:
            return self._held(home, now)

    def _held(self, home: Path, now: float) -> Usage:
        infos = [manifest.info() for manifest in self._manifests(home, now)]
        return Usage(len(infos), sum(info.nbytes for info in infos))

    # ------------------------------------------------------------------ writing

    def _create(
        self, tenant: str, session: str, record: Record | None, lines: list[Line], now: float
    ) -> None:
        with self._locked(tenant) as home:
            folder = home / name_of(session)
            with suppress(NotFoundError):
                raise exists(session, self._read(folder, session, now).version)
            empty = Manifest(tenant, session, 0, now, now, self._expires(now), [], 0, 0)
            manifest = self._next(empty, record, lines, [], now) if record else empty
            self._check_limits(home, 1, manifest.info().nbytes, now)
            shutil.rmtree(folder, ignore_errors=True)  # expired, or left by a crash
            folder.mkdir(mode=0o700)
            self._put(folder, empty, manifest, record, lines)
            _sync_folder(home)

    def _commit(
        self, tenant: str, session: str, record: Record, lines: list[Line], drop: list[int], now: float
    ) -> None:
        with self._locked(tenant) as home:
            folder = home / name_of(session)
            before = self._read(folder, session, now)
            if before.version != record.version - 1:
                raise conflict(session, before.version, record.version)
            after = self._next(before, record, lines, drop, now)
            self._check_limits(home, 0, after.info().nbytes - before.info().nbytes, now)
            self._put(folder, before, after, record, lines)

    def _next(
        self, before: Manifest, record: Record, lines: list[Line], drop: list[int], now: float
    ) -> Manifest:
        fields = {**asdict(record), "size": len(record.payload)}
        del fields["payload"], fields["cuts"]  # files are whole, to be read by other tools
        records = [*before.records, fields]
        old = self.limits.old((each["version"] for each in records), drop)
        return replace(
            before,
            version=record.version,
            updated=now,
            expires=self._expires(now),
            records=[each for each in records if each["version"] not in old],
            transcript=before.transcript + len(_text(lines)),
            lines_nbytes=before.lines_nbytes + sum(line.nbytes for line in lines),
        )

    def _check_limits(self, home: Path, sessions: int, nbytes: int, now: float) -> None:
        if self.limits.per_tenant:
            held = self._held(home, now)
            self.limits.check(Usage(held.sessions + sessions, held.nbytes + nbytes))

    def _put(
        self, folder: Path, before: Manifest, after: Manifest, record: Record | None, lines: list[Line]
    ) -> None:
        """Write what is new, then the manifest, which makes it count, then remove what no longer does."""
        if record:
            write_atomically(folder / f"{record.version}.safetensors", record.payload, PRIVATE)
        if lines:
            fd = os.open(folder / _TRANSCRIPT, os.O_RDWR | os.O_CREAT, PRIVATE)
            with os.fdopen(fd, "r+b") as file:
                file.truncate(before.transcript)
                file.seek(before.transcript)
                file.write(_text(lines))
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(folder)
        text = json.dumps(asdict(after)).encode()
        self._write(folder / _SESSION, digest_of(text).encode() + b"\n" + text)
        kept = {_SESSION, _TRANSCRIPT, *(f"{fields['version']}.safetensors" for fields in after.records)}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _delete(self, tenant: str, session: str, now: float) -> None:
        with self._locked(tenant) as home:
            folder = home / name_of(session)
            with suppress(MemoryFileError):  # it can be deleted all the same
                self._read(folder, session, now)
            _remove(folder)

    def _purge(self, now: float) -> int:
        removed = 0
        with self._errors():
            tenants = [path for path in self.root.iterdir() if path.is_dir()]
        for home in tenants:
            with self._errors(), FileLock(home / _LOCK, poll_interval=0.005):
                for folder in [path for path in home.iterdir() if path.is_dir()]:
                    try:
                        self._read(folder, "", now)
                    except NotFoundError:
                        removed += (folder / _SESSION).exists()
                        _remove(folder)
                    except MemoryFileError:
                        log.warning("store: %s was damaged and is left alone", folder / _SESSION)
        return removed


def _remove(folder: Path) -> None:
    """Remove a session; without its manifest the rest does not count."""
    (folder / _SESSION).unlink(missing_ok=True)
    _sync_folder(folder)
    shutil.rmtree(folder)


def _text(lines: list[Line]) -> bytes:
    return b"".join(json.dumps(asdict(line)).encode() + b"\n" for line in lines)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
