"""What every store of memories has in common, and the registry.

A store keeps, for every tenant and session, a row of immutable versions 1, 2, ...; a commit is a
compare-and-swap on the newest one::

    store = open_store("sqlite:///var/lib/ccm/memories.db", Limits(ttl=30 * 86400, sessions=100))
    session = store.create("alice")                           # version 0: nothing in it yet
    store.commit("alice", session, 0, Snapshot(payload, {"fingerprint": …}), transcript=[turn])
    store.latest("alice", session).version                    # 1

To add a store, put one file into this folder: a subclass of :class:`Store` with :func:`register` that implements
the methods with an underscore. :class:`Store` has checked names and sizes before they are called, gives them
:class:`Record` and :class:`Line` to keep as they are, and compares digests on the way back.

Two versions of a memory have most of their entries in common. A store may keep equal parts of a session's payloads
once (:attr:`Record.parts`); payloads come back as they were given.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import TracebackType
from typing import Any, TypeVar

from ...errors import ConfigError, MemoryFileError
from .errors import ConflictError, NotFoundError, QuotaError

STORES: dict[str, type[Store]] = {}
#: Longest tenant or session id, in characters.
LONGEST_ID = 200
#: Length of a part's name.
PART = 32
_S = TypeVar("_S", bound="type[Store]")


@dataclass(frozen=True)
class Snapshot:
    """One version of a session's memory.

    Attributes:
        payload: the memory, as safetensors (``codec.encode``); the store does not look inside.
        metadata: JSON: fingerprint of model and adapter, counters, hash of the transcript so far, ...
        version: 1 for the first; set by the store.
        created: seconds since the epoch; set by the store.
        cuts: offsets into the payload, ascending; what lies between two of them is likely to be in other versions
            as well (``codec.cuts``).
    """

    payload: bytes
    metadata: Mapping[str, Any]
    version: int = 0
    created: float = 0.0
    cuts: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Info:
    """A session from outside.

    Attributes:
        session: its id.
        version: the newest version; 0 if there is none yet.
        created, updated: seconds since the epoch.
        expires: when it ends unless somebody commits before, None for never.
        nbytes: payloads and metadata of the versions kept, and transcript; equal parts count once where they are
            kept once.
    """

    session: str
    version: int
    created: float
    updated: float
    expires: float | None
    nbytes: int


@dataclass(frozen=True)
class Usage:
    """What a tenant holds."""

    sessions: int
    nbytes: int


@dataclass(frozen=True)
class Limits:
    """What is kept for how long, and what a tenant may hold. None: no limit.

    Attributes:
        keep: newest versions per session; older ones go when a new one comes.
        marks: how many steps further back some stay; see :meth:`marked`.
        ttl: seconds after its last commit at which a session ends.
        sessions: sessions per tenant.
        nbytes: bytes per tenant, counted as in :class:`Info`.
        commit: bytes of one commit.
    """

    keep: int = 4
    ttl: float | None = None
    sessions: int | None = None
    nbytes: int | None = None
    commit: int = 1 << 28
    marks: int = 0

    def __post_init__(self) -> None:
        for name in ("keep", "ttl", "sessions", "nbytes", "commit", "marks"):
            value, least = getattr(self, name), 1 if name == "keep" else 0
            if value is not None and not value >= least:
                raise ConfigError(f"limit {name}: got {value}, expected at least {least}")

    def check(self, usage: Usage) -> None:
        """Raises QuotaError if a tenant who would hold ``usage`` holds too much."""
        for name, value in (("sessions", usage.sessions), ("nbytes", usage.nbytes)):
            most = getattr(self, name)
            if most is not None and value > most:
                what = "bytes" if name == "nbytes" else name
                raise QuotaError(
                    f"this would make {value} {what}, the limit per tenant is {most}: delete sessions first"
                )

    def old(self, versions: Iterable[int], drop: Iterable[int] = ()) -> list[int]:
        """Those of a session's versions that go: ``drop``, and of the others all but the newest and the marked."""
        there = set(versions)
        alive = sorted(there - set(drop))
        return sorted(there - set(alive[-self.keep :]) - (set(alive) & set(self.marked(max(there)))))

    def marked(self, newest: int) -> list[int]:
        """Versions that stay beside the newest ``keep``, so that a conversation can go far back.

        Of the versions behind those, for steps of ``2 * keep``, ``4 * keep``, ... the last two multiples stay: at
        most ``marks + 1`` in all, at distances that double. What stays has stayed until then.
        """
        behind = newest - self.keep
        steps = [self.keep << i for i in range(1, self.marks + 1)]
        found = {(behind // step - back) * step for step in steps for back in (0, 1)}
        return sorted(version or 1 for version in found if version >= 0)  # the first one in place of none

    @property
    def per_tenant(self) -> bool:
        """Whether a tenant's usage matters at all."""
        return self.sessions is not None or self.nbytes is not None


@dataclass(frozen=True)
class Record:
    """A snapshot as stored: metadata as JSON text, and the digest over everything."""

    version: int
    created: float
    metadata: str
    payload: bytes
    digest: str
    cuts: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a store that keeps payloads whole."""
        return len(self.metadata) + len(self.payload)

    @property
    def parts(self) -> list[tuple[str, bytes]]:
        """The payload cut into parts, each with its name; equal parts have one name. Empty without cuts."""
        ends = [*self.cuts, len(self.payload)] if self.cuts else []
        parts = (self.payload[start:end] for start, end in zip([0, *ends], ends, strict=False))
        return [(hashlib.blake2b(part, digest_size=PART // 2).hexdigest(), part) for part in parts]


@dataclass(frozen=True)
class Line:
    """One entry of a transcript as stored: JSON text, the version it came with and its place there, the digest."""

    version: int
    place: int
    text: str
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a store."""
        return len(self.text)


class Store(ABC):
    """Memories of many tenants; safe with several threads and processes.

    Every operation happens as a whole or not at all, and is durable when it returns. Ids are opaque strings of
    1 to 200 printable characters; they are data, never parts of paths or of statements. A session that has expired
    is not there.

    Raises (every operation):
        ConfigError: an id, version, metadata or transcript that is not usable as given.
        NotFoundError: no such session of this tenant, whether another tenant has it or not.
        MemoryFileError: what is stored there was damaged.
        StorageError: the store cannot be reached or written; the last version is intact.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.time):
        self.limits = limits or Limits()
        self.clock = clock

    # ------------------------------------------------------------------ sessions

    def create(self, tenant: str, session: str | None = None) -> str:
        """Begin a session at version 0, without a snapshot.

        Args:
            tenant: whose.
            session: its id; None makes one up that cannot be guessed.

        Returns:
            the id.

        Raises:
            ConflictError: this tenant has a session of that id.
            QuotaError: the tenant has too many sessions.
        """
        return self._insert(tenant, session, None, [])

    def fork(self, tenant: str, session: str, new: str | None = None, version: int | None = None) -> str:
        """A new session of the same tenant that starts, at version 1, as a copy with its transcript.

        Args:
            tenant: whose.
            session: what is copied.
            new: id of the copy; None makes one up.
            version: which version; None for the newest. A session without any is copied as such.

        Returns:
            the id of the copy.

        Raises:
            NotFoundError: also if that version is not kept any more.
            ConflictError, QuotaError: as for :meth:`create`.
        """
        source = self.latest(tenant, session) if version is None else self.get(tenant, session, version)
        if source is None:
            return self.create(tenant, new)
        entries = self.transcript(tenant, session, source.version)
        return self._insert(tenant, new, source, entries)

    def delete(self, tenant: str, session: str) -> None:
        """Remove a session with all versions and its transcript, damaged or not."""
        _check_ids(tenant, session)
        self._delete(tenant, session, self.clock())

    def info(self, tenant: str, session: str) -> Info:
        """A session's newest version, times and size."""
        _check_ids(tenant, session)
        return self._info(tenant, session, self.clock())

    def sessions(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Info]:
        """One page of a tenant's sessions, ordered by id.

        Args:
            tenant: whose; one that has none gets an empty page.
            after: the last id of the page before.
            limit: most of them.
        """
        _check_ids(tenant, *([] if after is None else [after]))
        if not 1 <= limit <= 1000:
            raise ConfigError(f"page limit: got {limit}, expected 1 to 1000")
        return self._sessions(tenant, after or "", limit, self.clock())

    def labels(self, tenant: str, after: str | None = None, limit: int = 100) -> dict[str, dict[str, Any]]:
        """Metadata of the newest versions of the sessions on that page of :meth:`sessions`, by session.

        Memories are not read for it. What is damaged, or has no version, is left out; digests are not compared, as
        they cover the memories, so the metadata are there to be shown.
        """
        found: dict[str, dict[str, Any]] = {}
        for info in self.sessions(tenant, after, limit):
            with suppress(NotFoundError, ValueError, RecursionError):
                label = json.loads(self._label(tenant, info.session, info.version, self.clock()) or "null")
                if isinstance(label, dict):
                    found[info.session] = label
        return found

    def usage(self, tenant: str) -> Usage:
        """What a tenant holds, as limits count it."""
        _check_ids(tenant)
        return self._usage(tenant, self.clock())

    # ------------------------------------------------------------------ versions

    def latest(self, tenant: str, session: str) -> Snapshot | None:
        """The newest snapshot; None at version 0."""
        _check_ids(tenant, session)
        record = self._get(tenant, session, None, self.clock())
        return None if record is None else _open(tenant, session, record)

    def get(self, tenant: str, session: str, version: int) -> Snapshot:
        """One version.

        Raises:
            NotFoundError: also if this version is not there yet, or not kept any more.
        """
        _check_ids(tenant, session)
        record = self._get(tenant, session, _check_version(version), self.clock())
        if record is None:
            raise NotFoundError(f"session {session!r} has no version {version}, or does not keep it any more")
        return _open(tenant, session, record)

    def versions(self, tenant: str, session: str) -> dict[int, int]:
        """The versions that are kept, oldest first, each with how many transcript entries there were up to it."""
        _check_ids(tenant, session)
        now = self.clock()
        kept = self._versions(tenant, session, now)
        came = [line.version for line in self._transcript(tenant, session, now)]
        return {version: sum(n <= version for n in came) for version in sorted(kept)}

    def commit(
        self,
        tenant: str,
        session: str,
        expected: int,
        snapshot: Snapshot,
        transcript: Sequence[Any] = (),
        drop: Sequence[int] = (),
    ) -> Snapshot:
        """Put ``snapshot`` behind version ``expected``, if that is the newest (compare-and-swap).

        Args:
            tenant, session: where.
            expected: the version that the snapshot was made from; 0 for the first.
            snapshot: payload and metadata; version and time are set here.
            transcript: JSON values, such as turns, that are appended to the transcript in the same transaction.
            drop: versions that need not be kept any more, so that others are kept longer.

        Returns:
            the snapshot as stored, with its version and time.

        Raises:
            ConflictError: another version is the newest; its ``version`` says which.
            QuotaError: the tenant would hold too many bytes, or this commit is too large.
        """
        _check_ids(tenant, session)
        version = _check_version(expected, least=0) + 1
        record, lines = self._pack(tenant, session, version, snapshot, transcript)
        size = record.nbytes + sum(line.nbytes for line in lines)
        if size > self.limits.commit:
            raise QuotaError(f"this commit has {size} bytes, the limit is {self.limits.commit}")
        self._commit(tenant, session, record, lines, list(drop), record.created)
        return replace(snapshot, version=version, created=record.created)

    def transcript(self, tenant: str, session: str, version: int | None = None) -> list[Any]:
        """Entries that commits up to ``version`` (None: all) have appended, oldest first."""
        _check_ids(tenant, session)
        lines = self._transcript(tenant, session, self.clock())
        for line in lines:
            if line.digest != digest_of(tenant, session, line.version, line.place, line.text):
                raise damaged(session, "its transcript")
        return [json.loads(line.text) for line in lines if version is None or line.version <= version]

    # ------------------------------------------------------------------ the store as a whole

    def purge(self) -> int:
        """Remove the expired sessions of all tenants; returns how many. They are not there for readers before."""
        return self._purge(self.clock())

    @abstractmethod
    def check_health(self) -> None:
        """Write something and make it durable.

        Raises:
            StorageError: that is not possible.
        """

    def close(self) -> None:
        """Let go of files and connections."""
        return

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ what a kind of store implements

    @classmethod
    @abstractmethod
    def open(cls, url: str, limits: Limits | None, clock: Callable[[], float]) -> Store:
        """Open, and create or migrate if needed, what ``url`` names.

        Raises:
            ConfigError: a URL that this store cannot use, or one that a newer release has written.
            MissingPackageError: a client package is not installed.
            StorageError: not reachable, or not writable.
        """

    @abstractmethod
    def _create(
        self, tenant: str, session: str, record: Record | None, lines: list[Line], now: float
    ) -> None:
        """Insert a session, with a first version and transcript if given, unless one is there (ConflictError)."""

    @abstractmethod
    def _commit(
        self, tenant: str, session: str, record: Record, lines: list[Line], drop: list[int], now: float
    ) -> None:
        """Add ``record`` if ``record.version - 1`` is the newest (:func:`conflict`), remove :meth:`Limits.old`."""

    @abstractmethod
    def _get(self, tenant: str, session: str, version: int | None, now: float) -> Record | None:
        """A version, None for the newest; returns None if the session is there and that version is not."""

    @abstractmethod
    def _label(self, tenant: str, session: str, version: int, now: float) -> str | None:
        """Metadata of a version, without its payload; None if it is not there."""

    @abstractmethod
    def _versions(self, tenant: str, session: str, now: float) -> list[int]:
        """The versions that are kept, in any order."""

    @abstractmethod
    def _transcript(self, tenant: str, session: str, now: float) -> list[Line]: ...

    @abstractmethod
    def _info(self, tenant: str, session: str, now: float) -> Info: ...

    @abstractmethod
    def _sessions(self, tenant: str, after: str, limit: int, now: float) -> list[Info]: ...

    @abstractmethod
    def _usage(self, tenant: str, now: float) -> Usage: ...

    @abstractmethod
    def _delete(self, tenant: str, session: str, now: float) -> None: ...

    @abstractmethod
    def _purge(self, now: float) -> int: ...

    # ------------------------------------------------------------------ shared steps

    def _expires(self, now: float) -> float | None:
        return None if self.limits.ttl is None else now + self.limits.ttl

    def _insert(
        self, tenant: str, session: str | None, first: Snapshot | None, entries: Sequence[Any]
    ) -> str:
        session = secrets.token_urlsafe(24) if session is None else session
        _check_ids(tenant, session)
        record: Record | None = None
        lines: list[Line] = []
        if first is not None:
            record, lines = self._pack(tenant, session, 1, first, entries)
        self._create(tenant, session, record, lines, self.clock())
        return session

    def _pack(
        self, tenant: str, session: str, version: int, snapshot: Snapshot, entries: Sequence[Any]
    ) -> tuple[Record, list[Line]]:
        metadata = _to_json("metadata", dict(snapshot.metadata))
        texts = [_to_json("a transcript entry", entry) for entry in entries]
        now = float(self.clock())
        digest = digest_of(tenant, session, version, now, metadata, snapshot.payload)
        record = Record(version, now, metadata, snapshot.payload, digest, snapshot.cuts)
        return record, [
            Line(version, place, text, digest_of(tenant, session, version, place, text))
            for place, text in enumerate(texts)
        ]


def not_found(session: str) -> NotFoundError:
    """What is raised for an id that this tenant does not have, whoever else may."""
    return NotFoundError(f"no session {session!r}: it was never created, was deleted, or has expired")


def conflict(session: str, version: int, new: int) -> ConflictError:
    """What is raised when version ``new`` cannot follow ``version``."""
    return ConflictError(
        f"session {session!r} is at version {version}, expected {new - 1}: "
        "read the newest version and apply your change to that",
        version,
    )


def exists(session: str, version: int) -> ConflictError:
    """What is raised when a session is to be created that is there."""
    return ConflictError(
        f"there is a session {session!r} already, at version {version}: choose another id", version
    )


def damaged(session: str, what: str) -> MemoryFileError:
    """What is raised when stored bytes are not what was written."""
    return MemoryFileError(
        f"session {session!r}: {what} was damaged in the store; restore a backup or delete it"
    )


def register(scheme: str) -> Callable[[_S], _S]:
    """Class decorator: open this kind of store for URLs of ``scheme``."""

    def put(store: _S) -> _S:
        STORES[scheme] = store
        return store

    return put


def name_of(*ids: str) -> str:
    """A file or key name for ids: a digest, so that nothing of them gets into a path."""
    return digest_of(*ids)[:40]


def split(recipe: str) -> list[str]:
    """The names in a recipe: those of a payload's parts, one behind the other."""
    return [recipe[start : start + PART] for start in range(0, len(recipe), PART)]


def joined(parts: Sequence[bytes]) -> tuple[bytes, tuple[int, ...]]:
    """The payload of these parts, and its cuts."""
    return b"".join(parts), tuple(accumulate(map(len, parts[:-1])))


def _open(tenant: str, session: str, record: Record) -> Snapshot:
    expected = digest_of(tenant, session, record.version, record.created, record.metadata, record.payload)
    if record.digest != expected:
        raise damaged(session, f"version {record.version}")
    return Snapshot(record.payload, json.loads(record.metadata), record.version, record.created, record.cuts)


def digest_of(*parts: str | bytes | float) -> str:
    """SHA-256 over parts, each with its length, so that nothing moves from one to the next unseen."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def _to_json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not JSON: {error}") from error


def _check_ids(*ids: str) -> None:
    for name in ids:
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID or not name.isprintable():
            shown = f"{name[:20]!r}… ({len(name)})" if isinstance(name, str) else repr(name)
            raise ConfigError(f"id {shown}: expected 1 to {LONGEST_ID} printable characters")


def _check_version(version: int, least: int = 1) -> int:
    if isinstance(version, bool) or not isinstance(version, int) or not least <= version < 1 << 53:
        raise ConfigError(f"version: got {version!r}, expected a whole number of at least {least}")
    return version
