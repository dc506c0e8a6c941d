"""``sqlite:///path/of/file``: one file, embedded; the default of a server."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from typing import Any

from filelock import FileLock

from ...errors import StorageError
from .base import Limits, Store, register
from .paths import path_of
from .sql import Run, SqlStore


@register("sqlite")
class SqliteStore(SqlStore):
    """Memories in an SQLite file, for one machine.

    Write-ahead log and ``synchronous=FULL``: a commit is on the disk when it returns. Any number of threads and
    processes may use the file (not over a network file system); writers take turns, readers do not wait. Open it
    after a process has forked, not before.
    """

    error = (
        sqlite3.Error,
        UnicodeDecodeError,
    )  # the second: a message about a damaged file that is damaged itself

    _file: os.stat_result  # as it was opened

    @classmethod
    def open(cls, url: str, limits: Limits | None, clock: Callable[[], float]) -> Store:
        path = path_of(url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # conversations: for the owner alone
            lock = FileLock(f"{path}.lock")  # SQLite does not wait for others while it turns on the log
            lock.acquire()
        except OSError as error:
            raise StorageError(f"cannot open {path} for writing: {error.strerror or error}") from error
        try:
            store = cls(str(path), limits, clock)
            store._file = os.stat(path)
            return store
        finally:
            lock.release()

    def check_health(self) -> None:
        super().check_health()
        try:
            there = os.path.samestat(os.stat(self.where), self._file)
        except OSError:
            there = False
        if not there:  # connections that are open write on into a file without a name
            raise StorageError(
                f"store {self.where} was deleted or replaced under way: what is written now is lost when the server "
                "ends; export what is needed, then start it again"
            )

    def _connect(self) -> Any:
        connection = sqlite3.connect(self.where, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            for setting in (
                "journal_mode=WAL",
                "synchronous=FULL",
                "trusted_schema=OFF",
                "cell_size_check=ON",
            ):
                connection.execute(f"PRAGMA {setting}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _begin(self, connection: Any, write: bool) -> None:
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")

    def _lock(self, run: Run, tenant: str) -> None:
        return  # BEGIN IMMEDIATE excludes all other writers

    def _has_schema(self, run: Run) -> bool:
        return bool(run("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'ccm_schema'"))
