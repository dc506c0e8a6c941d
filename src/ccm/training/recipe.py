"""Recipes: a run as a YAML file, checked against :class:`TrainConfig`, with ``key=value`` overrides.

A recipe may say ``extends: other.yaml``, a recipe beside it: keys that it does not have are those of the other.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import TrainConfig


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a recipe describes.

    Args:
        path: a YAML file whose keys are those of :class:`TrainConfig`.
            ``extends`` names a recipe in the same folder whose keys count where this one has none.
        overrides: ``key=value``; nested keys by dots (``compressor.slots=8``), values in YAML.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value of the wrong type; it names file and key.
    """
    settings = _read(Path(path))
    for override in overrides:
        _set(settings, override)
    from .config import TrainConfig

    try:
        return _build(TrainConfig, settings, "")
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error


def _read(path: Path, inner: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe and of those that it extends; ``inner`` are the recipes that led here."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recipe {path}: {getattr(error, 'strerror', None) or error}; expected a YAML file"
        ) from error
    settings = _parse(text, str(path))
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(f"recipe {path}: got {_kind(settings)}, expected keys with values")
    if (other := settings.pop("extends", None)) is None:
        return settings
    seen = [each.name for each in (path, *inner)]
    if not isinstance(other, str) or Path(other).name != other or other in seen:
        raise ConfigError(
            f"recipe {path}: extends: got {other!r}, expected another recipe in the same folder"
        )
    return {**_read(path.with_name(other), (path, *inner)), **settings}


def dump(config: TrainConfig) -> str:
    """A configuration as YAML that :func:`load_recipe` reads back."""
    return yaml.safe_dump(
        _plain(dataclasses.asdict(config)), sort_keys=False, default_flow_style=None, width=100
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def _set(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {override!r}: expected key=value, such as steps=200 or compressor.slots=8"
        )
    *outer, last = key.split(".")
    for name in outer:
        inner = settings.get(name)
        if inner is None:
            inner = settings[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {name} is {_kind(inner)}, it has no keys inside")
        settings = inner
    settings[last] = _parse(text, f"override {override!r}")


def _build(cls: Any, settings: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping, every value checked against the type of its field."""
    hints = typing.get_type_hints(cls)
    for name in settings:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {prefix}{name}; did you mean {prefix}{near[0]}?")
    return cls(**{name: _convert(value, hints[name], prefix + name) for name, value in settings.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    for option in _options(hint):
        fits, made = _fit(value, option, key)
        if fits:
            return made
    raise ConfigError(f"{key}: got {_kind(value)}, expected {_expected(hint)}")


def _fit(value: Any, hint: Any, key: str) -> tuple[bool, Any]:
    origin = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict), _build(hint, value, f"{key}.") if isinstance(value, dict) else None
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False, None
        item = typing.get_args(hint)[0]
        return True, tuple(_convert(v, item, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            return False, None
        inner = typing.get_args(hint)[1]
        # `chitchat:` alone is a source without options
        empty: Any = {} if typing.get_origin(inner) is dict else None
        return True, {
            str(name): _convert(empty if part is None else part, inner, f"{key}.{name}")
            for name, part in value.items()
        }
    if hint is Any:
        return True, value
    if hint is float:
        return _number(value)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool)), value


def _number(value: Any) -> tuple[bool, Any]:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, None
    try:
        return True, float(value)
    except ValueError:
        return False, None


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _expected(hint: Any) -> str:
    def word(option: Any) -> str:
        origin = typing.get_origin(option) or option
        if origin is tuple:
            return f"a list of {_expected(typing.get_args(option)[0])} each"
        return "keys with values" if origin is dict or dataclasses.is_dataclass(option) else _WORDS[option]

    return " or ".join(word(option) for option in _options(hint))


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"keys {', '.join(map(str, value)) or '(none)'}"
    return f"{value!r}"
