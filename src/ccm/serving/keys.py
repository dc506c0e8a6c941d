"""API keys: a file with one line for each, ``tenant:sha256 of the key``. The key itself is nowhere."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, StorageError
from ..files.atomic import PRIVATE, write_atomically

log = logging.getLogger(__name__)

_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LINE = re.compile(rf"({_TENANT.pattern}):([0-9a-f]{{64}})")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine and cannot mean another."""
    host = host.strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Keys:
    """Who may come in.

    Attributes:
        digests: (tenant, sha256 of a key); a tenant may have several.
    """

    digests: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file.

        Raises:
            ConfigError: it is missing, empty or damaged, or others than its owner can read it.
        """
        try:
            mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"API keys {path}: {error}; make one with: ccm key TENANT --api-keys {path}"
            ) from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"API keys {path}: others can read it; run: chmod 600 {path}")
        digests = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if not found:
                raise ConfigError(
                    f"API keys {path}, line {number}: expected tenant:sha256 in hexadecimal digits"
                )
            digests.append((found[1], found[2]))
        if not digests:
            raise ConfigError(
                f"API keys {path}: no key in it; make one with: ccm key TENANT --api-keys {path}"
            )
        return cls(tuple(digests))

    @staticmethod
    def add(path: Path, tenant: str) -> str:
        """Make a key for a tenant; returns it, for the only time.

        Raises:
            ConfigError: an impossible name, or a file that :meth:`read` refuses.
            StorageError: the file cannot be written.
        """
        if not _TENANT.fullmatch(tenant):
            raise ConfigError(f"tenant {tenant!r}: expected 1 to 64 letters, digits and ._-")
        if path.exists():
            Keys.read(path)
        key = f"ccm-{secrets.token_urlsafe(32)}"
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, f"{text}{tenant}:{_sha256(key)}\n".encode(), PRIVATE)
        except OSError as error:
            raise StorageError(f"API keys {path} cannot be written: {error}") from error
        return key

    def tenant(self, key: str) -> str | None:
        """Whose key this is; the time that it takes does not depend on the key."""
        digest, found = _sha256(key), None
        for tenant, known in self.digests:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


class KeyFile:
    """The keys of a file as it is now: a key that is added to it counts from the next request on, one that is taken
    out no longer.

    A file that becomes unusable lets nobody in until it is mended; the log says so once.

    Args:
        path: the file.

    Raises:
        ConfigError: as :meth:`Keys.read`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._seen = _stamp(path)
        self._keys = Keys.read(path)

    def tenant(self, key: str) -> str | None:
        """Whose key this is; the time that it takes does not depend on the key."""
        if (now := _stamp(self.path)) != self._seen:
            self._seen = now  # before it is read: what changes meanwhile is read again
            try:
                self._keys = Keys.read(self.path)
                log.info("API keys %s are read again: %d keys", self.path, len(self._keys.digests))
            except ConfigError as error:
                self._keys = Keys(())
                log.error("nobody is let in: %s", error)
        return self._keys.tenant(key)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes whenever a file is written; empty if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
