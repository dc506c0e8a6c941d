"""tools/package.py: what it refuses to release, and what it finds in a wheel."""

from __future__ import annotations

import importlib.util
import tarfile
import zipfile
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

import ccm

ROOT = Path(__file__).parents[1]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a project of a few files and a git that says what it is told."""
    spec = importlib.util.spec_from_file_location("package", ROOT / "tools" / "package.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in {
        "src/ccm/__init__.py": '__version__ = "1.2.3"\n',
        "CITATION.cff": "version: 1.2.3\n",
        "docs/changelog.md": f"## 1.2.3 ({date.today():%Y-%m-%d})\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    module.ROOT, module.DIST = tmp_path, tmp_path / "dist"
    module.git = {"status": "", "tag": ""}
    monkeypatch.setattr(module, "run", lambda *command, **_: module.git[command[1]])
    return module


def test_a_release_is_refused_with_the_reason(package: ModuleType) -> None:
    assert package.refusal("1.2.3") == ""
    assert "expected one such as 1.2.3" in package.refusal("1.2")
    assert "expected one such as 1.2.3" in package.refusal("")
    assert "src/ccm/__init__.py has no line" in package.refusal("1.2.4")
    package.git["tag"] = "v1.2.3"
    assert "is tagged already" in package.refusal("1.2.3")
    package.git["status"] = " M README.md"
    assert "1 files differ" in package.refusal("1.2.3")
    package.git = {"status": "", "tag": ""}
    (package.ROOT / "docs" / "changelog.md").write_text("## 1.2.3 (not released)\n")
    assert "docs/changelog.md has no line" in package.refusal("1.2.3")


def test_what_does_not_belong_into_a_wheel_is_found(package: ModuleType) -> None:
    def built(**files: str) -> None:
        package.DIST.mkdir(exist_ok=True)
        with zipfile.ZipFile(package.DIST / "x.whl", "w") as wheel:
            for name, text in files.items():
                wheel.writestr(name.replace("__", "/"), text)
        with tarfile.open(package.DIST / "x.tar.gz", "w:gz") as sdist:
            for name in ("src", "tests", "docs", "recipes", "README.md", "LICENSE"):
                sdist.addfile(tarfile.TarInfo(f"x/{name}"))

    built(**{"ccm__a.safetensors": "one", "ccm__b.safetensors": "two"})
    package.check_contents()
    built(**{"ccm__a.safetensors": "one", "ccm__b.safetensors": "one"})
    with pytest.raises(SystemExit, match="twice"):
        package.check_contents()
    built(**{"tests__a.py": "one"})
    with pytest.raises(SystemExit, match="outside of ccm"):
        package.check_contents()


def test_the_version_is_said_once_and_cited() -> None:
    assert f"version: {ccm.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text()
