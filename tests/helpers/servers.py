"""Real Redis and PostgreSQL servers on loopback, for as long as a test needs them.

A server whose programs are not on the machine skips the test with a message. Debian: ``apt-get install
redis-server postgresql`` (neither has to run as a service).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


class Server:
    """A process that listens on a loopback port; ``restart`` kills it as a crash would and starts it again."""

    def __init__(self, command: Sequence[str], port: int, log: Path, stop: signal.Signals):
        self.command, self.port, self.log, self.stop_signal = command, port, log, stop
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + 60
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"{self.command[0]} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def ready(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def crash(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.crash()
        self.start()

    def stop(self) -> None:
        self.process.send_signal(self.stop_signal)
        self.process.wait(60)


class RedisServer(Server):
    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class PostgresqlServer(Server):
    @property
    def url(self) -> str:
        return f"postgresql://ccm@127.0.0.1:{self.port}/postgres"

    def ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A Redis server that syncs every write, on a free port."""
    pytest.importorskip("redis", reason="the Python package redis is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        options = {
            "bind": "127.0.0.1",
            "dir": folder,
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
        }
        command = [program, "--port", str(port)]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        server = RedisServer(command, port, Path(folder) / "log", signal.SIGTERM)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def postgresql_server() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server with a superuser ``ccm`` and no password, on a free port."""
    pytest.importorskip("psycopg", reason="the Python package psycopg is not installed")
    programs = _postgresql_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server programs on this machine (Debian: apt-get install postgresql)")
    user = _other_user()
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        make = [f"{programs}/initdb", "-D", data, "-U", "ccm", "-A", "trust", "-E", "UTF8", "--no-sync"]
        done = subprocess.run([*_as(user), *make], capture_output=True, text=True, cwd="/")
        if done.returncode:
            pytest.fail(f"initdb failed:\n{done.stderr[-2000:]}")
        port = free_port()
        command = [f"{programs}/postgres", "-D", data, "-p", str(port), "-k", "", "-h", "127.0.0.1"]
        server = PostgresqlServer([*_as(user), *command], port, Path(folder) / "log", signal.SIGINT)
        try:
            yield server
        finally:
            server.stop()


def _postgresql_programs() -> Path | None:
    if found := shutil.which("postgres"):
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return versions[-1].parent if versions else None


def _other_user() -> str | None:
    """Who runs PostgreSQL, which refuses to run as root; None for oneself."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("PostgreSQL cannot run as root, and there is no user postgres or nobody")


def _as(user: str | None) -> list[str]:
    if user is None:
        return []
    return ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
