"""Writing a file so that it is there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError

#: Mode of a new file that its owner alone may read.
PRIVATE = 0o600


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new one, never a part.

    A link stays, and what it points to is replaced. A file that is there keeps its mode, and its owner where this
    process may give files away.

    Args:
        path: where to.
        data: all of it.
        mode: of a new file, less what the umask takes away.

    Raises:
        StorageError: no space, no permission, no such folder, or something that is no file is there.
    """
    temporary = None
    try:
        path = Path(os.path.realpath(path))
        old = _replaceable(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            with suppress(OSError):
                os.chown(temporary, old.st_uid, old.st_gid)
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; the old file, if any, is intact"
        ) from error


def _replaceable(path: Path) -> os.stat_result | None:
    """What is there; an administrator may replace devices, too, and must not."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"cannot write {path}: there is a folder or a device; give the name of a file")
    return found
