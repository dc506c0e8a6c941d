"""Codes for slots: what they lose, what they weigh, and that a memory in codes is one like any other."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from method_cases import TOKENIZER, model, tiny_adapters
from tiny import random_rows, two_sided_model

from ccm import Session, get_method
from ccm.core.memory import KV, Memory
from ccm.errors import ConfigError, MemoryFileError, MismatchError, UnknownNameError
from ccm.files import memory_file
from ccm.methods import Method, Run
from ccm.methods.bits.codes import CODES, Integers, get_code
from ccm.methods.bits.packed import Packed
from ccm.methods.spec import parse
from ccm.serving.store import codec

SEGMENTS = random_rows([[16, 9, 12, 7, 14, 11, 5]])[0]


def numbers(channels: int = 64, count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, count, channels, generator=torch.Generator().manual_seed(seed)) * 3


def off(name: str, x: torch.Tensor) -> float:
    code = get_code(name)
    return float((code.decode(code.encode(x), x.shape[-1]) - x).norm() / x.norm())


def lived(method: Method, segments: list[list[int]] = SEGMENTS) -> Memory:
    memory = method.empty()
    for segment in segments:
        memory = method.fold(memory, [segment])
    return memory


# ------------------------------------------------------------------ codes


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_by_hand(bits: int) -> None:
    """One vector of 40 channels, in two groups of 20, number by number."""
    x, half = numbers(40)[0, 0, 0], 2 ** (bits - 1)
    code = Integers(bits).encode(x)
    expected, scales, nibbles = [], b"", []
    for group in (x[:20].tolist(), x[20:].tolist()):
        furthest = max(group, key=abs)
        scales += struct.pack("<e", furthest / -half)
        (scale,) = struct.unpack("<e", scales[-2:])
        whole = [min(half - 1, max(-half, round(number / scale))) for number in group]
        expected += [scale * q for q in whole]
        nibbles += [q + half for q in whole]
        for number, q in zip(group, whole, strict=True):
            assert abs(number - scale * q) <= abs(scale) * (0.51 if q < half - 1 else 1.01)
    pairs = [a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)]
    assert bytes(code.tolist()) == bytes(pairs if bits == 4 else nibbles) + scales
    assert Integers(bits).decode(code, 40).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_largest_channels_stay() -> None:
    x = numbers(20)[0, 0, :5]
    back = CODES["sparse"].decode(CODES["sparse"].encode(x), 20)
    for own, got in zip(x, back, strict=True):
        kept = sorted(range(20), key=lambda i: -abs(float(own[i])))[:6]
        assert got.nonzero().squeeze(1).tolist() == sorted(kept)
        assert torch.allclose(got[kept], own[kept], rtol=1e-3)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("channels", [4, 7, 33, 64, 80, 128, 256])
def test_codes_weigh_what_they_say_and_are_made_again_alike(name: str, channels: int) -> None:
    """So an entry that stays is rounded once."""
    code, x = CODES[name], numbers(channels, 20)
    x[0, 0, 0] = 0
    made = code.encode(x)
    assert made.dtype == torch.uint8 and made.shape == (*x.shape[:3], code.width(channels))
    back = code.decode(made, channels)
    assert back.shape == x.shape and not back[0, 0, 0].any()
    assert torch.equal(code.decode(code.encode(back), channels), back)
    assert code.encode(x[:, :, :0]).shape == (2, 3, 0, code.width(channels))


def test_fewer_bits_lose_more() -> None:
    x = numbers()
    eight, four, sparse = (off(name, x) for name in ("int8", "int4", "sparse"))
    assert eight < 0.007 and 10 * eight < four < 0.11 and four < sparse < 0.5
    assert [code.width(64) for code in CODES.values()] == [68, 36, 46]


@pytest.mark.parametrize("name", CODES)
def test_numbers_beyond_float16_stay_finite(name: str) -> None:
    code = CODES[name]
    for size in (1e-9, 1e9):
        assert torch.isfinite(code.decode(code.encode(numbers() * size), 64)).all()


def test_channels_far_from_zero_cost_nothing_with_the_mean_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that differ by channel, as a model's own do."""
    method = get_method("packed", code="int4").bind(model())
    layers, heads, size = method.reader.kv_shape()
    middle = 20 * torch.randn(layers, heads, 1, size, generator=torch.Generator().manual_seed(1))
    held = KV(*[torch.randn(layers, heads, 9, size) + middle] * 2)
    monkeypatch.setitem(method.reader.model.__dict__, "_ccm_mean_key", middle)
    empty = method.inner.empty()
    memory = replace(empty, rows=(replace(empty.rows[0], slots=held),))
    slots = method.expanded(method.coded(memory)).rows[0].slots
    keys, values = (float((x - held.keys).norm()) for x in slots)
    assert 5 * keys < values  # values are as large, and have no mean of the model's


