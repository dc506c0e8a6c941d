"""Writing a file so that it is there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import StorageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new one, never a part.

    Raises:
        StorageError: no space, no permission, no such folder.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; the old file, if any, is intact"
        ) from error
