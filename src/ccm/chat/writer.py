"""From tokens to text, as an answer is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .answers import AnswerReader


class Writer:
    """The text of one answer as its tokens come in.

    Text is given out as soon as it is certain: whole characters, and nothing that may begin a stop text.

    Args:
        decode: the text of token ids.
        stop: texts that end the answer.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]):
        self.decode, self.stop = decode, stop
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._read = self._from = 0  # tokens whose text is in ``text``, and where decoding begins
        self._sent = 0
        self._begun = False

    def put(self, token: int) -> str:
        """New text that is certain; look at :attr:`stopped` afterwards."""
        self.ids.append(token)
        return self._advance(final=False)

    def end(self) -> str:
        """The text that was held back."""
        return "" if self.stopped else self._advance(final=True)

    def _advance(self, final: bool) -> str:
        # A token's text may depend on those before it (a space, bytes of a character): decode both from one place
        old = self.decode(self.ids[self._from : self._read])
        new = self.decode(self.ids[self._from :])
        if final or (len(new) > len(old) and not new.endswith("\ufffd")):
            self.text += new[len(old) :]
            self._from, self._read = self._read, len(self.ids)
        if not self._begun:  # an answer does not begin or end with blanks
            self.text = self.text.lstrip()
            self._begun = bool(self.text)
        ends = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self.text = self.text[: min(ends)]
        if final or self.stopped:
            self.text = self.text.rstrip()
        certain = len(self.text) if final or self.stopped else len(self.text) - self._doubtful()
        piece = self.text[self._sent : certain]
        self._sent = max(self._sent, certain)
        return piece

    def _doubtful(self) -> int:
        """How many characters at the end may belong to a stop text, or are blanks that an answer may end with."""
        begun = max(
            (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
        )
        return len(self.text) - len(self.text[: len(self.text) - begun].rstrip())


class Streamed:
    """An answer as ``generate`` writes it: a transformers streamer, and what stops it at a text."""

    def __init__(self, writer: Writer, reader: AnswerReader, ends: frozenset[int], streamer: Any):
        self.writer, self.reader, self.ends = writer, reader, ends
        self.also = streamer if hasattr(streamer, "put") else None
        self.emit: Callable[[str], None] | None = None if self.also else streamer
        self._prompt = True
        self.ended = False  # by the model itself

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate`` with the prompt, then with each new token."""
        if self.also:
            self.also.put(value)
        if self._prompt:  # generate() sends the prompt first
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self.add(token)

    def add(self, token: int) -> None:
        """Take in one token of the answer, and tell what text it completes."""
        if token not in self.ends and not self.writer.stopped:
            self._tell(self.writer.put(token))
        self.ended = self.ended or token in self.ends or self.writer.stopped

    def end(self) -> None:
        """Called by ``generate`` when the answer is complete: tell the rest."""
        if self.also:
            self.also.end()
        self._tell(self.writer.end())
        for piece in self.reader.end():
            self._emit(piece)

    def stops(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """For ``generate``: whether a text that ends a turn has been written."""
        return torch.full((len(ids),), self.writer.stopped, device=ids.device)

    def _tell(self, piece: str) -> None:
        for part in self.reader.feed(piece):
            self._emit(part)

    def _emit(self, piece: str) -> None:
        if self.emit:
            self.emit(piece)