# ------------------------------------------------------------------ a memory in codes


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_adapters(
        tmp_path_factory.mktemp("adapters"), "llama", ["ccm-concat", "ccm-merge", "slots-and-words"]
    )


OTHERS = {
    "ccm-concat": {"sink": 2, "window": 6},
    "ccm-merge": {"sink": 2, "window": 6},
    "slots-and-words": {"sink": 2, "window": 6},
    "snapkv": {"tokens": 24, "sink": 2, "window": 6},
    "retrieve": {"tokens": 16, "block": 4, "sink": 2, "window": 6},
    "full": {},
    "summary": {"max_tokens": 4, "window": 6},
}


@pytest.mark.parametrize("of", OTHERS)
def test_any_memory_in_eight_bits_reads_nearly_as_it_was(of: str, adapters: dict[str, str]) -> None:
    options = OTHERS[of] | ({"adapter": adapters[of]} if of in adapters else {})
    plain = get_method(of, **options).bind(model(), TOKENIZER)
    asked = [SEGMENTS[-1]]
    read = plain.reader.logits(asked, plain.recall(lived(plain, SEGMENTS[:-1]), asked))
    nothing = plain.reader.logits(asked)
    far = {}
    for code in ("int8", "int4"):
        packed = get_method("packed", of=of, code=code, options=options).bind(model(), TOKENIZER)
        memory = lived(packed, SEGMENTS[:-1])
        assert memory.rows[0].slots.keys.dtype == torch.uint8
        assert (memory.length, memory.tokens) == (packed.expanded(memory).length, memory.tokens)
        far[code] = float((packed.reader.logits(asked, packed.recall(memory, asked)) - read).norm())
    assert far["int8"] <= far["int4"] and far["int8"] <= 0.1 * float((read - nothing).norm())


@pytest.mark.parametrize("code", CODES)
def test_bytes_are_those_of_the_tensors(code: str) -> None:
    options = {"slots": 12, "sink": 2, "window": 6}
    packed = get_method("packed", code=code, options=options).bind(model(), TOKENIZER)
    layers, heads, size = packed.reader.kv_shape()
    run = Run(packed)
    for segment in SEGMENTS:
        run.append(segment)
    (row,) = run.held.rows
    slots = 2 * layers * heads * CODES[code].width(size) * 12
    assert row.slots.nbytes == slots == sum(t.numel() for t in row.slots)
    assert run.held.nbytes == run.kv_bytes == slots + 8 * 2 * layers * heads * size * 4
    plain = Run(packed.inner)
    plain.held = packed.expanded(run.held)
    assert plain.kv_bytes - run.kv_bytes == 2 * layers * heads * (4 * size - CODES[code].width(size)) * 12
    session = Session(packed, TOKENIZER)
    session.append("a turn that is long enough to leave the window of six tokens")
    assert session.stats()["nbytes"] == session.memory.nbytes and session.stats()["slots"]


def test_at_equal_bytes_there_are_more_of_them() -> None:
    packed = get_method("packed", code="int4").bind(model(), TOKENIZER)
    size = packed.reader.kv_shape()[2]
    plain = packed.inner.sized(65)["slots"]
    more = packed.resized(**packed.sized(65))
    assert more.inner.slots == plain * size * 2 // get_code("int4").width(size) > 2 * plain


