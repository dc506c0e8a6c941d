"""Text that comes in pieces, wrapped at words as it is shown."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


class Flow:
    """Shows pieces of one answer. A word is shown once it is whole.

    Args:
        console: where to; other than a terminal gets the text as it is.
    """

    def __init__(self, console: Console):
        self.console = console
        self._width = console.width if console.is_terminal else 0
        self._column = 0
        self._word, self._blank, self._style = "", "", ""

    def add(self, piece: str, style: str = "") -> None:
        """Show a piece, in a style of rich."""
        if style != self._style:
            self._flush()
            self._style = style
        for part in _PARTS.findall(piece) if self._width else [piece]:
            if not self._width or part == "\n":
                self._flush()
                self._put(part)
                self._column = 0
            elif part.isspace():
                self._flush()
                self._blank += part
            else:
                self._word += part

    def end(self) -> None:
        """Show what was held back, and end the line."""
        self._flush()
        self._put("\n")

    def _flush(self) -> None:
        if not self._word:
            return
        length = cell_len(self._blank) + cell_len(self._word)
        if self._column and self._column + length > self._width:
            self._put("\n" + self._word)
            self._column = cell_len(self._word)
        else:
            self._put(self._blank + self._word)
            self._column += length
        self._word = self._blank = ""

    def _put(self, text: str) -> None:
        self.console.print(
            text, end="", style=self._style or None, markup=False, highlight=False, soft_wrap=True
        )
