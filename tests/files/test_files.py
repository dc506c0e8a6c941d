"""Files of every release and format: what was written once is read for ever, and what is newer is named as that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from tiny import history, random_rows, tiny_compressor, tiny_model, tiny_tokenizer

from ccm import cli
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import KV, Memory, Row
from ccm.errors import MemoryFileError, MismatchError
from ccm.files import memory_file
from ccm.files.fingerprint import mismatch
from ccm.methods import as_method
from ccm.methods.bits.codes import get_code
from ccm.serving.store import codec
from ccm.session import Session

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def header(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def counters(row: Row) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if not isinstance(value, KV)}


def kinds_of(row: Row) -> list[tuple[Any, ...]]:
    return [(kv.length, kv.keys.dtype) for kv in (row.sink, row.slots, row.window)]


def same(one: Memory, other: Memory) -> bool:
    pairs = [
        (x, y)
        for a, b in zip(one.rows, other.rows, strict=True)
        for part in memory_file.PARTS
        for x, y in zip(getattr(a, part), getattr(b, part), strict=True)
    ]
    return (
        one.fingerprint == other.fingerprint
        and [counters(row) for row in one.rows] == [counters(row) for row in other.rows]
        and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    )


# ------------------------------------------------------------------ what was written is read


def test_every_golden_file_is_told_of_and_read():
    told = (GOLDEN / "README.md").read_text().replace("PRECISION", "int8")
    for path in GOLDEN.iterdir():
        name = path.name.replace("float32", "int8").replace("bfloat16", "int8").replace("bint8", "int8")
        assert name == "README.md" or f"`{name}{'/' * path.is_dir()}`" in told
    for path in GOLDEN.glob("*.ccm"):
        assert len(Memory.load(path)[0]) == len(Memory.loads(path.read_bytes())[0]) > 0
    for path in GOLDEN.glob("*.bin"):
        assert len(codec.decode(path.read_bytes())[0]) > 0


def test_a_plain_memory_is_written_as_it_always_was():
    """Byte for byte what the release before format 2 wrote, though this one could write notes."""
    memory, metadata = Memory.load(GOLDEN / "memory-1.ccm")
    assert metadata["format"] == "ccm-memory/1" and len(memory) == 2
    assert counters(memory.rows[0]) == {
        "segments": (3,), "steps": 3, "tokens": 15, "dropped": 0, "merged": 10, "merged_segments": 2,
        "recent": (5,), "notes": (), "pinned": 0,
    }  # fmt: skip
    assert memory.dumps() == golden("memory-1.ccm")
    session, metadata = Memory.load(GOLDEN / "session-1.ccm")
    assert session.dumps({"session": metadata["session"]}) == golden("session-1.ccm")
    noted = replace(memory, rows=tuple(replace(row, notes=(1,)) for row in memory.rows))
    assert noted.dumps() != golden("memory-1.ccm")


def test_notes_are_kept_in_format_2():
    plain, _ = Memory.load(GOLDEN / "memory-1.ccm")
    memory, metadata = Memory.load(GOLDEN / "memory-2.ccm")
    assert metadata["format"] == "ccm-memory/2"
    assert [row.notes for row in memory.rows] == [(17, 3, 4), ()]
    assert same(plain, replace(memory, rows=tuple(replace(row, notes=()) for row in memory.rows)))
    assert memory.dumps() == golden("memory-2.ccm")
    for precision in codec.DTYPES:
        data, _ = codec.encode(memory, precision)
        assert header(data)["__metadata__"]["format"] == "ccm-snapshot/3"
        assert [row.notes for row in codec.decode(data)[0].rows] == [(17, 3, 4), ()]
    assert codec.decode(golden("snapshot-2-int8.bin"))[0].rows[0].notes == (17, 3, 4)
    assert memory.to("cpu", torch.bfloat16).rows[0].notes == (17, 3, 4)
    assert Memory.stack([memory, plain]).rows[0].notes == (17, 3, 4)


def test_codes_are_kept_in_formats_3_and_4():
    """As they are, at any precision of a snapshot."""
    plain, _ = Memory.load(GOLDEN / "memory-2.ccm")
    memory, metadata = Memory.load(GOLDEN / "memory-3.ccm")
    assert metadata["format"] == "ccm-memory/3" and memory.dumps() == golden("memory-3.ccm")
    for row, floats in zip(memory.rows, plain.rows, strict=True):
        for codes, numbers in zip(row.slots, floats.slots, strict=True):
            assert codes.dtype == torch.uint8
            back = get_code("int4").decode(codes, numbers.shape[3])
            assert torch.allclose(
                back, numbers, atol=0.13 * float(numbers.abs().max() if numbers.numel() else 0)
            )
    for precision in codec.DTYPES:
        back, _ = codec.decode(codec.encode(memory, precision)[0])
        assert [row.slots.keys.dtype for row in back.rows] == [torch.uint8] * 2
        assert all(
            torch.equal(x, y)
            for a, b in zip(memory.rows, back.rows, strict=True)
            for x, y in zip(a.slots, b.slots, strict=True)
        )
    stored, _ = codec.decode(golden("snapshot-4-float16.bin"))
    assert same(stored, codec.decode(codec.encode(memory, "float16")[0])[0])
    assert memory.to("cpu", torch.bfloat16).rows[0].slots.keys.dtype == torch.uint8


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_snapshots_of_every_precision_are_read(precision):
    memory, metadata = codec.decode(golden(f"snapshot-1-{precision}.bin"))
    whole, _ = codec.decode(golden("snapshot-1-float32.bin"))
    (row,) = memory.rows
    assert kinds_of(row) == [(2, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16)]
    assert counters(row) == counters(whole.rows[0]) and row.segments == (3,) and row.tokens == 15
    off = max(
        (a.float() - b.float()).norm() / b.float().norm()
        for a, b in zip(row.slots, whole.rows[0].slots, strict=True)
    )
    assert off == 0 if precision == "float32" else 1e-5 < off < 0.01
    assert metadata["dtype"] == precision and metadata["nbytes"] == len(golden(f"snapshot-1-{precision}.bin"))


def test_a_snapshot_that_lies_entry_behind_entry_is_read():
    """Slots that are running means keep all bits, the others are in half of them."""
    memory, metadata = codec.decode(golden("snapshot-3-float16.bin"))
    whole, _ = Memory.load(GOLDEN / "memory-2.ccm")
    assert metadata["dtype"] == "float16" and [row.notes for row in memory.rows] == [(17, 3, 4), ()]
    for row, right in zip(memory.rows, whole.rows, strict=True):
        assert kinds_of(row) == kinds_of(right) and counters(row) == counters(right)
        for x, y in zip(row.slots, right.slots, strict=True):
            assert torch.allclose(x, y, rtol=1e-3)
    first, right = memory.rows[0].slots.keys, whole.rows[0].slots.keys
    assert torch.equal(first[:, :, :2], right[:, :, :2]) and not torch.equal(first[:, :, 2:], right[:, :, 2:])
    assert codec.encode(whole, "float16", [2, 0])[0] == golden("snapshot-3-float16.bin")


def test_pins_are_kept_in_format_3():
    """And in snapshots of format 4."""
    plain, _ = Memory.load(GOLDEN / "memory-2.ccm")
    memory, metadata = Memory.load(GOLDEN / "memory-3-pins.ccm")
    assert metadata["format"] == "ccm-memory/3" and [row.pinned for row in memory.rows] == [2, 0]
    assert memory.rows[0].sink.length == plain.rows[0].sink.length + 2
    assert same(
        plain,
        replace(memory, rows=(memory.rows[0].with_pins(memory.rows[0].pins.slice(0, 0)), memory.rows[1])),
    )
    assert memory.dumps() == golden("memory-3-pins.ccm")
    snapshot = golden("snapshot-4-pins.bin")
    assert header(snapshot)["__metadata__"]["format"] == "ccm-snapshot/4"
    assert [row.pinned for row in codec.decode(snapshot)[0].rows] == [2, 0]
    assert codec.encode(memory, "float16", [2, 0])[0] == snapshot


def test_a_session_of_an_earlier_release_goes_on():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    compressor = Compressor(model, CompressorConfig(slots=2, sink=2, window=16))
    session = Session.load(GOLDEN / "session-1.ccm", compressor, tokenizer)
    assert session.turns == 2 and (session.method.slots, session.method.window) == (2, 16)
    session.append("and more")
    assert session.turns == 3 and session.memory.tokens > 10


def test_the_fields_of_a_row_are_those_of_the_format():
    """A new field of a row needs a new version of the format, and a golden file."""
    assert memory_file.NEWEST == {memory_file.FILE: 3, memory_file.SNAPSHOT: 4}
    assert {f.name for f in fields(Row)} == {*memory_file.PARTS, *memory_file.COUNTS, *memory_file.LISTS}


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize(
    "name, rule, recent, made",
    [
        ("adapter-first", "merge", (0, 0), "4559a4745a0e186a"),
        ("adapter-1", "bounded", (2, 6), "62605a38fdef1ee9"),
    ],
)
def test_adapters_of_earlier_releases_are_read(name, rule, recent, made):
    compressor = Compressor.from_pretrained(tiny_model(), GOLDEN / name)
    config = compressor.config
    assert (config.rule, (config.sink, config.window), config.rank) == (rule, recent, 2)
    kept = safetensors.load_file(GOLDEN / name / "comp_embeddings.safetensors")["comp_embeddings"]
    assert torch.equal(compressor.comp_embeddings.detach(), kept.float()) and kept.dtype == torch.bfloat16
    assert sum(p.float().abs().sum() for p in compressor.lora_parameters) > 10
    assert [known.partition("-")[2] for known in compressor.fingerprints()].count(made) == 1


def test_an_adapter_fits_a_model_with_added_tokens(tmp_path, caplog):
    """A tuned copy often has a few; what the adapter does to a text does not depend on them."""
    tiny_compressor(sink=2).save_pretrained(tmp_path / "adapter")
    grown = tiny_model()
    grown.resize_token_embeddings(grown.config.vocab_size + 3)
    rows = random_rows([[6, 4, 5]], seed=3)[0]
    one, other = (
        history(Compressor.from_pretrained(model, tmp_path / "adapter"), rows)
        for model in (tiny_model(), grown)
    )
    assert caplog.text.count("was trained on other weights") == 1
    assert torch.equal(one.rows[0].slots.keys, other.rows[0].slots.keys)
    for other in (tiny_model(num_key_value_heads=4), tiny_model("mistral")):
        with pytest.raises(
            MismatchError, match="hidden size 32, and other layers, heads, tokens or another fam"
        ):
            Compressor.from_pretrained(other, tmp_path / "adapter")


# ------------------------------------------------------------------ who made a memory


def test_a_rule_has_one_fingerprint_whatever_it_is_called():
    """One folds on what the other made, bit for bit."""
    rows = random_rows([[6, 4, 5, 3]], seed=3)[0]
    merge, mean, ema = (tiny_compressor(rule=rule, sink=2) for rule in ("merge", "mean", "ema"))
    assert merge.fingerprint() == mean.fingerprint() != ema.fingerprint()
    assert len(merge.fingerprints()) == 2 and len(ema.fingerprints()) == 1
    memory = history(merge, rows[:2])
    one, other = (history(compressor, rows) for compressor in (merge, mean))
    for segment in rows[2:]:
        memory = mean.compress([segment], memory)
    assert same(memory, one) and same(one, other)
    with pytest.raises(MismatchError, match="this is the same model and adapter"):
        ema.check(memory)


@pytest.mark.parametrize("rule", ["merge", "mean"])
def test_a_memory_that_carries_the_aliass_old_hash_goes_on(rule):
    """``memory-first.ccm`` says "merge" in its hash. It batches with new ones, once it is admitted."""
    compressor = Compressor.from_pretrained(tiny_model(), GOLDEN / "adapter-first", rule=rule)
    method = as_method(compressor)
    old, _ = Memory.load(GOLDEN / "memory-first.ccm")
    new = history(compressor, random_rows([[6, 4, 5]], seed=3)[0], window=6, sink=2)
    assert old.fingerprint != new.fingerprint == compressor.fingerprint()
    compressor.check(old, 1)
    for part in memory_file.PARTS:
        for a, b in zip(getattr(old.rows[0], part), getattr(new.rows[0], part), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(MismatchError, match=r"cannot stack memories made by model .* and by model"):
        Memory.stack([old, new])
    both = Memory.stack([method.admit(old), new])
    after = compressor.compress([[5] * 4, [5] * 4], both, window=6, sink=2)
    assert torch.allclose(after.rows[0].slots.keys, after.rows[1].slots.keys, atol=1e-4)


def test_a_memory_of_another_shape_is_not_admitted():
    """Whatever fingerprint it carries."""
    compressor = tiny_compressor()
    kv = KV(*torch.zeros(2, 3, 2, 1, 4))
    forged = Memory((Row(kv, kv, kv, (1,)),), compressor.fingerprint())
    with pytest.raises(MemoryFileError, match=r"the memory's sink is \(3, 2, 4\), expected \(3, 2, 8\)"):
        as_method(compressor).admit(forged)


HASH = "4559a4745a0e186a"


MISMATCHES = [
    ("a.b-snapkv", f"a.b-{HASH}", "method snapkv, this is the same model and adapter 4559"),
    ("a.b-snapkv", f"a.b-{HASH}", "; open it with method snapkv (--memory)"),
    (
        f"a.b-{HASH}",
        "a.b-tova",
        f"adapter {HASH}, this is the same model and method tova; open it with adapter 4559",
    ),
    (
        "a.b-mean-pool",
        "a.c-tova",
        "model a.b and method mean-pool, this is model a.c and method tova; load the model",
    ),
    (
        f"a.b-{HASH}-int4",
        f"a.b-{HASH}-int8",
        f"adapter {HASH}-int4, this is the same model and adapter {HASH}-int8",
    ),
    ("a.b-mean-pool-int4", f"a.b-{HASH}", "method mean-pool-int4, this is"),
    (f"a.b-{HASH}", "a.c", f"model a.b and adapter {HASH}, this is model a.c; load the model that made it"),
]


@pytest.mark.parametrize("got, expected, words", MISMATCHES)
def test_another_maker_is_told_of_in_one_line(got, expected, words):
    said = str(mismatch(got, expected))
    assert words in said and said.endswith(", or start a new memory") and "\n" not in said


def test_memory_inspect_says_who_made_it(tmp_path, capsys):
    memory, _ = Memory.load(GOLDEN / "memory-2.ccm")
    replace(memory, fingerprint="a.b-snapkv").save(tmp_path / "m.ccm")
    assert cli.main(["memory", "inspect", str(tmp_path / "m.ccm")]) == 0
    shown = capsys.readouterr().out
    assert "made by model a.b and method snapkv" in shown and "notes" in shown
    assert cli.main(["memory", "inspect", str(tmp_path / "m.ccm"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["fingerprint"]) == ("ccm-memory/2", "a.b-snapkv")
    assert [row["notes"] for row in result["rows"]] == [3, 0]


# ------------------------------------------------------------------ what is newer is named as that


def rewritten(data: bytes, change: Callable[[dict[str, str], list[dict[str, Any]]], None]) -> bytes:
    """A file with other metadata, and a digest that fits."""
    tensors, metadata = safetensors.load(data), header(data)["__metadata__"]
    del metadata["digest"]
    rows = json.loads(metadata["rows"])
    change(metadata, rows)
    metadata["rows"] = json.dumps(rows)
    metadata["digest"] = memory_file.content_digest(tensors, metadata)
    return safetensors.save(tensors, metadata)


def read(name: str, data: bytes) -> Memory:
    return (Memory.loads if name.endswith(".ccm") else codec.decode)(data)[0]


NEWER: dict[str, Callable[[dict[str, str], list[dict[str, Any]]], None]] = {
    "version": lambda m, r: m.update(format=m["format"][:-1] + "5"),
    "far version": lambda m, r: m.update(format=m["format"][:-1] + "120"),
    "counter": lambda m, r: r[-1].update(forgotten=3),
}


@pytest.mark.parametrize("change", NEWER)
@pytest.mark.parametrize("name", ["memory-1.ccm", "memory-2.ccm", "session-1.ccm", "snapshot-1-int8.bin"])
def test_what_a_newer_ccm_wrote_is_said_to_be_that(name, change, tmp_path):
    assert len(read(name, rewritten(golden(name), lambda m, r: None)))  # the forger could make a good one
    data = rewritten(golden(name), NEWER[change])
    with pytest.raises(
        MemoryFileError, match=r"written by a newer ccm: .*; read it with that version"
    ) as caught:
        read(name, data)
    assert "\n" not in str(caught.value)
    if name.endswith(".ccm"):
        (tmp_path / "m.ccm").write_bytes(data)
        with pytest.raises(MemoryFileError, match=r"m\.ccm: this memory was written by a newer ccm"):
            Memory.load(tmp_path / "m.ccm")


DAMAGED: dict[str, tuple[Callable[[dict[str, str], list[dict[str, Any]]], None], str]] = {
    "version 0": (lambda m, r: m.update(format=m["format"][:-1] + "0"), "its format is"),
    "no version": (lambda m, r: m.update(format="ccm-memory"), "its format is 'ccm-memory', expected"),
    "long version": (lambda m, r: m.update(format=m["format"][:-1] + "9" * 5000), "its format is"),
    "notes": (lambda m, r: r[0].update(notes=[1, -1]), "impossible counters"),
    "notes of text": (lambda m, r: r[0].update(notes="12"), "impossible counters"),
    "window": (lambda m, r: r[0].update(segments=[1]), "its segments are not its window"),
    "no fingerprint": (lambda m, r: m.pop("fingerprint"), "KeyError: 'fingerprint'"),  # type: ignore[arg-type]
    "no digest of rows": (lambda m, r: r.clear(), "rows are not as expected"),
}


@pytest.mark.parametrize("change", DAMAGED)
def test_a_forged_file_is_trusted_as_little_as_a_snapshot(change, tmp_path):
    """A file that somebody made who knows how to make a digest."""
    make, message = DAMAGED[change]
    data = rewritten(golden("memory-2.ccm"), make)
    (tmp_path / "m.ccm").write_bytes(data)
    for reads in (lambda: Memory.loads(data), lambda: Memory.load(tmp_path / "m.ccm")):
        with pytest.raises(MemoryFileError, match=message) as caught:
            reads()
        assert len(str(caught.value)) < 500


def test_nothing_is_allocated_for_what_a_file_claims(monkeypatch, tmp_path):
    data = golden("memory-1.ccm")
    size = 8 + int.from_bytes(data[:8], "little")
    monkeypatch.setattr(memory_file, "_views", lambda *args: pytest.fail("allocated too early"))
    for shape in ([1 << 40, 2, 6, 8], [3, 2, 1 << 62, 8], [3, 2, 6], None):
        claims = header(data)
        claims["0.slots.keys"]["shape"] = shape
        text = json.dumps(claims).encode()
        (tmp_path / "m.ccm").write_bytes(len(text).to_bytes(8, "little") + text + data[size:])
        with pytest.raises(MemoryFileError, match=r"m\.ccm: this is no usable stored memory"):
            Memory.load(tmp_path / "m.ccm")
    (tmp_path / "m.ccm").write_bytes(b"")
    with pytest.raises(MemoryFileError, match="no usable stored memory"):
        Memory.load(tmp_path / "m.ccm")
    with pytest.raises(MemoryFileError, match=f"of {len(data)} bytes, the limit is 100"):
        Memory.loads(data, 100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_comes_back(dtype):
    kv = KV(*torch.randn(2, 2, 1, 3, 4).to(dtype))
    memory = Memory((Row(kv, kv.to(torch.float32), kv, (3,)),), "print")
    assert same(Memory.loads(memory.dumps())[0], memory)
    assert same(codec.decode(codec.encode(memory)[0])[0], memory)
