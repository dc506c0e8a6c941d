"""Memories as bytes: encoded, decoded, damaged and forged."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from stores import EMBEDDED, damage, empty_place

from ccm.core.memory import KV, Memory, Row
from ccm.core.rule import RULES
from ccm.errors import MemoryFileError, UnknownNameError
from ccm.files import memory_file
from ccm.serving.store import Snapshot, open_store
from ccm.serving.store.codec import DTYPES, cuts, decode, encode


def memory_of(seed: int = 0, window: torch.dtype = torch.bfloat16) -> Memory:
    """Two rows, with parts of length zero and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)

    def kv(length: int, dtype: torch.dtype = torch.float32) -> KV:
        sizes = 10.0 ** torch.arange(-3, 5)  # per channel
        return KV(*(torch.randn(2, 3, 2, length, 8, generator=generator) * sizes).to(dtype))

    return Memory(
        (
            Row(kv(1, window), kv(6), kv(5, window), (2, 3), steps=3, tokens=40, recent=(8, 9)),
            Row(kv(0, window), kv(2), kv(0, window), steps=1, tokens=7, dropped=2),
        ),
        "print",
    )


def tensors_of(memory: Memory) -> list[torch.Tensor]:
    return [t for row in memory.rows for kv in (row.sink, row.slots, row.window) for t in kv]


def same(a: Memory, b: Memory) -> bool:
    counters = [
        [{k: v for k, v in row.__dict__.items() if not isinstance(v, KV)} for row in m.rows] for m in (a, b)
    ]
    return (
        counters[0] == counters[1]
        and a.fingerprint == b.fingerprint
        and all(
            x.dtype == y.dtype and torch.equal(x, y)
            for x, y in zip(tensors_of(a), tensors_of(b), strict=True)
        )
    )


