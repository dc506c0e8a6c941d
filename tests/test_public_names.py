"""The public names: that they are there, and that each says what it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ccm

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_imported() -> None:
    assert sorted(ccm.__all__) == dir(ccm)
    for name in ccm.__all__:
        assert getattr(ccm, name) is not None, name


def modules() -> Iterator[ModuleType]:
    """All modules but those that need a package that is not here, such as vLLM."""
    for found in pkgutil.walk_packages(ccm.__path__, "ccm."):
        if found.name == "ccm.__main__":
            continue
        try:
            yield importlib.import_module(found.name)
        except ImportError as error:
            if (error.name or "").split(".")[0] == "ccm":
                raise


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Classes and functions that the module defines, and what the classes define, with their names."""
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", "") != module.__name__:
            continue
        if not (inspect.isclass(found) or inspect.isfunction(found)):
            continue
        yield f"{module.__name__}.{name}", found
        if inspect.isclass(found):
            for inner, member in vars(found).items():
                plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                if not inner.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
                    yield f"{module.__name__}.{name}.{inner}", getattr(found, inner)


def test_every_public_name_says_what_it_is() -> None:
    """What overrides a method may leave that to the base class; generated docstrings of dataclasses do not count."""
    bare = []
    for module in modules():
        if not module.__doc__:
            bare.append(module.__name__)
        for name, found in public(module):
            said = inspect.getdoc(found) or ""
            if inspect.isclass(found):
                said = found.__doc__ or ""
                said = "" if said.startswith(f"{found.__name__}(") else said
            if not said and getattr(found, "__name__", "") != "<lambda>":
                bare.append(name)
    assert bare == []


def test_what_takes_tensors_gives_their_shapes() -> None:
    """Every function of the reference with a tensor among its parameters or results names shapes in its docstring."""
    listed = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(listed) > 20
    bare = []
    for path in listed:
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        members = vars(found).items() if inspect.isclass(found) else ()
        for inner, member in [("", found), *members]:
            plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if inner.startswith("_") or not inspect.isfunction(plain):
                continue
            kinds = " ".join(map(str, plain.__annotations__.values()))
            said = " ".join(filter(None, (inspect.getdoc(getattr(found, inner, found)), found.__doc__)))
            if re.search(r"\b(Tensor|KV)\b", kinds) and not re.search(
                r"\(\.*,? ?[A-Za-z][A-Za-z, .|0-9+*-]*\)", said
            ):
                bare.append(f"{path}.{inner}")
    assert bare == []
