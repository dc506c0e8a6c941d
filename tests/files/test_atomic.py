"""What stands in the place of a file that is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ccm.errors import StorageError
from ccm.files.atomic import PRIVATE, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link, file = tmp_path / "newest", tmp_path / "runs" / "1"
    link.symlink_to(file)  # to what is not there yet
    for content in (b"one", b"two"):
        write_atomically(link, content)
        assert link.is_symlink() and file.read_bytes() == content
    assert os.listdir(file.parent) == ["1"]


def test_what_is_no_file_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # a device would do as well, and could not be mended
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(StorageError, match="there is a folder or a device; give the name of a file"):
            write_atomically(place, b"x")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_modes_are_kept_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "report", b"x")
        write_atomically(tmp_path / "keys", b"x", PRIVATE)
    finally:
        os.umask(before)
    assert (mode(tmp_path / "report"), mode(tmp_path / "keys")) == (0o640, 0o600)
    (tmp_path / "keys").chmod(0o644)
    write_atomically(tmp_path / "keys", b"y", PRIVATE)
    assert mode(tmp_path / "keys") == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_stays_his(tmp_path: Path) -> None:
    """An administrator who adds a key does not lock the server's own user out."""
    file = tmp_path / "keys"
    file.write_bytes(b"x")
    os.chown(file, 65534, 65534)
    write_atomically(file, b"y", PRIVATE)
    assert (file.stat().st_uid, file.stat().st_gid, file.read_bytes()) == (65534, 65534, b"y")
