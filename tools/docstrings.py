"""For the reference: docstrings as people read them in the source become docstrings as griffe reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: "slots, sink, window: other sizes", with the lines that belong to it.
_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Sphinx's roles become code, and an entry for several parameters becomes one for each."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            text = obj.docstring.value.replace("Example:\n", "Examples:\n")
            text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
            obj.docstring.value = _SEVERAL.sub(_apart, text.replace("``", "`"))


def _apart(entry: re.Match[str]) -> str:
    indent, names, said = entry.groups()
    return "\n".join(f"{indent}{name}: {said}" for name in names.split(", "))