@pytest.mark.parametrize("window", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_comes_back_with_the_error_that_is_stated(dtype, window):
    memory = memory_of(window=torch.float32)
    memory = Memory(
        tuple(replace(row, sink=row.sink.to(window), window=row.window.to(window)) for row in memory.rows),
        "print",
    )
    data, metadata = encode(memory, dtype)
    back, read = decode(data)
    assert read == metadata == json.loads(json.dumps(metadata))
    assert metadata["nbytes"] == len(data)
    assert same(memory, back) == (metadata["dtype"] == "float32")
    assert [t.dtype for t in tensors_of(back)] == [t.dtype for t in tensors_of(memory)]
    for place, part in enumerate(("keys", "values")):
        pairs = list(zip(tensors_of(memory)[place::2], tensors_of(back)[place::2], strict=True))
        off, whole = (
            torch.cat([f(x.double(), y.double()).flatten() for x, y in pairs]).norm()
            for f in (lambda x, y: x - y, lambda x, y: x)
        )
        assert metadata["error"][part] == pytest.approx((off / whole).item(), rel=1e-6)
    bounds = {"float32": (0, 0), "float16": (1e-6, 4e-4), "bfloat16": (1e-5, 3e-3), "int8": (1e-4, 5e-3)}[
        metadata["dtype"]
    ]
    assert all(bounds[0] <= error <= bounds[1] for error in metadata["error"].values())


def test_int8_scales_each_channel_by_itself():
    """Every channel keeps its own precision, though the largest is 10 million times the smallest."""
    memory = memory_of(window=torch.float32)
    back, _ = decode(encode(memory, "int8")[0])
    x, y = memory.rows[0].slots.keys, back.rows[0].slots.keys
    assert ((x - y).norm(dim=2) / x.norm(dim=2)).max() < 0.02
    step = x.abs().max() / 127  # negative control: one scale for all loses the small channels
    z = (x / step).round() * step
    assert ((x - z).norm(dim=2) / x.norm(dim=2)).max() == 1


def test_smaller_dtypes_are_smaller():
    memory = memory_of(window=torch.float32)
    wide = KV(*torch.randn(2, 3, 2, 400, 8))
    memory = Memory((Row(wide, wide, wide, (400,)),), "print")
    whole, half, other, quarter = (len(encode(memory, dtype)[0]) / memory.nbytes for dtype in DTYPES)
    assert 1 <= whole < 1.05
    assert 0.5 <= half < 0.53 and 0.5 <= other < 0.53
    assert 0.25 <= quarter < 0.29


def test_constant_tiny_and_huge_values():
    for value in (0.0, 1e-45, -1e-38, 1e30):
        kv = KV(*torch.full((2, 1, 1, 3, 2), value))
        for dtype in DTYPES:
            back, metadata = decode(encode(Memory((Row(kv, kv, kv, (3,)),), "p"), dtype)[0])
            assert all(math.isfinite(e) for e in metadata["error"].values())
            if value in (0.0, 1e30):
                assert torch.allclose(back.rows[0].slots.keys, kv.keys, rtol=5e-3)
    top = KV(*torch.full((2, 1, 1, 3, 2), torch.finfo(torch.float32).max))
    with pytest.raises(MemoryFileError, match="too large for bfloat16; store it as float32"):
        encode(Memory((Row(top, top, top, (3,)),), "p"), "bfloat16")


def test_float16_gives_way_where_a_value_is_too_large_for_it():
    for value, stored in ((65504.0, "float16"), (65505.0, "float32")):
        kv = KV(*torch.full((2, 1, 1, 3, 2), -value))
        memory = Memory((Row(kv, kv, kv, (3,)),), "p")
        data, metadata = encode(memory, "float16")
        assert metadata["dtype"] == decode(data)[1]["dtype"] == stored and same(decode(data)[0], memory)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_running_means_keep_all_bits(dtype):
    kv = KV(*torch.randn(2, 3, 2, 6, 8))
    memory = Memory((Row(kv.slice(0, 1), kv, kv, (6,)), Row(kv.slice(0, 0), kv, kv, (6,))), "print")
    back, _ = decode(encode(memory, dtype, means=[2, 0])[0])
    (first, second), plain = (
        (row.slots for row in back.rows),
        decode(encode(memory, dtype)[0])[0].rows[0].slots,
    )
    assert torch.equal(first.keys[:, :, :2], kv.keys[:, :, :2])
    assert torch.equal(first.values[:, :, :2], kv.values[:, :, :2])
    if dtype != "int8":  # scales there are of what is scaled
        assert torch.equal(first.keys[:, :, 2:], plain.keys[:, :, 2:])
    assert not torch.equal(second.keys[:, :, :2], kv.keys[:, :, :2])  # negative control
    assert decode(encode(memory, "float32", means=[2, 0])[0])[0].rows[0].slots.length == 6


def test_a_mean_over_many_folds_does_not_stand_still():
    """Stored after every fold: in fp32 the mean of a thousand blocks is right, in 16 bits it is off by far more."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(1000, 1, 1, 1, 64, generator=generator) + 3
    off = {}
    for means in (1, 0):
        row = Row(*(KV(*torch.zeros(2, 1, 1, n, 64)) for n in (0, 1, 0)))
        for step, block in enumerate(blocks, 1):
            slots = KV(*(RULES["mean"]().update(old, block, step) for old in row.slots))
            row = decode(encode(Memory((replace(row, slots=slots),), "p"), "bfloat16", [means])[0])[0].rows[0]
        off[means] = (row.slots.keys - blocks.mean(0)).abs().max().item()
    assert off[1] < 1e-4 < 1e-2 < off[0]


def test_what_is_read_from_a_bytearray_is_not_copied():
    memory = memory_of(window=torch.float32)
    data = bytearray(encode(memory)[0])
    (row, _) = decode(data)[0].rows
    ends = [torch.frombuffer(data, dtype=torch.uint8).data_ptr() + at for at in (0, len(data))]
    assert all(ends[0] <= t.data_ptr() < ends[1] for t in (*row.slots, *row.window))
    assert not any(ends[0] <= t.data_ptr() < ends[1] for t in row.sink)  # it would hold the rest for ever


def test_versions_of_a_memory_have_their_parts_in_common():
    """Slots that have moved, and the window, are cut out as the same bytes again; what is new is not."""
    memory = memory_of(3, torch.float32)
    kv = KV(*torch.randn(2, 3, 2, 60, 8))
    before = replace(memory.rows[0], slots=kv)
    after = replace(before, slots=KV.cat([KV(*(x[:, :, :2] * 2 for x in kv)), kv.slice(6), kv.slice(0, 4)]))
    payloads = [encode(Memory((row,), "p"))[0] for row in (before, after)]
    parts = []
    for payload in payloads:
        ends = [0, *cuts(payload), len(payload)]
        assert ends == sorted(set(ends)) and len(ends) > 20
        parts.append({payload[a:b] for a, b in pairwise(ends)})
    new = sum(map(len, parts[1] - parts[0]))
    entry = 2 * 3 * 2 * 8 * 4  # keys and values
    assert 6 * entry <= new < 30 * entry + len(payloads[1]) - Memory((after,), "p").nbytes


def test_what_cannot_be_encoded():
    memory = memory_of()
    with pytest.raises(
        UnknownNameError,
        match=r"unknown dtype 'int4' \(did you mean int8\?\): expected one of bfloat16, float16, float32, int8",
    ):
        encode(memory, "int4")
    memory.rows[0].slots.keys[0, 0, 0, 0] = math.nan
    with pytest.raises(MemoryFileError, match="NaN"):
        encode(memory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_memories_are_refused(dtype):
    data = encode(memory_of(), dtype)[0]
    rng = random.Random(11)
    for _ in range(400):
        broken = damage(data, rng)
        if broken == data:
            continue
        with pytest.raises(MemoryFileError, match=r"no usable stored memory|limit is|newer ccm") as caught:
            decode(broken, 2 * len(data))
        assert len(str(caught.value)) < 500
    assert same(decode(data)[0], decode(data, len(data))[0])


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def forged(change: Callable[..., Any]) -> bytes:
    """A memory that was changed by somebody who knows how to make a digest."""
    data = encode(memory_of(), "int8")[0]
    tensors, metadata = safetensors.load(data), parts_of(data)[0]["__metadata__"]
    del metadata["digest"]
    rows = json.loads(metadata["rows"])
    change(tensors, metadata, rows)
    if metadata.get("rows"):
        metadata["rows"] = json.dumps(rows)
    metadata["digest"] = memory_file.content_digest(tensors, metadata)
    return safetensors.save(tensors, metadata)


def put(target: Any, key: Any, value: Any) -> None:
    target[key] = value


FORGERIES: dict[str, tuple[Callable[..., None], str]] = {
    "nan scale": (lambda t, m, r: t["0.slots.keys.scale"].fill_(math.nan), "NaN"),
    "infinite product": (lambda t, m, r: t["0.slots.keys.scale"].fill_(3e38), "NaN or infinite"),
    "missing tensor": (lambda t, m, r: t.pop("0.slots.keys"), "0.slots.keys"),
    "extra tensor": (lambda t, m, r: put(t, "x", torch.zeros(1)), "tensors, expected"),
    "other dtype": (lambda t, m, r: put(t, "0.slots.keys", torch.zeros(6, 3, 2, 8)), "has dtype 'F32'"),
    "int64": (lambda t, m, r: put(t, "0.sink.keys", torch.zeros(1, 3, 2, 8).long()), "has dtype 'I64'"),
    "flat": (lambda t, m, r: put(t, "0.slots.keys", t["0.slots.keys"].flatten()), "impossible shape|zip"),
    "keys longer": (
        lambda t, m, r: put(t, "0.slots.keys", torch.zeros(7, 3, 2, 8).char()),
        "differ in shape",
    ),
    "wide scale": (
        lambda t, m, r: put(t, "0.slots.keys.scale", torch.ones(6, 3, 2, 8)),
        "scale .* another shape",
    ),
    "heads": (
        lambda t, m, r: [
            put(t, f"1.sink.{p}{s}", torch.zeros(0, 3, 9, 8).to(d))
            for p in ("keys", "values")
            for s, d in (("", torch.int8), (".scale", torch.float32))
        ],
        "layers, heads or channels differ",
    ),
    "segments": (lambda t, m, r: put(r[0], "segments", [2, 4]), "segments are not its window"),
    "negative": (lambda t, m, r: put(r[0], "tokens", -1), "impossible counters"),
    "fraction": (lambda t, m, r: put(r[0], "steps", 1.5), "impossible counters"),
    "true": (lambda t, m, r: put(r[0], "steps", True), "impossible counters"),
    "other field": (
        lambda t, m, r: put(r[0], "__class__", 1),
        "written by a newer ccm: row 0 counts '__class__'",
    ),
    "no counter": (lambda t, m, r: r[0].pop("tokens"), "other fields"),
    "merged": (lambda t, m, r: put(r[0], "merged", -1), "impossible counters"),
    "not rows": (lambda t, m, r: r.__setitem__(slice(None), [7]), "TypeError"),
    "no rows": (lambda t, m, r: r.clear(), "rows are not as expected"),
    "dtypes": (lambda t, m, r: put(r[0]["dtypes"], "slots", "load"), "KeyError"),
    "no metadata rows": (lambda t, m, r: m.pop("rows"), "KeyError"),
    "deep json": (lambda t, m, r: put(m, "error", "[" * 100_000), "not a number"),
    "error": (lambda t, m, r: put(m, "error", '{"keys": NaN, "values": 0.0}'), "not a number"),
    "format": (
        lambda t, m, r: put(m, "format", "ccm-memory/1"),
        "its format is 'ccm-memory/1', expected 'ccm-snapshot'",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_memories_are_refused(name):
    change, message = FORGERIES[name]
    with pytest.raises(MemoryFileError, match=message):
        decode(forged(change))


def test_the_forger_could_make_a_good_one():
    assert decode(forged(lambda t, m, r: None))[0].tokens == 47


def test_a_snapshot_from_before_merged_tokens_were_counted_is_read():
    golden = Path(__file__).parent.parent / "golden" / "snapshot-without-merged.bin"
    (row,) = decode(golden.read_bytes())[0].rows
    assert (row.steps, row.tokens, row.merged, row.merged_segments, row.recent) == (4, 24, 0, 0, ())
    data = encode(Memory((replace(row, merged=12, merged_segments=2, recent=(6, 6)),), "p"))[0]
    (back,) = decode(data)[0].rows
    assert (back.merged, back.merged_segments, back.recent) == (12, 2, (6, 6))
    exported = Path(golden).with_name("memory-without-merged.ccm").read_bytes()
    assert Memory.loads(exported)[0].rows[0].tokens == 24


def test_nothing_is_allocated_for_what_a_header_claims(monkeypatch):
    data = encode(memory_of(), "float32")[0]
    header, body = parts_of(data)
    monkeypatch.setattr(memory_file, "_views", lambda *args: pytest.fail("allocated before it was checked"))
    claims: list[bytes] = [
        b"",
        b"\x05",
        (1 << 60).to_bytes(8, "little") + data[8:],
        joined(b"[" * 100_000, body),
        joined(b"7", body),
        joined({**header, "__metadata__": 7}, body),
        joined({**header, "__metadata__": {}}, body),
        pickle.dumps(memory_of()),
        b"PK\x03\x04" + data,
    ]
    for shape in (
        [6, 1 << 40, 2, 8],
        [1 << 62, 3, 2, 8],
        [-6, 3, 2, 8],
        [6.0, 3, 2, 8],
        [3, 2, 6],
        "3268",
        None,
    ):
        claims.append(joined({**header, "0.slots.keys": {**header["0.slots.keys"], "shape": shape}}, body))
    for claim in claims:
        with pytest.raises(MemoryFileError, match="no usable stored memory"):
            decode(claim)
    with pytest.raises(MemoryFileError, match=f"of {len(data)} bytes, the limit is 100"):
        decode(data, 100)


def test_the_header_of_one_memory_does_not_fit_the_tensors_of_another():
    a, b = (encode(memory_of(seed), "float32")[0] for seed in (1, 2))
    (head_a, body_a), (head_b, body_b) = parts_of(a), parts_of(b)
    assert same(decode(joined(head_a, body_a))[0], memory_of(1))
    for swapped in (joined(head_a, body_b), joined(head_b, body_a)):
        with pytest.raises(MemoryFileError, match="digest differs"):
            decode(swapped)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_a_conversation_goes_on_from_a_store(kind, tmp_path, request):
    from tiny import history, random_rows, tiny_compressor

    compressor = tiny_compressor(window=8, sink=2)
    first, second, prompt = random_rows([[6, 9, 7], [5], [4]], seed=3)
    told = history(compressor, first, window=8, sink=2)
    with open_store(empty_place(kind, tmp_path, request)) as store:
        session = store.create("alice")
        store.commit("alice", session, 0, Snapshot(*encode(told)))
        back, metadata = decode(store.latest("alice", session).payload)
        assert metadata == store.latest("alice", session).metadata
    compressor.check(back, 1)
    logits = [
        compressor.logits(prompt, memory=compressor.compress(second, memory, window=8, sink=2))
        for memory in (told, back, compressor.empty())
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
