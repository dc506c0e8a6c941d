"""Memories at rest: the same bits in fewer bytes, also while an answer is written, and nobody holds others beside."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from dataclasses import replace

import pytest
import torch
from engine_contract import GREEDY, SIZES, Heard, compressor_of
from tiny import random_rows, tiny_model, tiny_tokenizer

from ccm import get_method
from ccm.core.live import Live
from ccm.core.memory import KV, Memory
from ccm.files.memory_file import PARTS
from ccm.methods import as_method
from ccm.serving.engine import Job, PaddedEngine, Sampling
from ccm.serving.engine.resting import Resting, held, rest, wake
from ccm.serving.service import Message, Service, Settings
from ccm.serving.store import codec, open_store

TOLD = random_rows([[8, 7, 8, 5, 8, 6, 8, 8]])[0]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compressor():
    return compressor_of(rule="concat")


@pytest.fixture(scope="module")
def method(compressor, tokenizer):
    return as_method(compressor, tokenizer, **SIZES)


def lived(method, segments=TOLD):
    memory = method.empty()
    for segment in segments:
        memory = method.fold(memory, [segment])
    return memory


def stored(method, memory, precision="float16"):
    return method.admit(codec.decode(codec.encode(memory, precision)[0])[0])


def bits(x):
    return x.contiguous().view(
        torch.uint8 if x.itemsize == 1 else torch.int16 if x.itemsize == 2 else torch.int32
    )


def same(a: Memory, b: Memory) -> bool:
    """Whether two memories are, to the last bit, of the same types and counters."""
    return all(
        replace(x, **dict.fromkeys(PARTS)) == replace(y, **dict.fromkeys(PARTS))
        and all(
            p.dtype == q.dtype and torch.equal(bits(p), bits(q))
            for part in PARTS
            for p, q in zip(getattr(x, part), getattr(y, part), strict=True)
        )
        for x, y in zip(a.rows, b.rows, strict=True)
    )


def test_a_memory_from_the_store_rests_in_half(method):
    memory = stored(method, method.pin(lived(method), [5, 6, 7]))
    resting = rest(memory)
    assert memory.rows[0].pinned == 3 and memory.slots > 8
    assert held(resting) == memory.nbytes // 2 == resting.nbytes // 2
    assert same(resting, memory) and same(wake(resting), memory)
    assert rest(resting) is resting and wake(memory) is memory
    assert not any(isinstance(kv, Resting) for row in wake(resting).rows for kv in (row.sink, row.slots))


def test_what_is_new_keeps_all_bits_beside_what_is_stored(method):
    """Slots folded and tokens read since: 32 bits for these entries alone."""
    before = stored(method, lived(method))
    memory = method.fold(before, [TOLD[0]], answered=True)
    memory = method.fold(memory, [TOLD[1]])
    resting = rest(memory)
    (row,), entry = memory.rows, memory.nbytes // memory.length
    new = row.slots.length - before.slots + 8 + 7  # the slots of what left the window, and two segments
    assert new > 15 and not same(memory, stored(method, memory))
    assert held(resting) == (memory.length + new) * entry // 2
    assert same(resting, memory)
    rotary = method.reader.rotary
    for a, b in zip(
        row.placed(rotary, torch.float32), resting.rows[0].placed(rotary, torch.float32), strict=True
    ):
        assert torch.equal(a, b)
    for a, b in zip(*(method.fold(m, [TOLD[2]]).rows for m in (memory, resting)), strict=True):
        assert torch.equal(a.slots.keys, b.slots.keys) and torch.equal(a.window.values, b.window.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_changes(dtype):
    """One an entry, at the edges of float16 and bfloat16, in keys and in values."""
    half, brain = torch.finfo(torch.float16), torch.finfo(torch.bfloat16)
    fine = [0.0, -0.0, half.max, -half.max, half.tiny, half.smallest_normal / 1024, 1 + 2**-10, float("inf")]
    wide = [1e5, 3e-8, 1 + 2**-7, brain.max, brain.tiny, 2.0**-120, -float("inf"), 65536.0]
    own = [1 / 3, torch.pi, 1 + 2**-11, 1e-45, 65503.0, float("nan"), torch.finfo(dtype).tiny / 8]
    x = torch.zeros(2, 3, len(fine + wide + own), 4, dtype=dtype)
    x[1, 2, :, 3] = torch.tensor([*fine, *wide, *own], dtype=dtype)
    like = Memory((replace(compressor_of().empty().rows[0], slots=KV(x, x.flip(2))),), "x")
    resting = rest(like)
    assert same(resting, like)
    number, entry = x.itemsize, 2 * 2 * 3 * 4
    least = entry * (2 * len(fine) + number * len(own))
    assert least < held(resting) <= entry * (2 * len(fine + wide) + number * len(own) + number)


def test_models_of_16_bits_rest_in_their_type(tokenizer):
    """Slots are fp32 at work; chosen from what a bfloat16 model has read they are no finer than that."""
    model = tiny_model(vocab_size=len(tokenizer)).to(torch.bfloat16)
    method = get_method("snapkv", tokens=12, window=6).bind(model, tokenizer)
    memory = lived(method)
    resting = rest(memory)
    (row,) = memory.rows
    assert row.slots.keys.dtype == torch.float32 and row.window.keys.dtype == torch.bfloat16
    assert resting.rows[0].window is row.window
    assert same(resting, memory)
    assert held(resting) == 2 * memory.length * 2 * torch.tensor(method.reader.kv_shape()).prod()


def test_codes_rest_as_they_are(compressor, tokenizer):
    method = get_method("packed", of="snapkv", code="int4", options={"tokens": 12}, window=6)
    method = method.bind(compressor.model, tokenizer)
    memory = stored(method, lived(method))
    resting = rest(memory)
    assert memory.rows[0].slots.keys.dtype == torch.uint8 and resting.rows[0].slots is memory.rows[0].slots
    assert same(resting, memory) and held(resting) < memory.nbytes
    for a, b in zip(method.recall(memory).rows, method.recall(resting).rows, strict=True):
        assert torch.equal(a.slots.keys, b.slots.keys)


def test_copies_and_files_of_it_are_those_of_the_memory(method):
    memory = stored(method, lived(method))
    resting = rest(memory)
    assert resting.dumps() == memory.dumps()
    assert codec.encode(resting)[0] == codec.encode(memory)[0]
    assert same(copy.deepcopy(resting), memory)
    assert resting.rows[0].slots[0].dtype == torch.float32 and len(resting.rows[0].slots) == 2


def test_a_cache_of_it_is_the_same(method):
    """Rows of several lengths, the same one twice."""
    memories = [stored(method, lived(method, TOLD[:n])) for n in (8, 3, 5)]
    memories.append(memories[0])
    one, two = (
        Live.over(Memory.stack(each), method.reader.rotary, torch.float32)
        for each in (memories, [*map(rest, memories)])
    )
    for a, b in zip(one.cache.layers, two.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    for r, memory in enumerate(memories):
        (row,) = memory.rows
        placed = row.placed(method.reader.rotary, torch.float32)
        for layer, keys, values in zip(one.cache.layers, *placed, strict=True):
            assert torch.equal(layer.keys[r, :, -row.length :], keys)
            assert torch.equal(layer.values[r, :, -row.length :], values)
            assert not layer.keys[r, :, : -row.length].any()  # padding is zeros


# ------------------------------------------------------------------ who holds what


def loose(method) -> int:
    """Entries of all keys and values in fp32, but for those of caches, which have rows in front and not layers."""
    gc.collect()
    layers, heads, size = method.reader.kv_shape()
    found = [
        x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.float32 and x.dim() == 4
    ]
    return sum(x.shape[2] for x in found if (x.shape[0], x.shape[1], x.shape[3]) == (layers, heads, size))


@pytest.fixture
def counted(method, monkeypatch):
    """How many entries there are in fp32 while answers are written, more than before; of some steps."""
    before, seen, write = loose(method), [], PaddedEngine._write

    def writes(self, rows):
        if len(rows) > len(self._batch or ()) - 1 and len(seen) < 4:
            seen.append(loose(method) - before)
        write(self, rows)

    monkeypatch.setattr(PaddedEngine, "_write", writes)
    return seen


def plainly(monkeypatch):
    """As it was before memories rested."""
    for module in ("engine.folding", "records"):
        monkeypatch.setattr(f"ccm.serving.{module}.rest", lambda memory: memory)


@pytest.mark.parametrize("resting", [True, False])
def test_no_job_holds_a_whole_memory(method, tokenizer, counted, monkeypatch, resting):
    """Neither one whose answer is written nor one that waits; and results are plain memories."""
    if not resting:  # negative control
        plainly(monkeypatch)
    payload = codec.encode(lived(method), "float16")[0]

    def job():
        memory = method.admit(codec.decode(payload)[0])
        return Job(memory, prompt=(5, 50, 6), sampling=Sampling(max_tokens=20, temperature=0))

    engine, ready = PaddedEngine(method, tokenizer, rows=2), threading.Event()
    engine._inbox.put(ready.wait)  # until all are there: who makes a job holds its memory
    heard = [Heard() for _ in range(5)]
    for each in heard:
        engine.submit(job(), each)
    ready.set()
    results = [each.result() for each in heard]
    engine.close()
    assert len({result.text for result in results}) == 1
    for result in results:
        assert same(result.memory, job().memory) and type(result.memory.rows[0].slots) is KV
    assert (max(counted[:2]) == 0) == resting


@pytest.mark.parametrize("resting", [True, False])
def test_no_turn_of_a_server_holds_a_whole_memory(method, tokenizer, counted, monkeypatch, tmp_path, resting):
    """What begins the turn, what is to be stored, what may have to be taken in anew: all are the one at rest."""
    if not resting:
        plainly(monkeypatch)
    store = open_store(f"sqlite://{tmp_path}/memories.db")
    service = Service(method, tokenizer, store, Settings("tiny"), PaddedEngine(method, tokenizer, rows=2))

    async def talk():
        for _ in range(8):
            counted.clear()
            turn = await service.answer("t", "s", [Message("user", "go on")], GREEDY, create=True)
            outcome = await turn.finish()
        return outcome

    outcome = asyncio.run(talk())
    service.close()
    whole = 2 * (outcome.stats["slots"] + outcome.stats["window"])  # keys and values; a few entries are new
    assert (max(counted) < 0.7 * whole) == resting
    assert (max(counted) > 1.5 * whole) != resting
