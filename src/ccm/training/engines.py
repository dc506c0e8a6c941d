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

from ..core.compressor import Compressor
from ..core.devices import is_spread
from ..core.rule import Rule
from ..core.segments import Layout
from .intervals import BLOCK, Packed, moved, pack, up
from .lean import TOLERANCE, LeanPass, Unfit
from .packed import ArrayRow
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
    """Runs batches for one compressor. What the host does for a batch may be done while the device is at another."""

    def __init__(self, compressor: Compressor):
        self.compressor = compressor

    @abstractmethod
    def prepare(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> Any:
        """A batch, laid out for :meth:`run`.

        Args:
            rows: with roles; a token that begins a segment is never scored.
            rule: of the memory; None is the compressor's own.
            teacher: whether the model runs with the whole context, too; that gets no gradient.
            sizes: slots, sink, window, if other than the configured ones.

        Raises:
            ConfigError: sizes that cannot be, an empty segment, or a row longer than the model's context.
        """

    @abstractmethod
    def run(self, prepared: Any) -> Scored:
        """The scored tokens of a batch."""


@dataclass(frozen=True)
class _Beside:
    """A batch of rows beside each other: layouts of both passes, and where in them the scored tokens are foreseen."""

    layout: Layout
    rule: Rule
    whole: Layout | None
    row: np.ndarray
    column: np.ndarray
    text: np.ndarray
    ids: np.ndarray
    roles: np.ndarray


class Padded(Engine):
    """Rows beside each other, filled up to the longest."""

    def prepare(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> _Beside:
        compressor, rule = self.compressor, rule or self.compressor.rule
        with under(compressor, rule):
            layout = compressor.lay_out([_segments(row) for row in rows], **sizes)
        whole = compressor.lay_out([[row.ids.tolist()] for row in rows]) if teacher else None
        at = [np.flatnonzero(row.roles != NONE) for row in rows]
        column = []
        for row, spans, where in zip(rows, layout.spans, at, strict=True):
            segment = np.searchsorted(row.stops, where, side="right")
            moved = np.array([start for start, _ in spans]) - np.concatenate([[0], row.stops[:-1]])
            column.append(where + moved[segment] - 1)
        return _Beside(
            layout,
            rule,
            whole,
            np.repeat(np.arange(len(rows)), [len(where) for where in at]),
            np.concatenate(column),
            np.concatenate(at) - 1,
            np.concatenate([row.ids[where] for row, where in zip(rows, at, strict=True)]),
            np.concatenate([row.roles[where] for row, where in zip(rows, at, strict=True)]),
        )

    def run(self, prepared: _Beside) -> Scored:
        compressor = self.compressor
        with under(compressor, prepared.rule):
            student = compressor.hidden(prepared.layout)
        row, column, text, ids = (
            torch.from_numpy(part.astype(np.int64)).to(student.device)
            for part in (prepared.row, prepared.column, prepared.text, prepared.ids)
        )
        taught = None
        if prepared.whole is not None:
            with torch.no_grad():
                taught = compressor.hidden(prepared.whole)[row, text]
        return Scored(student[row, column], taught, ids, prepared.roles)


@dataclass(frozen=True)
class _Behind:
    """A batch of rows one behind the other: both passes, and the columns that scored tokens are foreseen from."""

    rows: Packed
    whole: Packed | None
    places: Tensor
    roles: np.ndarray


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

    def prepare(
        self, rows: Sequence[ArrayRow], rule: Rule | None = None, teacher: bool = False, **sizes: int
    ) -> _Behind:
        compressor, rule = self.compressor, rule or self.compressor.rule
        chosen = {name: compressor.size(name, sizes.get(name)) for name in ("slots", "sink", "window")}
        whole = None
        if teacher:
            flat = [ArrayRow(row.ids, row.roles, row.stops[-1:]) for row in rows]
            whole = self._pack(flat, rule, slots=1)
        roles = np.concatenate([row.roles for row in rows])
        at = np.flatnonzero(roles != NONE)
        return _Behind(self._pack(rows, rule, **chosen), whole, torch.from_numpy(at - 1), roles[at])

    def run(self, prepared: _Behind) -> Scored:
        passes = self.passes
        places = moved(prepared.places, passes.device)
        rows = prepared.rows.to(passes.device)
        adapter = passes.adapter()
        student = passes.norm(passes.hidden(rows, adapter).index_select(0, places))
        taught = None
        if prepared.whole is not None:
            with torch.no_grad():
                hidden = passes.hidden(prepared.whole.to(passes.device), adapter)
                taught = passes.norm(hidden.index_select(0, places))
        return Scored(student, taught, rows.ids.index_select(0, places + 1), prepared.roles)

    def _pack(self, rows: Sequence[ArrayRow], rule: Rule, **sizes: int) -> Packed:
        tokens = sum(len(row.ids) for row in rows)
        width = self.width
        while width >= 2 * tokens and width >= 64 * BLOCK:  # batches that run in parts
            width //= 2
        if tokens <= width and not width % (32 * BLOCK):
            sizes |= {"text": width, "sinks": width // 32}
            if folds := sum(len(row.stops) - 1 for row in rows):
                comps = folds * sizes["slots"]
                sizes["comps"] = next(
                    (n for n in (width // 16, width // 8, width // 4) if comps <= n), up(comps)
                )
        taken = pack(rows, rule, near=self.passes.near, **sizes)
        self.compressor.check_length(int(taken.position.max()) + 1)
        self.compressor.check_ids(taken.ids)
        return taken


def make_engine(
    compressor: Compressor, width: int = 0, fuse: bool = False, save_memory: bool = False
) -> Engine:
    """The lean engine, if a trial pass shows that it gives the model's own numbers; else the padded one."""
    padded = Padded(compressor)
    try:
        if is_spread(compressor.model) or getattr(compressor.model, "is_quantized", False):
            raise Unfit("its weights are spread or quantized")
        lean = Lean(compressor, width, fuse, save_memory)
        rows = [_trial(compressor, seed) for seed in range(2)]
        with torch.no_grad():
            expected, got = padded.run(padded.prepare(rows)).student, lean.run(lean.prepare(rows)).student
        error = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not error < TOLERANCE[compressor.model.dtype]:
            raise Unfit(f"a trial pass differs by {error:.1%}")
    except Unfit as reason:
        log.info("training runs the model's own layers, padded: %s", reason)
        return padded
    return lean


def _trial(compressor: Compressor, seed: int) -> ArrayRow:
    words = compressor.model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(seed).integers(words // 2, words, 40).astype(np.int32)
    return ArrayRow(ids, np.tile(np.array([0, 1, 1, 1], np.uint8), 10), np.array([12, 24, 40], np.int32))


def _segments(row: ArrayRow) -> list[list[int]]:
    return [part.tolist() for part in np.split(row.ids, row.stops[:-1])]


@contextmanager
def under(compressor: Compressor, rule: Rule) -> Iterator[None]:
    """Passes go by a rule for a while."""
    own = compressor.rule
    compressor.rule = rule
    try:
        yield
    finally:
        compressor.rule = own
