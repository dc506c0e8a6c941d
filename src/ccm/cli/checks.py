"""What this machine offers to the library, as a list of plain facts; the command ``ccm doctor`` shows it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.markers import Marker
from packaging.requirements import Requirement

from ccm.data import chitchat
from ccm.models import load as models
from ccm.models import packages
from ccm.models.placement import place

DISTRIBUTION = "compressed-context-memory"
_ADAPTERS = Path(__file__).parent.parent / "adapters"
#: Extras that are made of others.
_SUMS = {"all", "dev"}
_MIN_MEMORY, _MIN_DISK = 4e9, 1e9  # bytes: to train on the embedded model; to fetch and convert it


@dataclass(frozen=True)
class Check:
    """One fact: what was found, and how to mend it where ``ok`` is False (``fix`` is empty otherwise).

    A check that is not ``required`` concerns an optional feature or what is fetched on first use.
    """

    name: str
    ok: bool
    required: bool
    found: str
    fix: str


def checks() -> list[Check]:
    """Look at Python, packages, hardware, caches and shipped files; nothing is loaded or downloaded."""
    return [*_software(), *_hardware(), *_files()]


def _check(name: str, ok: bool, found: str, fix: str, required: bool = True) -> Check:
    return Check(name, ok, required, found, "" if ok else fix)


def _software() -> Iterator[Check]:
    try:
        declared = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield _check(DISTRIBUTION, False, "not installed (run from a source folder)", "pip install -e .")
        return
    wanted = declared["Requires-Python"]
    fits = Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True)
    yield _check("Python", fits, platform.python_version(), f"use Python {wanted}")
    needs = [Requirement(text) for text in declared.get_all("Requires-Dist") or []]
    for need in needs:
        if need.marker is None:
            found, fits = _installed(need)
            yield _check(need.name, fits, found, f"pip install '{need.name}{need.specifier}'")
    for extra in declared.get_all("Provides-Extra") or []:
        states = [
            (need.name, *_installed(need))
            for need in needs
            if need.name != DISTRIBUTION and _belongs(need.marker, extra)
        ]
        if states and extra not in _SUMS:
            missing = ", ".join(name for name, _, fits in states if not fits)
            found = f"missing: {missing}" if missing else ", ".join(f"{name} {v}" for name, v, _ in states)
            fix = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield _check(f"extra {extra}", all(fits for *_, fits in states), found, fix, required=False)


def _belongs(marker: Marker | None, extra: str) -> bool:
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _installed(need: Requirement) -> tuple[str, bool]:
    """Return the installed version of ``need`` (or words that say it is missing) and whether it fits."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return "missing", False
    fits = need.specifier.contains(version, prereleases=True)
    return (version if fits else f"{version} (expected {need.specifier})"), fits


def _hardware() -> Iterator[Check]:
    cores, threads = psutil.cpu_count() or 1, torch.get_num_threads()
    found = f"{threads} of {cores}"
    yield _check(
        "CPU threads", threads <= cores, found, f"set OMP_NUM_THREADS to {cores} or less", required=False
    )
    fast = models.bfloat16_units()
    found = (
        f"bfloat16 in hardware ({', '.join(fast)})" if fast else "no bfloat16 in hardware: float32 is faster"
    )
    yield _check("CPU bfloat16", True, found, "", required=False)
    yield _check("GPU", True, _gpu(), "", required=False)
    where = place()
    dtype = "the checkpoint's type" if where.dtype is None else str(where.dtype).removeprefix("torch.")
    yield _check("models run", True, f"on {where.device}, in {dtype}", "", required=False)
    memory = psutil.virtual_memory().available
    fix = f"close other programs: {_size(_MIN_MEMORY)} are enough for the embedded model"
    yield _check("free memory", memory >= _MIN_MEMORY, _size(memory), fix, required=False)


def _gpu() -> str:
    if torch.cuda.is_available():
        return ", ".join(
            f"{torch.cuda.get_device_name(index)}, {_size(torch.cuda.mem_get_info(index)[0])} free"
            for index in range(torch.cuda.device_count())
        )
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return "none: the CPU is used"


def _files() -> Iterator[Check]:
    cache = packages.cache_dir()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free, ready = shutil.disk_usage(existing).free, models.default_model_ready()
    may = os.access(existing, os.W_OK)
    found = f"{_size(free)} free for {cache}" if may else f"you may not write to {existing}, for {cache}"
    fix = f"free {_size(_MIN_DISK)}, or choose another folder with CCM_CACHE"
    fix = fix if may else "choose another folder with CCM_CACHE"
    yield _check("cache disk", ready or (may and free >= _MIN_DISK), found, fix)
    pip = packages.has_pip()
    later = "not yet: fetched on first use" if pip else "no, and pip is missing to fetch it"
    model = packages.locate(models.PACKAGE, models.VERSION, models.MEMBER) is not None
    for name, present, package, version in (
        ("embedded model", ready or model, models.PACKAGE, models.VERSION),
        ("conversation data", _chitchat(), chitchat.PACKAGE, chitchat.VERSION),
    ):
        fix = f"install pip, or the package {package}=={version} without its dependencies"
        yield _check(
            name, present or pip, "ready" if present else later, fix, required=name == "embedded model"
        )
    shipped = sorted(path.parent.name for path in _ADAPTERS.glob("*/ccm_config.json"))
    found = ", ".join(shipped) or "none"
    yield _check("shipped adapters", bool(shipped), found, f"install {DISTRIBUTION} again: files are missing")


def _chitchat() -> bool:
    return packages.locate(chitchat.PACKAGE, chitchat.VERSION, chitchat.MEMBER) is not None


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
