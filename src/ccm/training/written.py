"""Student and teacher of an encoder-decoder: what is scored is written by its decoder.

A run of scored tokens is written in one go, and what stands before it in its segment is read by the encoder::

    segment      what is it? Label: blue .        roles of the data
    scored                          ^^^^
    encoder      what is it? Label:               over the memory of the segments before
    decoder                         blue

The teacher reads all of the row that stands before the run in one pass of the encoder. A row of one segment is read
like that by the student, too: full context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..core.compressor import Compressor
from ..core.rule import Rule
from ..core.segments import Layout
from ..encoder_decoder.carrier import EncoderDecoder
from ..errors import ConfigError
from .engines import Engine, Scored, under
from .packed import Array, ArrayRow
from .targets import NONE

#: Tokens that the encoder reads together, padding counted.
TOGETHER = 8192


@dataclass(frozen=True)
class Exchange:
    """One run of scored tokens.

    Attributes:
        row, segment: where it is.
        read: what the encoder reads before it: of its segment, and of the whole row.
        words: the tokens.
    """

    row: int
    segment: int
    read: list[int]
    whole: list[int]
    words: list[int]


@dataclass(frozen=True)
class Batch:
    """Exchanges, the rows in whose segments they are, and the roles of their words; no layout of single segments."""

    exchanges: list[Exchange]
    layout: Layout | None
    rule: Rule
    teacher: bool
    roles: Array


class Written(Engine):
    """Runs the model's own layers, rows beside each other."""

    def __init__(self, compressor: Compressor):
        super().__init__(compressor)
        if not isinstance(compressor, EncoderDecoder):
            raise ConfigError(
                f"got a compressor of {compressor.model.config.model_type}, expected an encoder-decoder"
            )
        self.reader: EncoderDecoder = compressor

    def prepare(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> Batch:
        compressor, rule = self.compressor, rule or self.compressor.rule
        found = [exchange for r, row in enumerate(rows) for exchange in exchanges(row, r)]
        layout = None
        if any(len(row.stops) > 1 for row in rows):
            # nobody sees the last segment but its own exchanges
            folded = [[part.tolist() for part in np.split(row.ids, row.stops[:-1])] for row in rows]
            with under(compressor, rule):
                layout = compressor.lay_out([[*row[:-1], row[-1][:1]] for row in folded], **sizes)
        roles = np.concatenate([row.roles[row.roles != NONE] for row in rows])
        return Batch(found, layout, rule, teacher, roles)

    def run(self, prepared: Batch) -> Scored:
        reader, device = self.reader, self.compressor.model.device
        ids = [word for exchange in prepared.exchanges for word in exchange.words]
        if not ids:
            none = torch.empty(0, reader.comp_embeddings.shape[1], device=device)
            return Scored(none, none, torch.empty(0, dtype=torch.long, device=device), prepared.roles)
        student = self._read(prepared, alone=False)
        taught = None
        if prepared.teacher:
            with torch.no_grad():
                taught = self._read(prepared, alone=True)
        return Scored(student, taught, torch.tensor(ids, device=device), prepared.roles)

    def _read(self, batch: Batch, alone: bool) -> Tensor:
        """(N, d) states that foresee the words, over memories, or over the whole row before them."""
        found, device = batch.exchanges, self.compressor.model.device
        histories = None
        if batch.layout is not None and not alone:
            rows, segments = (
                torch.tensor([getattr(e, name) for e in found], device=device) for name in ("row", "segment")
            )
            with under(self.compressor, batch.rule):
                histories = self.reader.histories(batch.layout, rows, segments)
        states = []
        for part in parts([len(e.whole if alone else e.read) for e in found]):
            read = [found[k].whole if alone else found[k].read for k in part]
            words = [found[k].words[:-1] for k in part]
            if histories is None:
                live = self.reader.live(self.reader.empty(len(part)))
                windows = torch.zeros(len(part), dtype=torch.long, device=device)
            else:
                live, windows = histories[0].select(part), histories[1][part]
            hidden = self.reader.written(live, windows, read, words)
            states += [hidden[n, : len(found[k].words)] for n, k in enumerate(part)]
        return torch.cat(states)


def exchanges(row: ArrayRow, number: int) -> list[Exchange]:
    """The runs of scored tokens of a row, in their order."""
    ids, scored = row.ids.tolist(), row.roles != NONE
    bounds = [0, *row.stops.tolist()]
    found = []
    for j, (start, stop) in enumerate(pairwise(bounds)):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], scored[start:stop], [0]]))) + start
        for a, b in edges.reshape(-1, 2).tolist():
            found.append(Exchange(number, j, ids[start:a], ids[:a], ids[a:b]))
    return found


def parts(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of neighbours that the encoder reads together."""
    found: list[list[int]] = []
    longest = 0
    for k, length in enumerate(lengths):
        if not found or max(longest, length) * (len(found[-1]) + 1) > TOGETHER:
            found.append([])
            longest = 0
        found[-1].append(k)
        longest = max(longest, length)
    return found
