"""A batch whose rows come and go: what is copied, and that rows are what they are alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import history, random_rows, tiny_compressor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccm.core.batch import Batch
from ccm.core.live import Live
from ccm.core.room import ROOM
from ccm.serving.engine.padded import run


class Copied(TorchDispatchMode):
    """Bytes that operations write, but for zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and not func.is_view and name not in ("new_zeros", "empty", "zeros"):
            self.nbytes += out.nbytes
        return out


def kv_bytes(live: Live) -> int:
    return sum(states.nbytes for layer in live.cache.layers for states in (layer.keys, layer.values))


@dataclass
class Talk:
    """One row beside the batch: what it is alone."""

    live: Live
    logits: Tensor


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def compressor(request):
    return tiny_compressor(request.param, window=8, sink=2)


def begun(compressor: Any, rng: random.Random) -> Live:
    """A row over a memory of some length that has read a prompt."""
    lengths = [rng.randint(3, 9) for _ in range(rng.randint(1, 4))]
    ((*told, prompt),) = random_rows([[*lengths, rng.randint(1, 20)]], seed=rng.randint(0, 999))
    memory = history(compressor, told, window=8, sink=2)
    return run(compressor, compressor.live(memory), torch.tensor([prompt]))[0]


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_what_they_are_alone(compressor, seed, monkeypatch):
    monkeypatch.setattr("ccm.core.batch.ROOM", 3)  # so that there is too little now and then
    rng = random.Random(seed)
    batch: Batch | None = None
    alone: list[Talk] = []
    moves: list[int] = []
    own = Batch._move
    monkeypatch.setattr(
        Batch, "_move", lambda self, rows, wide: (moves.append(rows), own(self, rows, wide))[1]
    )
    for _ in range(60):
        what = rng.choice(["join", "write", "write", "leave"])
        if what == "join" and len(alone) < 6:
            at = rng.getstate()
            new = begun(compressor, rng)
            rng.setstate(at)
            alone.append(Talk(begun(compressor, rng), torch.empty(0)))
            if batch is None:
                batch = Batch(new)
            else:
                batch.join(new)
        elif what == "leave" and len(alone) > 1:
            gone = rng.sample(range(len(alone)), rng.randint(1, len(alone) - 1))
            alone = [alone[row] for row in batch.leave(gone)]
        elif what == "write" and batch is not None:
            ids = torch.tensor([[rng.randint(3, 60)] for _ in alone])
            batch.reserve(1)
            batch.live, logits = run(compressor, batch.live, ids)
            for row, talk in enumerate(alone):
                talk.live, (right,) = run(compressor, talk.live, ids[row : row + 1])
                assert torch.allclose(logits[row], right, atol=1e-4)
            assert batch.live.valid[:, 0].any() or len(batch) == 1  # no column is padding in all rows
    assert len(moves) > 3 and max(moves) > 3


@torch.inference_mode()
def test_a_join_copies_the_row_that_joins(compressor):
    rng = random.Random(0)
    batch = Batch(begun(compressor, rng))
    costs = []
    for joined in range(1, 32):
        new = begun(compressor, rng)
        with Copied() as copied:
            batch.join(new)
        costs.append(copied.nbytes)
        many = sum(part.nbytes for part in (batch.live.position, batch.live.is_memory, batch.live.valid))
        if joined + 1 not in (2, 3, 5, 9, 17):  # there was room
            assert kv_bytes(new) <= copied.nbytes <= kv_bytes(new) + 4 * many
    whole = kv_bytes(batch.live)
    assert sum(costs) < 4 * whole  # also with what doubling copies: in all, no row more than a few times
    assert costs[-1] < whole / 8  # negative control: the row is little of it

    with Copied() as copied:
        batch.leave([3])
    assert copied.nbytes < 2 * whole / len(batch) + 6 * many  # the last row takes its place
    with Copied() as copied:
        batch.live.select(range(1, len(batch)))  # how it once went
    assert copied.nbytes > whole / 2


@torch.inference_mode()
def test_writing_copies_nothing_as_long_as_there_is_room(compressor, monkeypatch):
    rng = random.Random(1)
    batch = Batch(begun(compressor, rng))
    batch.join(begun(compressor, rng))
    held = kv_bytes(batch.live)
    moved: list[int] = []
    own = Batch._move
    monkeypatch.setattr(Batch, "_move", lambda self, *args: (moved.append(1), own(self, *args))[1])
    for step in range(ROOM + 1):
        place = batch.live.cache.layers[0].keys.data_ptr()
        batch.reserve(1)
        batch.live, _ = run(compressor, batch.live, torch.tensor([[5], [6]]))
        assert (batch.live.cache.layers[0].keys.data_ptr() == place) == (step < ROOM)
    assert len(moved) == 1 and kv_bytes(batch.live) > held


@torch.inference_mode()
def test_room_is_given_back(compressor):
    rng = random.Random(2)
    batch = Batch(begun(compressor, rng))
    for _ in range(15):
        batch.join(begun(compressor, rng))
    assert len(batch._room[0][0]) == 16
    batch.leave(range(12))
    assert len(batch) == 4 and len(batch._room[0][0]) == 8
    batch.leave([1, 2, 3])
    assert len(batch._room[0][0]) == 2
