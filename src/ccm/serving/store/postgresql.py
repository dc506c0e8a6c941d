"""``postgresql://user:password@host:port/database``: a PostgreSQL server, for several machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import ConfigError, needing
from .base import Limits, Store, register
from .sql import Run, SqlStore

# Keys of advisory locks: the first number says whose they are.
_OURS, _MIGRATION = 0x63636D, 0


@register("postgresql")
class PostgresqlStore(SqlStore):
    """Memories in a PostgreSQL database; tables ``ccm_*`` in the first schema of the search path.

    A commit is as durable as the server makes it: leave its ``fsync`` and ``synchronous_commit`` on, which is
    their default. Commits of one tenant take turns (an advisory lock), those of others do not wait. One connection
    per thread that is inside an operation; after a restart of the server new ones are made.
    """

    text = 'TEXT COLLATE "C"'
    blob = "BYTEA"
    mark = "%s"

    @classmethod
    def open(cls, url: str, limits: Limits | None, clock: Callable[[], float]) -> Store:
        with needing("a store in PostgreSQL needs psycopg", "serve"):
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        try:
            parts = conninfo_to_dict(url)
        except psycopg.Error:  # its message may hold the password
            raise ConfigError(
                "store postgresql://…: expected postgresql://user:password@host/database"
            ) from None
        cls.error = (psycopg.Error,)
        where = f"postgresql://{parts.get('host', '')}:{parts.get('port', '')}/{parts.get('dbname', '')}"
        return cls(url, where, limits, clock)

    def __init__(self, url: str, where: str, limits: Limits | None, clock: Callable[[], float]):
        self.url = url
        super().__init__(where, limits, clock)

    def _connect(self) -> Any:
        import psycopg

        return psycopg.connect(self.url, autocommit=True, connect_timeout=10)

    def _begin(self, connection: Any, write: bool) -> None:
        connection.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED"
            if write
            else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        )

    def _lock(self, run: Run, tenant: str) -> None:
        run("SELECT pg_advisory_xact_lock(?, hashtext(?))", _OURS, "tenant " + tenant)

    def _has_schema(self, run: Run) -> bool:
        run("SELECT pg_advisory_xact_lock(?, ?)", _OURS, _MIGRATION)
        return bool(run("SELECT to_regclass('ccm_schema') IS NOT NULL")[0][0])
