"""Files that travel in bundles: cut into pieces that are compressed one by one, and put together on arrival.

A bundle is a folder of pieces and a ``manifest.json``, the same in every bundle, that names the files, their pieces
in order, and the bundle that each piece is in. A piece is named by what it holds, so that what has arrived already
need not travel twice. A file whose name ends in ``.tar`` is unpacked into a folder of that name.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST, MADE = "manifest.json", "made.json"
#: Quantized weights repeat nothing: only how often a byte occurs can be used, and short pieces unpack in parallel.
WEIGHTS = {"chunk": 4 << 20, "filters": {"preset": 0, "lc": 0, "lp": 0, "pb": 0, "dict_size": 4096}}
OTHERS = {"chunk": 32 << 20, "filters": {"preset": 9 | lzma.PRESET_EXTREME}}


class BundleError(Exception):
    """A bundle that cannot be made or used; the message says what to do."""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive(files: Iterable[tuple[str, Path | bytes]]) -> bytes:
    """A tar file with the given names, the same bytes each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in sorted(files, key=lambda file: file[0]):
            content = content.read_bytes() if isinstance(content, Path) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def below(folder: Path, prefix: str = "") -> list[tuple[str, Path]]:
    """Every file of a folder and the name that it travels by."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [(prefix + path.relative_to(folder).as_posix(), path) for path in files]


def cut(content: bytes, how: dict) -> list[bytes]:
    """Compressed pieces, each of which can be unpacked by itself."""
    filters = [{"id": lzma.FILTER_LZMA2, **how["filters"]}]
    chunks = [content[at : at + how["chunk"]] for at in range(0, len(content), how["chunk"])]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda chunk: lzma.compress(chunk, filters=filters), chunks))


def write_bundles(
    files: dict[str, tuple[bytes, dict]], out: Path, scripts: list[Path], most: int
) -> list[Path]:
    """Spread files over few bundles; the first files are in the first bundle.

    Args:
        files: name -> content, and how it is cut. Files with large pieces come before those with small ones.
        out: folder of the bundles 1, 2, …; bundles that lie there are removed.
        scripts: files that every bundle has beside its pieces.
        most: bytes of a bundle.

    Raises:
        BundleError: ``out`` holds something else, or a piece is larger than a bundle.
    """
    if out.exists() and any(not (path / MANIFEST).exists() for path in out.iterdir()):
        raise BundleError(f"{out} holds something else than bundles: give another folder")
    pieces: dict[str, bytes] = {}
    manifest: dict[str, dict] = {"files": {}, "pieces": {}}
    for name, (content, how) in files.items():
        parts = {f"{digest(part)[:24]}.xz": part for part in cut(content, how)}
        manifest["files"][name] = {"bytes": len(content), "pieces": list(parts)}
        pieces |= parts
    room = most - sum(path.stat().st_size for path in scripts) - 300 * len(pieces) - 5_000  # the manifest
    bundles: list[int] = []  # bytes of each
    for name, piece in pieces.items():
        if len(piece) > room:
            raise BundleError(f"a piece of {len(piece):,} bytes does not fit a bundle of {room:,}")
        k = next((k for k, size in enumerate(bundles) if size + len(piece) <= room), len(bundles))
        bundles[k : k + 1] = [(bundles[k] if k < len(bundles) else 0) + len(piece)]
        manifest["pieces"][name] = {"bundle": k + 1, "bytes": len(piece), "sha256": digest(piece)}
    shutil.rmtree(out, ignore_errors=True)
    folders = [out / str(k + 1) for k in range(len(bundles))]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in scripts:
            shutil.copy(path, folder)
    for name, piece in pieces.items():
        (folders[manifest["pieces"][name]["bundle"] - 1] / name).write_bytes(piece)
    return folders


def receive(bundle: Path, root: Path) -> tuple[set[str], list[int]]:
    """Take in a bundle, and make every file below ``root`` whose pieces are all there.

    Returns the names of the files that were made anew or are gone, and the numbers of the bundles still missing.

    Raises:
        BundleError: it is damaged; nothing of it is used.
    """
    try:
        text = (bundle / MANIFEST).read_bytes()
        manifest = json.loads(text)
        files, pieces = manifest["files"], manifest["pieces"]
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{bundle} holds no readable {MANIFEST} ({error}): carry the whole bundle"
        ) from error
    stored = root / "pieces"
    stored.mkdir(parents=True, exist_ok=True)
    here = sorted(name for name in pieces if (bundle / name).exists())
    if not here:
        raise BundleError(
            f"{bundle} holds none of the pieces that its {MANIFEST} names: carry the whole bundle"
        )
    for name in here:
        content = (bundle / name).read_bytes()
        if digest(content) != pieces[name]["sha256"]:
            raise BundleError(
                f"{bundle / name} is damaged: got {len(content):,} bytes, digest {digest(content)[:12]}, expected "
                f"{pieces[name]['bytes']:,}, {pieces[name]['sha256'][:12]}; make the bundle again or carry it again"
            )
    for name in here:
        shutil.copyfile(bundle / name, stored / name)
    ledger = root / MADE
    made: dict[str, list[str]] = json.loads(ledger.read_text()) if ledger.exists() else {}
    changed = {name for name in made if made[name] != files.get(name, {}).get("pieces")}
    for name in changed:
        _remove(root, name)
        del made[name]
    missing = set()
    for name, entry in files.items():
        absent = [piece for piece in entry["pieces"] if not (stored / piece).exists()]
        missing |= {pieces[piece]["bundle"] for piece in absent}
        if not absent and name not in made:
            _make(root, name, entry, stored)
            made[name] = entry["pieces"]
            changed.add(name)
    ledger.write_text(json.dumps(made))
    return changed, sorted(missing)


def _make(root: Path, name: str, entry: dict, stored: Path) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        parts = threads.map(lambda piece: lzma.decompress((stored / piece).read_bytes()), entry["pieces"])
        content = b"".join(parts)
    if len(content) != entry["bytes"]:
        raise BundleError(
            f"{name}: got {len(content):,} bytes, expected {entry['bytes']:,}; make the bundles again"
        )
    if name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(root / name.removesuffix(".tar"), filter="data")
    else:
        (root / name).write_bytes(content)


def _remove(root: Path, name: str) -> None:
    path = root / name.removesuffix(".tar")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
