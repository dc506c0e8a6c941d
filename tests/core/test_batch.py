"""A batch whose rows come and go: what is copied, and that rows are what they are alone."""

from __future__ import annotations

import random
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import history, random_rows, tiny_compressor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccm.core.batch import Batch
from ccm.core.live import Live
from ccm.core.pages import blank
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
        if (
            isinstance(out, Tensor)
            and not func.is_view
            and name not in ("new_empty", "empty", "zeros", "frombuffer")
        ):
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


def moves_of(monkeypatch: Any) -> list[int]:
    """Filled with the columns of the batch at each of its moves."""
    moves: list[int] = []
    own = Batch._move
    monkeypatch.setattr(
        Batch, "_move", lambda self, rows, wide: (moves.append(self._width), own(self, rows, wide))[1]
    )
    return moves


@torch.inference_mode()
def test_a_join_copies_the_row_that_joins(compressor, monkeypatch):
    rng, moves = random.Random(0), moves_of(monkeypatch)
    batch = Batch(begun(compressor, rng))
    costs = []
    for joined in range(1, 32):
        new, moved = begun(compressor, rng), len(moves)
        size = kv_bytes(new)
        with Copied() as copied:
            batch.join(new)
        assert not new.cache.layers  # what is copied is given up
        costs.append(copied.nbytes)
        many = sum(part.nbytes for part in (batch.live.position, batch.live.is_memory, batch.live.valid))
        if len(moves) == moved:
            assert size <= copied.nbytes <= size + 4 * many
        else:  # more rows, or the first one that is wider than all before it
            assert joined + 1 in (2, 3, 5, 9, 17) or len(moves) <= 7
    whole = kv_bytes(batch.live)
    assert sum(costs) < 4 * whole  # also with what moves copy: in all, no row more than a few times
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
    held, moved = kv_bytes(batch.live), moves_of(monkeypatch)
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


@torch.inference_mode()
def test_a_long_answer_moves_the_batch_seldom(compressor):
    """At most 2 % of its bytes for every token that is written."""
    rng = random.Random(3)
    batch = Batch(begun(compressor, rng))
    batch.join(begun(compressor, rng))
    moved = []
    for _ in range(150):
        with Copied() as copied:
            batch.reserve(1)
        moved.append(copied.nbytes)
        batch.live, _ = run(compressor, batch.live, torch.tensor([[5], [6]]))
    assert len([nbytes for nbytes in moved if nbytes]) == 2
    assert sum(moved) / len(moved) <= 0.02 * kv_bytes(batch.live)


@torch.inference_mode()
def test_room_in_front_comes_with_who_needs_it(compressor):
    """None before that; then for more than one."""
    (short, long) = random_rows([[4, 5], [4, 40]])
    rows = [
        run(compressor, compressor.live(compressor.empty()), torch.tensor([ids]))[0]
        for ids in (*short, *long)
    ]
    batch = Batch(rows[1])
    batch.join(rows[0])
    assert batch._first == 0
    batch.join(rows[3])
    assert batch._first == ROOM and batch._width == 40


@torch.inference_mode()
@pytest.mark.parametrize("at_once", [False, True])
def test_a_move_holds_one_layer_twice(compressor, monkeypatch, at_once):
    rng = random.Random(4)
    batch = Batch(begun(compressor, rng))
    for _ in range(3):
        batch.join(begun(compressor, rng))
    old = [weakref.ref(states.untyped_storage()) for pair in batch._room for states in pair]
    kept = [list(pair) for pair in batch._room] if at_once else []  # negative control: as it once was
    alive = []

    def makes(*args: Any) -> Tensor:
        alive.append(sum(storage() is not None for storage in old))
        return blank(*args)

    monkeypatch.setattr("ccm.core.batch.blank", makes)
    batch._move(8, batch._width)
    assert len(alive) == len(old) == 2 * len(batch.live.cache.layers)
    assert (alive[-1] <= 2) == (not at_once) and bool(kept) == at_once


@torch.inference_mode()
def test_a_move_that_fails_leaves_the_batch_as_it_was(compressor, monkeypatch):
    """Half of its layers have moved by then; those inside go on, and others join later."""
    rng = random.Random(5)
    batch = Batch(begun(compressor, rng))
    batch.join(begun(compressor, rng))
    at = rng.getstate()
    new, left = begun(compressor, rng), [3]
    right = [[layer.keys.clone() for layer in batch.live.cache.layers]]

    def fails(*args: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return blank(*args)

    with monkeypatch.context() as patch:
        patch.setattr("ccm.core.batch.blank", fails)
        with pytest.raises(MemoryError):
            batch.join(new)
    for layer, keys in zip(batch.live.cache.layers, *right, strict=True):
        assert torch.equal(layer.keys, keys)
    rng.setstate(at)
    batch.join(begun(compressor, rng))
    assert len(batch) == 3
    for layer, keys in zip(batch.live.cache.layers, *right, strict=True):
        assert torch.equal(layer.keys[:2, :, -keys.shape[2] :], keys)