@pytest.mark.parametrize("dtype", codec.DTYPES)
def test_a_store_of_any_precision_keeps_the_codes(dtype: str) -> None:
    packed = get_method("packed", options={"slots": 4, "sink": 2, "window": 6}).bind(model(), TOKENIZER)
    one, other = (
        lived(packed, SEGMENTS[i : i + 3]) for i in (0, 2)
    )  # twins: neither has anything of the other
    data, _ = codec.encode(Memory.stack([one, other]), dtype)
    assert (
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["format"]
        == "ccm-snapshot/4"
    )
    back, _ = codec.decode(data)
    for twin, memory in zip((back[0], back[1]), (one, other), strict=True):
        (row,), (before,) = packed.admit(twin).rows, memory.rows
        assert all(torch.equal(x, y) for x, y in zip(row.slots, before.slots, strict=True))
    assert not torch.equal(back[0].rows[0].slots.keys, back[1].rows[0].slots.keys)


def test_slots_that_stay_have_the_codes_that_they_had(adapters: dict[str, str]) -> None:
    options = {"adapter": adapters["ccm-concat"], "sink": 2, "window": 0}
    packed = get_method("packed", of="ccm-concat", code="int4", options=options).bind(model(), TOKENIZER)
    before = packed.empty()
    for segment in SEGMENTS:
        after = packed.fold(before, [segment])
        old, new = before.rows[0].slots, after.rows[0].slots
        assert new.length == old.length + 3 and torch.equal(new.slice(0, old.length).keys, old.keys)
        assert torch.equal(new.slice(0, old.length).values, old.values)
        before = after


def test_codes_of_another_kind_are_refused() -> None:
    eight, four = (get_method("packed", code=code).bind(model(), TOKENIZER) for code in ("int8", "int4"))
    memory = lived(eight)
    for other in (four, eight.inner):
        with pytest.raises(MismatchError, match="attention-matching-int8"):
            other.admit(memory)
    with pytest.raises(MismatchError):
        eight.admit(lived(eight.inner))
    floats = replace(eight.expanded(memory), fingerprint=memory.fingerprint)
    with pytest.raises(MemoryFileError, match="expected codes"):
        eight.admit(floats)
    slots = memory.rows[0].slots
    wild = KV(torch.full_like(slots.keys, 255), slots.values)  # scales that are NaN
    with pytest.raises(MemoryFileError, match="NaN"):
        eight.admit(replace(memory, rows=(replace(memory.rows[0], slots=wild),)))


@pytest.mark.parametrize("part", ["sink", "window"])
def test_a_file_with_codes_in_place_of_raw_tokens_is_refused(part: str) -> None:
    memory = lived(get_method("packed", options={"sink": 2, "window": 6}).bind(model(), TOKENIZER))
    row = memory.rows[0]
    raw = KV(*(x.to(torch.uint8) for x in getattr(row, part)))
    data = memory_file.file_bytes([vars(replace(row, **{part: raw}))], memory.fingerprint, {})
    with pytest.raises(MemoryFileError, match="differ between its parts"):
        Memory.loads(data)


def test_as_it_is_written() -> None:
    method = parse("packed:of=snapkv,code=int4,options.tokens=12,sink=3").method()
    assert isinstance(method, Packed) and (method.inner.tokens, method.sink, method.window) == (12, 3, 64)
    assert parse(method.text).method() == method
    assert method.text == "packed:of=snapkv,code=int4,options.tokens=12,options.sink=3"
    assert replace(method, sink=5).inner.sink == 5
    with pytest.raises(UnknownNameError, match="int8"):
        parse("packed:code=int5").method()
    with pytest.raises(UnknownNameError, match="snapkv"):
        parse("packed:of=snapkw").method()
    with pytest.raises(ConfigError, match="not packed"):
        parse("packed:of=packed").method()
    with pytest.raises(ConfigError, match="unknown option token"):
        parse("packed:of=snapkv,options.token=12").method()


def test_an_encoder_decoder_holds_codes_too() -> None:
    packed = get_method("packed", of="streaming-llm", options={"sink": 2, "window": 6}).bind(
        two_sided_model()
    )
    assert packed.reader.two_sided
    memory = lived(packed, SEGMENTS[:3])
    assert torch.isfinite(packed.reader.logits([SEGMENTS[3]], packed.recall(memory))).all()
