"""Wheel and sdist, built and tried in an empty environment; and a release, which is tagged and not uploaded.

python tools/package.py                    builds into dist, and checks
python tools/package.py --release 1.2.3    refuses a dirty tree; builds, checks and tags
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
#: Most megabytes of either file; the adapters are 45 of them.
MOST = 60

#: What must work where nothing but the wheel and its dependencies is installed.
TRIED = """
import importlib.resources as resources
import ccm

files = resources.files("ccm")
assert (files / "py.typed").is_file(), "py.typed is missing"
assert (files / "serving" / "page" / "index.html").is_file(), "the server's page is missing"
for name in ccm.shipped_adapters():
    assert (files / "adapters" / name / "ccm_config.json").is_file(), f"{name} is missing"
for name in ccm.__all__:
    getattr(ccm, name)
assert "snapkv" in ccm.list_methods()
print(f"ccm {ccm.__version__}: {len(ccm.shipped_adapters())} adapters, {len(ccm.list_methods())} methods")
"""


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--release", metavar="VERSION", help="tag the release when all checks hold")
    version = arguments.parse_args().release
    if version is not None and (reason := refusal(version)):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    build()
    check_contents()
    try_wheel()
    if version is not None:
        run("git", "tag", "--annotate", f"v{version}", "--message", f"Release {version}")
        print(f"tagged v{version}; to publish it: git push origin v{version}, then twine upload dist/*")
    return 0


def refusal(version: str) -> str:
    """Why this cannot be released; empty if it can."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        return f"got version {version!r}, expected one such as 1.2.3: make release VERSION=1.2.3"
    if dirty := run("git", "status", "--porcelain"):
        return f"{len(dirty.splitlines())} files differ from the last commit: commit or remove them first"
    if run("git", "tag", "--list", f"v{version}"):
        return f"v{version} is tagged already: take the next version"
    said = {
        "src/ccm/__init__.py": f'__version__ = "{version}"',
        "CITATION.cff": f"version: {version}",
        "docs/changelog.md": f"## {version} ({date.today():%Y-%m-%d})",
    }
    for name, line in said.items():
        if line not in (ROOT / name).read_text().splitlines():
            return f"{name} has no line {line!r}: write it, and commit"
    return ""


def build() -> None:
    """Wheel and sdist, from the sdist's own files as a registry's users would build them."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT))
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))


def check_contents() -> None:
    """Sizes, and that no file is there twice or by mistake."""
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    for path in (wheel, sdist):
        size = path.stat().st_size / 1e6
        print(f"{path.name}: {size:.1f} MB")
        if size > MOST:
            raise SystemExit(f"error: {path.name} has {size:.1f} MB, expected at most {MOST}")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        outside = [name for name in names if not re.match(r"(ccm|compressed_context_memory-[^/]*)/", name)]
        weights = [(f.CRC, f.file_size) for f in packed.infolist() if f.filename.endswith(".safetensors")]
    if outside:
        raise SystemExit(f"error: the wheel has files outside of ccm: {', '.join(outside[:5])}")
    if len(weights) != len(set(weights)):
        raise SystemExit(
            "error: the same adapter weights are in the wheel twice: let ccm_config.json name the other"
        )
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    if missing := {"src", "tests", "docs", "recipes", "README.md", "LICENSE"} - top:
        raise SystemExit(f"error: the sdist lacks {', '.join(sorted(missing))}")


def try_wheel() -> None:
    """Install the wheel into an empty environment, away from the sources, and use it."""
    (wheel,) = DIST.glob("*.whl")
    constraints = ROOT / "constraints.txt"
    torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        tools = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin")
        pip = (str(tools / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, torch)  # by itself, so that a CPU build is taken where there is one
        run(*pip, "--constraint", str(constraints), str(wheel))
        print(run(str(tools / "python"), "-I", "-c", TRIED, cwd=folder).strip())
        for command in (("--version",), ("--help",), ("chat", "--help"), ("doctor", "--json")):
            run(str(tools / "ccm"), *command, cwd=folder)


def run(*command: str, cwd: str | Path = ROOT) -> str:
    """What a program printed; ends this one, with what it said, if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
