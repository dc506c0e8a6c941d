"""How a memory is written, on the command line and in Python, and what it is looked up in.

    NAME                          a method, or an adapter: a shipped name, a folder or a hub id
    NAME:option=value,…           with options, such as snapkv:tokens=256,sink=4
    ./mine.py, ./mine.py#NAME     a method of a file of your own; NAME if it registers several

Methods of installed packages are found by the entry points of the group "ccm.methods", by their names there.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import CCMError, ConfigError, UnknownNameError, nearest
from ..files import adapter_folder
from ..models.known import written
from .base import METHODS, Method

GROUP = "ccm.methods"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Spec:
    """A memory as it is written.

    Attributes:
        text: the whole of it.
        name: of a method, an adapter or a file.
        options: of the method.
    """

    text: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def method(self) -> Method:
        """The method with its options, on no model yet; an adapter's is the one of its kind.

        Raises:
            UnknownNameError: neither a method nor an adapter.
            ConfigError: an option that it does not have, a value that it cannot use, or a file that has no method.
        """
        if is_file(self.name):
            return _made(self.name, _of_file(self.name), self.options)
        if self.name in list_methods():
            return get_method(self.name, **self.options)
        if not _is_adapter(self.name):
            known = {*list_methods(), *adapter_folder.shipped_adapters()}
            raise UnknownNameError("method or adapter", self.name, list(known))
        if "adapter" in self.options:
            raise ConfigError(
                f"method {self.text!r}: got two adapters, expected one: leave adapter={self.options['adapter']} out"
            )
        kind = adapter_folder.read_config(self.name).kind
        chosen = METHODS["ccm-concat" if kind == "ccm" else kind]
        return _made(self.name, chosen, {"adapter": self.name, **self.options})


def parse(text: str) -> Spec:
    """Read a memory as it is written; its name is not looked up yet.

    Raises:
        ConfigError: it is not NAME or NAME:option=value,…
    """
    name, options = written(text)
    return Spec(text.strip(), name, options)


# ---------------------------------------------------------------------- look up


def list_methods() -> list[str]:
    """Names that :func:`get_method` knows, aliases and those of installed packages included."""
    return sorted({*METHODS, *_installed()})


def get_method(name: str, **options: Any) -> Method:
    """The method registered under ``name``, with options.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an option that the method does not have, or a value that it cannot use.
    """
    return _made(name, method_class(name), options)


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``; that of an installed package is imported.

    Raises:
        UnknownNameError: no such method.
        ConfigError: the package cannot be imported.
    """
    if name not in METHODS and (point := _installed().get(name)):
        _import(point)
    if name not in METHODS:
        raise UnknownNameError("method", name, list_methods())
    return METHODS[name]


def _made(name: str, method: type[Method], options: Mapping[str, Any]) -> Method:
    known = [entry.name for entry in fields(method) if entry.init]
    for option, value in options.items():
        if option not in known:
            guess = f"; did you mean {near}?" if (near := nearest(option, known)) else ""
            raise ConfigError(f"method {name}: unknown option {option}{guess} (options: {', '.join(known)})")
        _check_type(name, method, option, value)
    return method(**options)


def _check_type(name: str, method: type[Method], option: str, value: Any) -> None:
    """Raises ConfigError for a value of another type than the option's; None may stand for a default of None."""
    hint = get_type_hints(method)[option]
    if value is None and getattr(method, option, ...) is None:
        return
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(choice) or choice for choice in choices]
    if any(kind is Any or _is(value, kind) for kind in kinds):
        return
    words = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds if kind is not type(None))
    raise ConfigError(f"method {name}: {option} is {value!r}, expected {words}")


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is int if kind is int else isinstance(value, kind)


def _is_adapter(name: str) -> bool:
    """Whether the name is that of a shipped adapter, a folder with one, or looks like a hub id."""
    folder = Path(name) / "ccm_config.json"
    return name in adapter_folder.shipped_adapters() or folder.is_file() or "/" in name


# ---------------------------------------------------------------------- methods from elsewhere


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _import(point: EntryPoint) -> None:
    """Import the module of an entry point, which registers its methods."""
    try:
        point.load()
    except (Exception, SystemExit) as error:  # whatever a package of somebody else raises
        raise ConfigError(
            f"method {point.name} of the installed package {point.dist.name if point.dist else point.value} cannot "
            f"be imported ({type(error).__name__}: {error}): update that package, or remove it"
        ) from error


def is_file(name: str) -> bool:
    """Whether a name is that of a Python file, which is run to find its method."""
    return name.partition("#")[0].endswith(".py")


def _of_file(name: str) -> type[Method]:
    """The method that a file registers; FILE#NAME is one of several."""
    path, _, wanted = name.partition("#")
    module = _loaded(Path(path))
    found = {known: method for known, method in METHODS.items() if method.__module__ == module}
    if wanted and wanted not in found:
        raise UnknownNameError(f"method of {path}", wanted, list(found))
    chosen = {found[wanted]} if wanted else set(found.values())
    if not chosen:
        raise ConfigError(f'{path} has no method: put @register("name") above its class (docs/extending.md)')
    if len(chosen) > 1:
        raise ConfigError(
            f"{path} has several methods: name one of them, {path}#{' or #'.join(sorted(found))}"
        )
    return chosen.pop()


def _loaded(path: Path) -> str:
    """The name of the module that a file is, imported once."""
    file = path.expanduser().resolve()
    name = f"ccm_file_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    if name in sys.modules:
        return name
    if not file.is_file():
        raise ConfigError(
            f"no file {path}: expected one in Python that registers a method (docs/extending.md)"
        )
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # where dataclasses look names up
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever code of somebody else raises
        del sys.modules[name]
        for known in [known for known, method in METHODS.items() if method.__module__ == name]:
            del METHODS[known]
        if isinstance(error, CCMError):
            raise
        raise ConfigError(f"{path} cannot be imported ({type(error).__name__}: {error}): mend it") from error
    return name
