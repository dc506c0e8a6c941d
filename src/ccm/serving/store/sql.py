"""What SQLite and PostgreSQL share: the schema and its migrations, the statements, a pool of connections."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ...errors import ConfigError, MemoryFileError, StorageError
from .base import (
    Info,
    Limits,
    Line,
    Record,
    Store,
    Usage,
    conflict,
    damaged,
    exists,
    joined,
    not_found,
    split,
)

#: Schema n is what the first n of these make. Only ever append; each is a list of statements.
MIGRATIONS: list[list[str]] = [
    [
        """CREATE TABLE ccm_sessions (
            tenant {text} NOT NULL, session {text} NOT NULL, version BIGINT NOT NULL,
            created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION,
            nbytes BIGINT NOT NULL, lines BIGINT NOT NULL, PRIMARY KEY (tenant, session))""",
        "CREATE INDEX ccm_expiring ON ccm_sessions (expires)",
        """CREATE TABLE ccm_versions (
            tenant {text} NOT NULL, session {text} NOT NULL, version BIGINT NOT NULL,
            created DOUBLE PRECISION NOT NULL, metadata {text} NOT NULL, payload {blob} NOT NULL,
            digest {text} NOT NULL, nbytes BIGINT NOT NULL, PRIMARY KEY (tenant, session, version))""",
        """CREATE TABLE ccm_transcripts (
            tenant {text} NOT NULL, session {text} NOT NULL, version BIGINT NOT NULL, place BIGINT NOT NULL,
            entry {text} NOT NULL, digest {text} NOT NULL, PRIMARY KEY (tenant, session, version, place))""",
    ],
    [
        # of a version that has a recipe the payload is empty, and its parts are these, kept once for all versions
        "ALTER TABLE ccm_versions ADD COLUMN recipe {text} NOT NULL DEFAULT ''",
        """CREATE TABLE ccm_parts (
            tenant {text} NOT NULL, session {text} NOT NULL, name {text} NOT NULL, part {blob} NOT NULL,
            PRIMARY KEY (tenant, session, name))""",
    ],
]

_TABLES = ("ccm_sessions", "ccm_versions", "ccm_transcripts", "ccm_parts")
_OF = "tenant = ? AND session = ?"
_ALIVE = "(expires IS NULL OR expires > ?)"
_SUM = "CAST(COALESCE(SUM(nbytes), 0) AS BIGINT)"
_RECORD = (int, float, str, bytes, str, str)
_LINE = (int, int, str, str)
_INFO_COLUMNS = "session, version, created, updated, expires, nbytes"
_INFO = (str, int, float, float, (float, type(None)), int)
#: Parts that one statement asks for.
_AT_ONCE = 500


class SqlStore(Store):
    """A store behind SQL. Subclasses say how to connect, how a transaction begins, and which errors there are."""

    text = "TEXT"
    blob = "BLOB"
    mark = "?"
    #: What the client raises.
    error: tuple[type[Exception], ...]

    def __init__(self, where: str, limits: Limits | None, clock: Callable[[], float]):
        super().__init__(limits, clock)
        self.where = where
        self._idle: list[Any] = []
        self._guard = threading.Lock()
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _connect(self) -> Any:
        """A new connection in autocommit mode."""

    @abstractmethod
    def _begin(self, connection: Any, write: bool) -> None:
        """Begin a transaction: a writer may exclude others, a reader sees one state throughout."""

    @abstractmethod
    def _lock(self, run: Run, tenant: str) -> None:
        """Exclude other writers of this tenant until the transaction ends."""

    @abstractmethod
    def _has_schema(self, run: Run) -> bool:
        """Whether the tables are there; excludes other migrations until the transaction ends."""

    # ------------------------------------------------------------------ transactions

    @contextmanager
    def _transaction(self, write: bool = True) -> Iterator[Run]:
        try:
            connection = self._ready(write)
            try:
                yield Run(connection, self.mark)
                connection.execute("COMMIT")
            except BaseException:
                self._abandon(connection)
                raise
            with self._guard:
                self._idle.append(connection)
        except self.error as error:
            reason = str(error).strip().split("\n")[0]
            raise StorageError(
                f"store {self.where}: {reason}; see to the store, then read the newest version and try again"
            ) from error

    def _ready(self, write: bool) -> Any:
        """A connection inside a new transaction: an idle one if the server has not dropped it meanwhile."""
        while True:
            with self._guard:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                break
            try:
                self._begin(connection, write)
                return connection
            except self.error:
                connection.close()
        connection = self._connect()
        try:
            self._begin(connection, write)
        except BaseException:
            connection.close()
            raise
        return connection

    def _abandon(self, connection: Any) -> None:
        try:
            connection.execute("ROLLBACK")
        except self.error:
            connection.close()
        else:
            with self._guard:
                self._idle.append(connection)

    def close(self) -> None:
        with self._guard:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # ------------------------------------------------------------------ schema

    def _migrate(self) -> None:
        with self._transaction() as run:
            rows = run("SELECT number FROM ccm_schema") if self._has_schema(run) else [(0,)]
            number = rows[0][0] if rows else None
            if not isinstance(number, int) or number < 0:
                raise MemoryFileError(f"store {self.where}: its schema number was damaged; restore a backup")
            if number > len(MIGRATIONS):
                raise ConfigError(
                    f"store {self.where} has schema {number}, this release knows up to {len(MIGRATIONS)}: "
                    "upgrade compressed-context-memory"
                )
            if number == len(MIGRATIONS):
                return
            if not number:
                run("CREATE TABLE ccm_schema (number BIGINT NOT NULL, checked DOUBLE PRECISION)")
                run("INSERT INTO ccm_schema (number) VALUES (0)")
            for migration in MIGRATIONS[number:]:
                for statement in migration:
                    run(statement.format(text=self.text, blob=self.blob))
            run("UPDATE ccm_schema SET number = ?", len(MIGRATIONS))

    def check_health(self) -> None:
        with self._transaction() as run:
            run("UPDATE ccm_schema SET checked = ?", self.clock())

    # ------------------------------------------------------------------ reading

    def _info(self, tenant: str, session: str, now: float) -> Info:
        with self._transaction(write=False) as run:
            return self._row(run, tenant, session, now)

    def _row(self, run: Run, tenant: str, session: str, now: float) -> Info:
        rows = run(f"SELECT {_INFO_COLUMNS} FROM ccm_sessions WHERE {_OF} AND {_ALIVE}", tenant, session, now)
        if not rows:
            raise not_found(session)
        return Info(*_typed(session, rows[0], _INFO))

    def _get(self, tenant: str, session: str, version: int | None, now: float) -> Record | None:
        which, values = ("", ()) if version is None else ("AND version = ?", (version,))
        with self._transaction(write=False) as run:
            newest = self._row(run, tenant, session, now).version
            rows = run(
                "SELECT version, created, metadata, payload, digest, recipe FROM ccm_versions "
                f"WHERE {_OF} {which} ORDER BY version DESC LIMIT 1",
                tenant,
                session,
                *values,
            )
            if version in (None, newest) and newest != (rows[0][0] if rows else 0):
                raise damaged(session, f"version {newest}")
            if not rows:
                return None
            *fields, recipe = _typed(session, rows[0], _RECORD)
            record = Record(*fields)
            if not recipe:
                return record
            parts = self._parts(run, tenant, session, split(recipe))
        if parts is None:
            raise damaged(session, f"version {record.version}")
        payload, cuts = joined(parts)
        return replace(record, payload=payload, cuts=cuts)

    @staticmethod
    def _parts(run: Run, tenant: str, session: str, names: list[str]) -> list[bytes] | None:
        """Parts by name; None if one is missing, or is no bytes."""
        found: dict[str, bytes] = {}
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            query = f"SELECT name, part FROM ccm_parts WHERE {_OF} AND name IN ({marks})"
            found.update((name, part) for name, part in run(query, tenant, session, *some))
        whole = all(isinstance(found.get(name), bytes) for name in names)
        return [found[name] for name in names] if whole else None

    def _label(self, tenant: str, session: str, version: int, now: float) -> str | None:
        with self._transaction(write=False) as run:
            rows = run(
                f"SELECT metadata FROM ccm_versions WHERE {_OF} AND version = ?", tenant, session, version
            )
        return rows[0][0] if rows and isinstance(rows[0][0], str) else None

    def _versions(self, tenant: str, session: str, now: float) -> list[int]:
        with self._transaction(write=False) as run:
            self._row(run, tenant, session, now)
            rows = run(f"SELECT version FROM ccm_versions WHERE {_OF}", tenant, session)
        return [_typed(session, row, (int,))[0] for row in rows]

    def _transcript(self, tenant: str, session: str, now: float) -> list[Line]:
        with self._transaction(write=False) as run:
            self._row(run, tenant, session, now)
            ((count,),) = run(f"SELECT lines FROM ccm_sessions WHERE {_OF}", tenant, session)
            rows = run(
                f"SELECT version, place, entry, digest FROM ccm_transcripts WHERE {_OF} ORDER BY version, place",
                tenant,
                session,
            )
        if len(rows) != count:
            raise damaged(session, "its transcript")
        return [Line(*_typed(session, row, _LINE)) for row in rows]

    def _sessions(self, tenant: str, after: str, limit: int, now: float) -> list[Info]:
        with self._transaction(write=False) as run:
            rows = run(
                f"SELECT {_INFO_COLUMNS} FROM ccm_sessions WHERE tenant = ? AND session > ? AND {_ALIVE} "
                "ORDER BY session LIMIT ?",
                tenant,
                after,
                now,
                limit,
            )
        return [Info(*_typed(str(row[0]), row, _INFO)) for row in rows]

    def _usage(self, tenant: str, now: float) -> Usage:
        with self._transaction(write=False) as run:
            return self._held(run, tenant, now)

    def _held(self, run: Run, tenant: str, now: float) -> Usage:
        query = f"SELECT COUNT(*), {_SUM} FROM ccm_sessions WHERE tenant = ? AND {_ALIVE}"
        return Usage(*run(query, tenant, now)[0])

    # ------------------------------------------------------------------ writing

    def _create(
        self, tenant: str, session: str, record: Record | None, lines: list[Line], now: float
    ) -> None:
        with self._transaction() as run:
            self._lock(run, tenant)
            there = run(f"SELECT version FROM ccm_sessions WHERE {_OF} AND {_ALIVE}", tenant, session, now)
            if there:
                raise exists(session, there[0][0])
            self._remove(run, tenant, session)  # an expired one
            run(
                f"INSERT INTO ccm_sessions (tenant, {_INFO_COLUMNS}, lines) VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                tenant,
                session,
                0,
                now,
                now,
                self._expires(now),
                0,
            )
            self._add(run, tenant, session, record, lines, [], now)

    def _commit(
        self, tenant: str, session: str, record: Record, lines: list[Line], drop: list[int], now: float
    ) -> None:
        with self._transaction() as run:
            self._lock(run, tenant)
            changed = run.change(
                "UPDATE ccm_sessions SET version = ?, updated = ?, expires = ? "
                f"WHERE {_OF} AND version = ? AND {_ALIVE}",
                record.version,
                now,
                self._expires(now),
                tenant,
                session,
                record.version - 1,
                now,
            )
            if not changed:
                raise conflict(session, self._row(run, tenant, session, now).version, record.version)
            self._add(run, tenant, session, record, lines, drop, now)

    def _add(
        self,
        run: Run,
        tenant: str,
        session: str,
        record: Record | None,
        lines: list[Line],
        drop: list[int],
        now: float,
    ) -> None:
        """Put what is new into a session, count, and check the limits; an error undoes the transaction."""
        if record is not None:
            pieces = record.parts
            parts, recipe = dict(pieces), "".join(name for name, _ in pieces)
            payload = b"" if parts else record.payload
            size = len(record.metadata) + len(recipe) + len(payload)
            run(
                "INSERT INTO ccm_versions "
                "(tenant, session, version, created, metadata, payload, recipe, digest, nbytes) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                tenant,
                session,
                record.version,
                record.created,
                record.metadata,
                payload,
                recipe,
                record.digest,
                size,
            )
            for line in lines:
                run(
                    "INSERT INTO ccm_transcripts (tenant, session, version, place, entry, digest) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    tenant,
                    session,
                    line.version,
                    line.place,
                    line.text,
                    line.digest,
                )
            rows = run(f"SELECT version, nbytes FROM ccm_versions WHERE {_OF}", tenant, session)
            there: dict[int, int] = {version: size for version, size in rows}
            old = self.limits.old(there, drop)
            for version in old:
                run(f"DELETE FROM ccm_versions WHERE {_OF} AND version = ?", tenant, session, version)
            more = size + sum(line.nbytes for line in lines) - sum(there[version] for version in old)
            more += self._share(run, tenant, session, parts)
            run(
                f"UPDATE ccm_sessions SET version = ?, nbytes = nbytes + ?, lines = lines + ? WHERE {_OF}",
                record.version,
                more,
                len(lines),
                tenant,
                session,
            )
        if self.limits.per_tenant:
            self.limits.check(self._held(run, tenant, now))

    @staticmethod
    def _share(run: Run, tenant: str, session: str, parts: dict[str, bytes]) -> int:
        """Add the parts that are not there, remove those that no version has any more; bytes that this adds."""
        rows = run(f"SELECT name, LENGTH(part) FROM ccm_parts WHERE {_OF}", tenant, session)
        there: dict[str, int] = {name: size for name, size in rows}
        if not there and not parts:
            return 0
        recipes = run(f"SELECT recipe FROM ccm_versions WHERE {_OF}", tenant, session)
        used = {name for (recipe,) in recipes for name in split(str(recipe))}
        new, gone = sorted(set(parts) - set(there)), sorted(set(there) - used)
        run.many(
            "INSERT INTO ccm_parts (tenant, session, name, part) VALUES (?, ?, ?, ?)",
            [(tenant, session, name, parts[name]) for name in new],
        )
        run.many(
            f"DELETE FROM ccm_parts WHERE {_OF} AND name = ?", [(tenant, session, name) for name in gone]
        )
        return sum(len(parts[name]) for name in new) - sum(there[name] for name in gone)

    def _delete(self, tenant: str, session: str, now: float) -> None:
        with self._transaction() as run:
            self._lock(run, tenant)
            if not run(f"SELECT 1 FROM ccm_sessions WHERE {_OF} AND {_ALIVE}", tenant, session, now):
                raise not_found(session)
            self._remove(run, tenant, session)

    def _purge(self, now: float) -> int:
        with self._transaction(write=False) as run:
            due = run("SELECT tenant, session FROM ccm_sessions WHERE expires <= ?", now)
        removed = 0
        for tenant, session in due:
            with self._transaction() as run:  # one by one, so that commits get in between
                self._lock(run, tenant)
                still = run(f"SELECT 1 FROM ccm_sessions WHERE {_OF} AND expires <= ?", tenant, session, now)
                if still:
                    self._remove(run, tenant, session)
                    removed += 1
        return removed

    def _remove(self, run: Run, tenant: str, session: str) -> None:
        for table in _TABLES:  # the session first: who waits for its row then finds nothing
            run(f"DELETE FROM {table} WHERE {_OF}", tenant, session)


class Run:
    """Runs statements inside one transaction, with the client's own mark for parameters."""

    def __init__(self, connection: Any, mark: str):
        self.connection, self.mark = connection, mark

    def change(self, statement: str, *values: Any) -> int:
        """Rows that the statement has changed."""
        count: int = self.connection.execute(statement.replace("?", self.mark), values).rowcount
        return count

    def many(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        """Run a statement for each of these values."""
        if rows:
            self.connection.cursor().executemany(statement.replace("?", self.mark), rows)

    def __call__(self, statement: str, *values: Any) -> list[Sequence[Any]]:
        """Rows that the statement returns, if it does."""
        cursor = self.connection.execute(statement.replace("?", self.mark), values)
        return cursor.fetchall() if cursor.description else []


def _typed(session: str, row: Sequence[Any], types: Sequence[Any]) -> Sequence[Any]:
    """The row, if damage has not changed the type of a value (SQLite keeps any type in any column)."""
    if not all(isinstance(value, kind) for value, kind in zip(row, types, strict=True)):
        raise damaged(session, "its row")
    return row
