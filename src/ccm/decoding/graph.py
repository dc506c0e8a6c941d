"""The step of a GPU as a CUDA graph: recorded once for a cache, and then played with one call a token.

A GPU is faster with the work of a token than Python is with asking for it. A recording reads and writes the same
places of memory every time. So it attends to all of the room that the cache has, of which the mask shows what is
held, and writes a token's keys and values at an index that is a tensor:

    room   | entries held . . . . . | new | nothing yet . . . |
    mask   |  0  0  -inf  0 . . . .    0  | -inf . . . . -inf |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..core.attention import RecurrentPlan
from .shape import Unfit, check, misses
from .step import Step

log = logging.getLogger(__name__)


class Graphed:
    """A step that records itself whenever it meets a cache in other tensors than before.

    Every recording has to give the logits of the step. Where one does not, or cannot be made, the step runs by itself
    from then on, with a warning.

    Args:
        step: on a CUDA device.
        most: standard deviations of the logits by which a recording may miss them.
    """

    def __init__(self, step: Step, most: float):
        self.step, self.most = step, most
        self._recording: _Recording | None = None
        self._seen: list[ref[Tensor]] = []
        self._records = True

    def __call__(self, ids: Tensor, position: Tensor, valid: Tensor, plan: RecurrentPlan, cache: Any) -> Any:
        """As a step."""
        if not self._records:
            return self.step(ids, position, valid, plan, cache)
        rooms = [layer.reserve(1) for layer in cache.layers]
        given = ids, *self.step.tables(position, valid, plan), valid.shape[1]
        if self._recording is None or not self._recording.is_of(rooms):
            self._recording = None  # what it holds goes first
            if not _are(self._seen, rooms):  # of beams the cache is another one at every token
                self._seen = _refs(rooms)
                return self.step(ids, position, valid, plan, cache)
            try:
                self._recording = _Recording(self.step, self.most, rooms, *given)
            except (RuntimeError, Unfit) as reason:
                log.warning("decoding goes on without a CUDA graph: %s", reason)
                self._records = False
                return self.step(ids, position, valid, plan, cache)
        logits = self._recording.play(*given)
        for layer, room in zip(cache.layers, rooms, strict=True):
            layer.hold(*room, valid.shape[1])
        return self.step.output(logits)


class _Recording:
    """A step over the room (B, H, K, D) of one cache.

    Args:
        step: what is recorded.
        most: how far it may miss the step.
        rooms: keys and values of each layer.
        ids: (B, 1).
        turns: rotations (B, D, D), by kind of layer.
        masks: (B, 1, 1, n) or None, by how far a layer sees.
        length: entries that are held with the new one, n.

    Raises:
        Unfit: it gives other logits.
        RuntimeError: CUDA cannot record it.
    """

    def __init__(
        self,
        step: Step,
        most: float,
        rooms: Sequence[tuple[Tensor, Tensor]],
        ids: Tensor,
        turns: Mapping[Any, Tensor],
        masks: Mapping[Any, Tensor | None],
        length: int,
    ):
        self._rooms = _refs(rooms)
        self._ids, self._turns = ids.clone(), {kind: turn.clone() for kind, turn in turns.items()}
        shape = len(ids), 1, 1, rooms[0][0].shape[2]
        self._masks = {
            near: torch.full(shape, -torch.inf, dtype=step.dtype, device=ids.device) for near in masks
        }
        self._end = ids.new_zeros(1)
        for states in (states for room in rooms for states in room):
            states.narrow(
                2, length, states.shape[2] - length
            ).zero_()  # what is masked must be numbers all the same
        self._put(ids, turns, masks, length)
        layers = [_Fixed(*room, self._end) for room in rooms]
        aside, graph = torch.cuda.Stream(ids.device), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(
            aside
        ):  # libraries set themselves up in a first run, which must not be recorded
            right = step.through(self._ids, self._turns, self._masks, layers)
        torch.cuda.current_stream(ids.device).wait_stream(aside)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = step.through(self._ids, self._turns, self._masks, layers)
        self._graph = graph
        check(misses(self.play(ids, turns, masks, length), right), most)

    def is_of(self, rooms: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether these tensors are those that it reads and writes."""
        return _are(self._rooms, rooms)

    def play(
        self, ids: Tensor, turns: Mapping[Any, Tensor], masks: Mapping[Any, Tensor | None], length: int
    ) -> Tensor:
        """The logits (B, V)."""
        self._put(ids, turns, masks, length)
        self._graph.replay()
        return self._logits.clone()  # the next token is written there

    def _put(
        self, ids: Tensor, turns: Mapping[Any, Tensor], masks: Mapping[Any, Tensor | None], length: int
    ) -> None:
        self._ids.copy_(ids)
        self._end.fill_(length - 1)
        for kind, turn in turns.items():
            self._turns[kind].copy_(turn)
        for near, mask in masks.items():
            held = self._masks[near].narrow(-1, 0, length)
            held.zero_() if mask is None else held.copy_(mask)


def _refs(rooms: Sequence[tuple[Tensor, Tensor]]) -> list[ref[Tensor]]:
    """Tensors that go when their cache goes."""
    return [ref(states) for room in rooms for states in room]


def _are(refs: Sequence[ref[Tensor]], rooms: Sequence[tuple[Tensor, Tensor]]) -> bool:
    given = [states for room in rooms for states in room]
    return len(given) == len(refs) and all(own() is states for own, states in zip(refs, given, strict=True))


class _Fixed:
    """Keys and values of a layer in tensors that stay where they are, all of which attention reads."""

    def __init__(self, keys: Tensor, values: Tensor, end: Tensor):
        self.keys, self.values, self._end = keys, values, end

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._end, key)
        self.values.index_copy_(2, self._end, value)
        return self.keys, self.values
