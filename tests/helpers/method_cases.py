"""Every registered method with options so small that a few short segments fill it, on tiny models."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tiny import scramble, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from ccm import get_method, list_methods
from ccm.core.compressor import CompressorConfig
from ccm.methods import Method
from ccm.methods.base import METHODS
from ccm.methods.bits.packed import Packed
from ccm.methods.compressed import Compressed, Trained
from ccm.methods.spec import parse

TOKENIZER = tiny_tokenizer()
EXAMPLE = Path(__file__).parents[2] / "examples" / "extending" / "low_norm.py"
#: Methods whose package is not installed here.
ABSENT = () if find_spec("kvpress") else ("kvpress",)
#: One name for each method.
NAMES = sorted({METHODS[name].name for name in list_methods()} - set(ABSENT))
_SMALL = dict(sink=2, window=6, tokens=8, slots=2, fitted=8, block=4, every=2, max_tokens=4)
#: Of the memory that another one packs.
_PACKED = {"slots": 2}
#: Memories of an adapter that are packed, as :func:`small_method` takes them.
PACKED = [f"packed of {name}" for name in ("ccm-concat", "slots-and-matching", "slots-and-words")]
#: Methods whose sizes are what they are.
_AS_THEY_ARE = ("none", "full", "ape")


@contextmanager
def elsewhere() -> Iterator[str]:
    """The method of docs/extending.md, registered as somebody else registers it, and gone afterwards."""
    names = [name for name in sys.modules if name.startswith("ccm_file_") and name.endswith("_low_norm")]
    for name in names:  # a file is run once, whoever took out what it registered
        del sys.modules[name]
    METHODS.pop("low-norm", None)
    method = parse(str(EXAMPLE)).method()
    try:
        yield method.name
    finally:
        METHODS.pop("low-norm")
        del sys.modules[type(method).__module__]


def model(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, vocab_size=len(TOKENIZER), max_position_embeddings=2048)


def tiny_adapters(folder: Path, family: str = "llama", names: Sequence[str] = ()) -> dict[str, str]:
    """Adapter folders for a tiny model, by the names of those methods that need one."""
    made = {}
    for name in names or list_methods():
        if issubclass(METHODS[name], Trained):
            made_by = METHODS[name].made_by
            kind = made_by.kind
            rule = "replace" if kind == "gisting" else "mean" if name == "ccm-merge" else "concat"
            config = CompressorConfig(slots=3, sink=0, rule=rule, kind=kind)
            scramble(made_by(model(family), config)).save_pretrained(folder / name)
            made[name] = str(folder / name)
    return made


def small_method(name: str, adapters: dict[str, str], **changes: Any) -> Method:
    """A method that is full after a few segments, unbound."""
    if name in PACKED:
        inner = small_method(of := name.removeprefix("packed of "), adapters)
        options = {
            n: value for n, default in inner.defaults().items() if (value := getattr(inner, n)) != default
        }
        return get_method("packed", of=of, options=options, **changes)
    kind = METHODS[name]
    options: dict[str, Any] = {"adapter": adapters[name]} if name in adapters else {}
    if name not in _AS_THEY_ARE and (name not in adapters or issubclass(kind, Compressed)):
        own = {field.name for field in fields(kind)}
        options |= {option: value for option, value in _SMALL.items() if option in own}
    if kind is Packed:
        options["options"] = _PACKED
    return get_method(name, **options | changes)
