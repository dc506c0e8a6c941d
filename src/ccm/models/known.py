"""Methods and their options as their files declare them, read without importing them: that would take seconds.

What is wrong here is wrong for certain. What is not found here is looked up properly when the method is opened.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from .. import hub
from ..errors import ConfigError, UnknownNameError, nearest

_HOUSE = Path(__file__).parent.parent
_METHODS, _ADAPTERS = _HOUSE / "methods", _HOUSE / "adapters"
#: Names that stand for something else.
_OTHERS = ("default",)
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
_SETTINGS = "ccm_config.json"


def written(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a memory as it is written: NAME or NAME:option=value,…

    Raises:
        ConfigError: it is not written so.
    """
    name, _, given = text.strip().partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, given.split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        *parents, last = key.split(".")
        try:
            place = options
            for part in parents:
                place = place.setdefault(part, {})
            twice = last in place
            place[last] = yaml.safe_load(value)
        except (TypeError, AttributeError, yaml.YAMLError):
            last, twice = "", False
        if twice:
            raise ConfigError(f"method {text!r}: got {key} twice, expected it once")
        if not last or not value:
            raise ConfigError(
                f"method {text!r}: got {pair!r}, expected option=value, such as ccm-concat:slots=2,window=64"
            )
    if not name.strip():
        raise ConfigError(f"method {text!r}: expected NAME or NAME:option=value")
    return name.strip(), options


def split_methods(text: str) -> list[str]:
    """Methods that stand one after another with commas between; a part ``key=value`` belongs to the one before."""
    found: list[str] = []
    for part in text.split(","):
        if found and "=" in part and ":" not in part.partition("=")[0]:
            found[-1] += "," + part
        elif part.strip():
            found.append(part.strip())
    return found


def check_all(text: str | None) -> str | None:
    """Methods that stand one after another, each of them NAME or NAME@OTHER; raises as :func:`check`."""
    for method in split_methods(text or ""):
        for part in method.split("@", 1):
            check(part)
    return text


def check(text: str | None) -> str | None:
    """A memory as it is written; raises what can be told by its text, the shipped files and the folders alone.

    Raises:
        UnknownNameError: no such method, and no such adapter.
        ConfigError: it is not written as expected, an unknown option, a value of another type, or no such file.
    """
    if text is None:
        return None
    name, options = written(text)
    path, _, _ = name.partition("#")
    if path.endswith(".py"):
        if not Path(path).expanduser().is_file():
            raise ConfigError(
                f"no file {path}: expected one in Python that registers a method (docs/extending.md)"
            )
        return text
    known, installed = declared(), {point.name for point in entry_points(group="ccm.methods")}
    if not known or name in installed or name in _OTHERS:
        return text
    if (of_kind := name if name in known else _kind(name, {*known, *installed})) in known:
        _check_options(name, options, known[of_kind])
    return text


def _kind(name: str, methods: set[str]) -> str:
    """The method of an adapter's kind; empty if that is not known here, as of one on the hub."""
    shipped = {path.parent.name for path in _ADAPTERS.glob(f"*/{_SETTINGS}")}
    folder = _ADAPTERS / name if name in shipped else Path(name)
    if "/" not in name and name not in shipped and not folder.is_dir():
        raise UnknownNameError("method or adapter", name, list(methods | shipped))
    if name not in shipped and not hub.is_folder(name, "adapter", _SETTINGS):
        return ""
    try:
        kind = json.loads((folder / _SETTINGS).read_text()).get("kind", "ccm")
    except (OSError, ValueError, AttributeError):
        return ""  # what is wrong with it is said where it is read
    return "ccm-concat" if kind == "ccm" else str(kind)


def _check_options(name: str, options: Mapping[str, Any], known: Mapping[str, str]) -> None:
    for option, value in options.items():
        if option not in known:
            guess = f"; did you mean {near}?" if (near := nearest(option, list(known))) else ""
            raise ConfigError(f"method {name}: unknown option {option}{guess} (options: {', '.join(known)})")
        kinds = [kind for kind in known[option].split(" | ") if kind != "None"]
        none = value is None and "None" in known[option]
        if not none and all(kind in _WORDS for kind in kinds) and not any(_is(value, k) for k in kinds):
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise ConfigError(f"method {name}: {option} is {value!r}, expected {words}")


def _is(value: Any, kind: str) -> bool:
    if kind == "float":
        return type(value) in (int, float)
    return type(value).__name__ == kind


@cache
def declared() -> dict[str, dict[str, str]]:
    """Every name of a method of this library -> its options and their types as they are written."""
    classes: dict[str, ast.ClassDef] = {}
    for path in _METHODS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, dict[str, str]] = {}
    for node in classes.values():
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register":
                options = _options(node, classes)
                found |= {str(ast.literal_eval(name)): options for name in decorator.args}
    return found


def _options(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> dict[str, str]:
    """Fields of a dataclass and of those that it is made of."""
    options: dict[str, str] = {}
    for base in node.bases:
        if (name := ast.unparse(base).rpartition(".")[2]) in classes:
            options |= _options(classes[name], classes)
    for entry in node.body:
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            kind, default = ast.unparse(entry.annotation), ast.unparse(entry.value) if entry.value else ""
            if not kind.startswith("ClassVar") and "init=False" not in default:
                options[entry.target.id] = (
                    f"{kind} | None" if default == "None" and "None" not in kind else kind
                )
    return options
