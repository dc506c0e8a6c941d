"""Kinds of compressors: what a block of slots h(t) is made from.

All of them train the same LoRA on the same model, fold through the same rules and run by the same two ways, so
that they differ in the one thing that is compared.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What is compressed, and how.

    Attributes:
        copied: the parallel pass holds a second copy of the text to compress, beside the one that is read.
        recursive: what is compressed sees Mem(t-1).
        whole: all of c(1..t) is compressed at once, rather than c(t).
        pooled: slots are keys and values of the text itself, pooled over time; there are no COMP tokens.
        sequential: there is no parallel pass, one segment runs after another.
        rules: those that go with it; empty is any.
    """

    copied: bool = False
    recursive: bool = True
    whole: bool = False
    pooled: bool = False
    sequential: bool = False
    rules: tuple[str, ...] = ()


#: The first reads Mem(t-1) and c(t) (the paper's); the others are what it is compared with (``ccm.methods``).
KINDS: dict[str, Kind] = {
    "ccm": Kind(),
    "gisting-online": Kind(copied=True, recursive=False),
    "gisting": Kind(copied=True, recursive=False, whole=True, rules=("replace",)),
    "compressive": Kind(copied=True, pooled=True),
    "autocompressor": Kind(sequential=True, rules=("concat", "replace")),
}
