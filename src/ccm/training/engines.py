"""One pass of student and teacher over a batch of rows: hidden states at the tokens that are scored.

:class:`Lean` runs packed rows through the written-out pass (``ccm.training.lean``), :class:`Padded` rows beside each
other through the model's own layers, for models and memories that the first does not know. Both give the same.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compressor import Compressor
from ..data.packed import ArrayRow
from ..reader import is_spread
from ..rules import Rule
from .intervals import BLOCK, Packed, pack, up
from .lean import TOLERANCE, LeanPass, Unfit
from .targets import NONE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """The scored tokens of a batch, row by row.

    Attributes:
        student: (N, d) last hidden states that foresee them, with the memory.
        teacher: (N, d) the same with the whole context; None where nobody asked.
        ids: (N,) the tokens.
        roles: (N,) on the host.
    """

    student: Tensor
    teacher: Tensor | None
    ids: Tensor
    roles: np.ndarray

    def of(self, role: int) -> Scored:
        """Those of one role."""
        where = np.flatnonzero(self.roles == role)
        if len(where) == len(self.roles):
            return self
        at = torch.from_numpy(where).to(self.ids.device, non_blocking=True)
        teacher = None if self.teacher is None else self.teacher[at]
        return Scored(self.student[at], teacher, self.ids[at], self.roles[where])


class Engine(ABC):
    """Runs batches for one compressor."""

    def __init__(self, compressor: Compressor):
        self.compressor = compressor

    @abstractmethod
    def run(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> Scored:
        """The scored tokens of a batch.

        Args:
            rows: with roles; a token that begins a segment is never scored.
            rule: of the memory; None is the compressor's own.
            teacher: whether to run the model with the whole context, too; it gets no gradient.
            sizes: slots, sink, window, if other than the configured ones.
        """


class Padded(Engine):
    """Rows beside each other, filled up to the longest."""

    def run(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> Scored:
        compressor = self.compressor
        with under(compressor, rule):
            layout = compressor.lay_out([_segments(row) for row in rows], **sizes)
            student = compressor.hidden(layout)
        taught = None
        if teacher:
            with torch.no_grad():
                taught = compressor.hidden(compressor.lay_out([[row.ids.tolist()] for row in rows]))
        row, text, column = [], [], []
        for r, (given, spans) in enumerate(zip(rows, layout.spans, strict=True)):
            at = np.flatnonzero(given.roles != NONE)
            segment = np.searchsorted(given.stops, at, side="right")
            starts = np.concatenate([[0], given.stops[:-1]])
            begin = np.array([span[0] for span in spans])
            row.append(np.full(len(at), r))
            text.append(at - 1)
            column.append(begin[segment] + at - starts[segment] - 1)
        r, t, c = (torch.from_numpy(np.concatenate(part)).to(student.device) for part in (row, text, column))
        ids = np.concatenate([given.ids[given.roles != NONE] for given in rows]).astype(np.int64)
        return Scored(
            student[r, c],
            None if taught is None else taught[r, t],
            torch.from_numpy(ids).to(student.device),
            np.concatenate([given.roles[given.roles != NONE] for given in rows]),
        )


class Lean(Engine):
    """Rows one behind the other. On an accelerator passes come in a few sizes, so that it meets each shape again.

    Args:
        compressor: whose model has the common shape.
        width: tokens of the batches to come; 0 gives each pass the size that it needs.
        fuse: compile what goes element by element.
        save_memory: keep no activations inside layers.

    Raises:
        Unfit: the model has another shape.
    """

    def __init__(self, compressor: Compressor, width: int = 0, fuse: bool = False, save_memory: bool = False):
        super().__init__(compressor)
        self.passes = LeanPass(compressor, fuse, save_memory)
        self.width = up(width)

    def run(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> Scored:
        compressor, passes = self.compressor, self.passes
        chosen = {name: compressor._size(name, sizes.get(name)) for name in ("slots", "sink", "window")}
        taken = self._pack(rows, rule or compressor.rule, **chosen)
        roles = np.concatenate([row.roles for row in rows])
        at = np.flatnonzero(roles != NONE)
        places = torch.from_numpy(at - 1).to(passes.device, non_blocking=True)
        student = passes.norm(passes.hidden(taken).index_select(0, places))
        taught = None
        if teacher:
            whole = self._pack(
                [ArrayRow(row.ids, row.roles, row.stops[-1:]) for row in rows],
                rule or compressor.rule,
                slots=1,
            )
            with torch.no_grad():
                taught = passes.norm(passes.hidden(whole).index_select(0, places))
        return Scored(student, taught, taken.ids.index_select(0, places + 1), roles[at])

    def _pack(self, rows: Sequence[ArrayRow], rule: Rule, **sizes: int) -> Packed:
        passes, width = self.passes, self.width
        tokens = sum(len(row.ids) for row in rows)
        comps = sum(len(row.stops) - 1 for row in rows) * sizes["slots"]
        if width and tokens <= width and width >= 32 * BLOCK:
            comps = next((part for part in (width // 16, width // 8, width // 4) if comps <= part), comps)
            sizes |= {"text": width, "comps": up(comps), "sinks": width // 32}
        taken = pack(rows, rule, near=passes.near, **sizes)
        self.compressor._check_length(int(taken.position.max()) + 1)
        self.compressor._check_ids(taken.ids)
        return taken.to(passes.device)


def make_engine(
    compressor: Compressor, width: int = 0, fuse: bool = False, save_memory: bool = False
) -> Engine:
    """The lean engine, if a trial pass shows that it gives the model's own numbers; else the other."""
    padded = Padded(compressor)
    if is_spread(compressor.model) or getattr(compressor.model, "is_quantized", False):
        return padded
    try:
        lean = Lean(compressor, width, fuse, save_memory)
        rows = [_trial(compressor, seed) for seed in range(2)]
        with torch.no_grad():
            expected, got = (engine.run(rows).student.float() for engine in (padded, Lean(compressor)))
        error = float((got - expected).norm() / expected.norm())
        if not error < TOLERANCE[compressor.model.dtype]:
            raise Unfit(f"a trial pass differs by {error:.1%}")
    except Unfit as reason:
        log.info("training runs the model's own layers, padded: %s", reason)
        return padded
    return lean


def _trial(compressor: Compressor, seed: int) -> ArrayRow:
    words = compressor.model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(seed).integers(words // 2, words, 40).astype(np.int32)
    return ArrayRow(ids, np.tile(np.uint8([0, 1, 1, 1]), 10), np.int32([12, 24, 40]))


def _segments(row: ArrayRow) -> list[list[int]]:
    return [part.tolist() for part in np.split(row.ids, row.stops[:-1])]


@contextmanager
def under(compressor: Compressor, rule: Rule | None) -> Iterator[None]:
    """Passes go by another rule for a while; None is the compressor's own."""
    own = compressor.rule
    compressor.rule = rule or own
    try:
        yield
    finally:
        compressor.rule = own
