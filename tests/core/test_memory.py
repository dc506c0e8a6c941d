"""Rules by hand, rotation, and the memory as a value: batched, saved, loaded, refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import history, pad, random_rows, tiny_compressor, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from ccm.core.compressor import Compressor
from ccm.core.folding import counted
from ccm.core.live import Live
from ccm.core.memory import KV, Memory
from ccm.core.reader import Reader
from ccm.core.rotary import rotate, unrotate
from ccm.core.rule import RULES, get_rule
from ccm.errors import ConfigError, MemoryFileError, MismatchError, StorageError
from ccm.files import memory_file
from ccm.methods.accounting import describe

SEGMENTS = random_rows([[6, 9, 4, 5], [5], [], [8, 3, 7]], seed=3)
PROMPTS = random_rows([[5, 8, 3, 6]], seed=4)[0]


# ---------------------------------------------------------------------- rules


def block(*numbers: float) -> torch.Tensor:
    """A block of slots with one channel: (1, 1, n, 1)."""
    return torch.tensor(numbers).view(1, 1, -1, 1)


FOUR = [block(1, 10), block(3, 30), block(8, 80), block(4, 40)]


def states(name: str, **options) -> list[list[float]]:
    """Every state of the memory, folded one by one."""
    rule, slots, result = get_rule(name, **options), torch.empty(1, 1, 0, 1), []
    for step, new in enumerate(FOUR, 1):
        slots = rule.update(slots, new, step)
        assert slots.shape[2] == rule.size(step, new.shape[2])
        result.append(slots.flatten().tolist())
    return result


BY_HAND = [
    ("concat", {}, [[1, 10], [1, 10, 3, 30], [1, 10, 3, 30, 8, 80], [1, 10, 3, 30, 8, 80, 4, 40]]),
    ("mean", {}, [[1, 10], [2, 20], [4, 40], [4, 40]]),
    ("merge", {}, [[1, 10], [2, 20], [4, 40], [4, 40]]),
    ("ema", {"weight": 0.5}, [[1, 10], [2, 20], [5, 50], [4.5, 45]]),
    ("replace", {}, [[1, 10], [3, 30], [8, 80], [4, 40]]),
    (
        "bounded",
        {"blocks": 2, "overflow": "drop"},
        [[1, 10], [1, 10, 3, 30], [3, 30, 8, 80], [8, 80, 4, 40]],
    ),
    (
        "bounded",
        {"blocks": 2, "overflow": "merge"},
        [[1, 10], [1, 10, 3, 30], [2, 20, 8, 80], [4, 40, 4, 40]],
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_rules_by_hand(name, options, expected):
    assert states(name, **options) == [pytest.approx(state) for state in expected]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_columns_of_the_parallel_pass_are_the_states(name, options, expected):
    rule = get_rule(name, **options)
    columns = rule.columns(torch.stack(FOUR, 2)).flatten().tolist()
    first, last, place = rule.placed(len(FOUR), 2)
    assert len(columns) == len(first) == len(last) == len(place)
    for step, state in enumerate(expected, 1):
        seen = (first <= step) & (step <= last)
        assert [c for c, s in zip(columns, seen.tolist(), strict=True) if s] == pytest.approx(state)
        assert place[seen].tolist() == list(range(len(state)))


@pytest.mark.parametrize("overflow", ["merge", "drop"])
def test_a_bounded_memory_with_room_takes_the_columns_of_concat(overflow):
    bounded, concat = get_rule("bounded", blocks=4, overflow=overflow), get_rule("concat")
    assert torch.equal(bounded.columns(torch.stack(FOUR, 2)), concat.columns(torch.stack(FOUR, 2)))
    assert len(bounded.placed(4, 2).place) == 8 and len(bounded.placed(6, 2).place) == 8 + 2 * 8


def test_sizes_do_not_grow_unless_they_should():
    grown = {name: get_rule(name).size(1000, 4) for name in RULES}
    assert grown == {"concat": 4000, "mean": 4, "merge": 4, "ema": 4, "replace": 4, "bounded": 64}
    assert all(get_rule(name).size(0, 4) == 0 for name in RULES)


@pytest.mark.parametrize("rule", ["mean", "ema"])
def test_merging_is_done_in_one_phase(rule):
    """The slots of a conversation are the rule applied to position-free blocks, whatever place they came from."""
    compressor = tiny_compressor(rule=rule)
    same = [SEGMENTS[0][0]] * 2
    one, two = history(compressor, same[:1]), history(compressor, same)
    alone = tiny_compressor(rule="replace")
    second = history(alone, same).rows[0].slots  # what the second fold made, by itself
    weight = {"mean": 0.5, "ema": 0.3}[rule]
    for i in range(2):
        first = one.rows[0].slots[i]
        torch.testing.assert_close(
            two.rows[0].slots[i], first + weight * (second[i] - first), rtol=0, atol=1e-6
        )


def test_dropped_tokens_are_counted():
    compressor = tiny_compressor(rule="bounded", rule_options={"blocks": 2, "overflow": "drop"})
    memory = history(compressor, SEGMENTS[0])  # 6, 9, 4 and 5 tokens
    assert (memory.steps, memory.tokens, memory.rows[0].dropped, memory.slots) == (4, 24, 15, 4)
    compressor = tiny_compressor(rule="bounded", rule_options={"blocks": 2, "overflow": "merge"})
    memory = history(compressor, SEGMENTS[0])
    assert (memory.steps, memory.tokens, memory.rows[0].dropped, memory.slots) == (4, 24, 0, 4)


@pytest.mark.parametrize(
    ("rule", "options", "merged", "reach"),
    [  # 6, 9, 4 and 5 tokens; merged: segments and tokens after each
        ("concat", {}, [(0, 0)] * 4, [6, 15, 19, 24]),
        ("mean", {}, [(0, 0), (2, 15), (3, 19), (4, 24)], [6, 0, 0, 0]),
        ("ema", {}, [(0, 0), (2, 15), (3, 19), (4, 24)], [6, 0, 0, 0]),
        ("bounded", {"blocks": 2}, [(0, 0), (0, 0), (2, 15), (3, 19)], [6, 15, 4, 5]),
        ("bounded", {"blocks": 3}, [(0, 0), (0, 0), (0, 0), (2, 15)], [6, 15, 19, 9]),
        ("bounded", {"blocks": 2, "overflow": "drop"}, [(0, 0)] * 4, [6, 15, 13, 9]),
    ],
)
def test_what_is_merged_is_counted(rule, options, merged, reach):
    compressor, memory = tiny_compressor(rule=rule, rule_options=options), None
    for k, segment in enumerate(SEGMENTS[0]):
        memory = compressor.compress([segment], memory)
        (row,) = memory.rows
        assert (row.merged_segments, row.merged) == merged[k]
        assert row.reach == reach[k]
        if rule != "concat":
            assert row.merged + row.dropped + sum(row.recent) == row.tokens
            assert len(row.recent) == compressor.rule.apart(row.steps)
    held = compressor.compress([SEGMENTS[0][0]], memory, window=6)
    assert held.rows[0].reach == reach[-1] + 6  # raw tokens can be told apart


@pytest.mark.parametrize("name", RULES)
def test_segments_that_count_as_apart_have_slots_of_their_own(name):
    options = {"blocks": 2} if name == "bounded" else {}
    rule, blocks = get_rule(name, **options), [b.flatten().tolist() for b in FOUR[:3]]
    for step, state in enumerate(states(name, **options)[:3], 1):
        apart = rule.apart(step)
        held = [state[k : k + 2] for k in range(0, len(state), 2)]
        assert held[len(held) - apart :] == blocks[step - apart : step]
        if name != "replace":  # its last block stands for all, as it has read the one before
            assert all(block not in blocks for block in held[: len(held) - apart])


# ---------------------------------------------------------------------- rotation


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("size", [4, 8])
def test_unrotate_is_the_inverse_of_rotate(scale, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 8, generator=generator)
    angle = torch.arange(50).unsqueeze(1) * 0.7 ** torch.arange(size // 2)
    cos, sin = (scale * t.repeat(1, 2) for t in (angle.cos(), angle.sin()))
    torch.testing.assert_close(unrotate(rotate(x, cos, sin), cos, sin), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(unrotate(x, cos, sin), cos, sin), x, rtol=0, atol=1e-5)
    assert torch.equal(rotate(x, cos, sin)[..., size:], x[..., size:])  # partial rotary
    norm = x[..., :size].norm(dim=-1) * scale
    torch.testing.assert_close(rotate(x, cos, sin)[..., :size].norm(dim=-1), norm)

    half = rotate(x.bfloat16(), cos, sin)
    free = unrotate(half, cos, sin)
    assert half.dtype == torch.bfloat16 and free.dtype == torch.float32
    error = (free - x).norm(dim=-1) / x.norm(dim=-1)
    assert error.max() < 9e-3  # two roundings to 8 bits


def test_our_rotation_is_that_of_the_model():
    compressor = tiny_compressor("phi3")
    model, ids = compressor.model, torch.tensor([PROMPTS[1]])
    seen = {}
    projection = model.model.layers[0].self_attn.qkv_proj
    handle = projection.register_forward_hook(lambda m, a, out: seen.update(qkv=out))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    handle.remove()
    before = seen["qkv"][..., 32:48].view(1, -1, 2, 8).transpose(1, 2)
    cos, sin, _ = compressor.rotary.stacked(torch.arange(ids.shape[1]))
    torch.testing.assert_close(rotate(before[0], cos[0], sin[0]), cache.layers[0].keys[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("sizes", [{}, {"sink": 2, "window": 10}], ids=["plain", "window"])
@pytest.mark.parametrize("rule", ["concat", "mean", "bounded"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_a_batch_of_memories_equals_each_alone(family, rule, sizes):
    options = {"blocks": 2} if rule == "bounded" else {}
    compressor = tiny_compressor(family, rule=rule, rule_options=options)
    memories = [history(compressor, s, **sizes) if s else compressor.empty() for s in SEGMENTS]
    batch = Memory.stack(memories)
    assert len(batch) == 4 and len({(row.steps, row.length) for row in batch.rows}) > 2
    for side in ("left", "right"):
        ids, mask = pad(PROMPTS, side)
        logits = compressor.logits(ids, batch, mask)
        grown = compressor.compress(ids, batch, mask, **sizes)
        for r, prompt in enumerate(PROMPTS):
            expected = compressor.logits([prompt], memories[r])[0]
            torch.testing.assert_close(logits[r][mask[r].bool()], expected, rtol=0, atol=1e-4)
            same_memory(grown[r], compressor.compress([prompt], memories[r], **sizes), atol=1e-4)


def same_memory(a: Memory, b: Memory, atol: float = 0.0) -> None:
    for ours, theirs in zip(a.rows, b.rows, strict=True):
        assert (ours.segments, ours.steps, ours.tokens, ours.dropped, ours.recent) == (
            theirs.segments,
            theirs.steps,
            theirs.tokens,
            theirs.dropped,
            theirs.recent,
        )
        for name in ("sink", "slots", "window"):
            for x, y in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                assert x.dtype == y.dtype and x.shape == y.shape
                torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_stack_and_index():
    compressor = tiny_compressor()
    memories = [history(compressor, s) for s in SEGMENTS if s]
    batch = Memory.stack(memories)
    assert [m.slots for m in batch] == [m.slots for m in memories] == [8, 2, 6]
    assert (batch.slots, batch.steps, batch.tokens) == (8, 4, sum(m.tokens for m in memories))
    assert batch.nbytes == sum(m.nbytes for m in memories)
    for r, memory in enumerate(memories):
        same_memory(batch[r], memory)
    other = tiny_compressor(slots=3)
    with pytest.raises(MismatchError, match="cannot stack memories made by model"):
        Memory.stack([memories[0], history(other, SEGMENTS[0])])
    with pytest.raises(ConfigError, match="2 rows of tokens for a memory of 3"):
        compressor.logits([[1], [2]], batch)


def test_a_memory_is_a_value():
    compressor = tiny_compressor(rule="mean")
    old = history(compressor, SEGMENTS[0][:2], window=8)
    copies = [t.clone() for kv in (old.rows[0].slots, old.rows[0].window) for t in kv]
    compressor.compress([SEGMENTS[0][2]], old, window=8)
    compressor.generate([PROMPTS[0]], old, max_new_tokens=3)
    now = [t for kv in (old.rows[0].slots, old.rows[0].window) for t in kv]
    assert all(map(torch.equal, copies, now))


def test_sizes_are_measured_bytes():
    compressor = tiny_compressor(rule="mean")
    memory = history(compressor, SEGMENTS[0], sink=3, window=6)
    row = memory.rows[0]
    assert (row.sink.length, row.slots.length, row.window.length, row.segments) == (3, 2, 5, (5,))
    assert memory.nbytes == (3 + 2 + 5) * 2 * 3 * 2 * 8 * 4  # entries, K and V, layers, heads, channels, fp32
    assert memory.length * compressor.kv_bytes_per_token() == memory.nbytes
    assert describe(memory) == [
        {
            "pinned": 0,
            "sink": 3,
            "slots": 2,
            "window": 5,
            "steps": 3,
            "tokens_folded": 19,
            "tokens_dropped": 0,
            "tokens_merged": 19,
            "segments_merged": 3,
            "reach": 5,
            "notes": 0,
            "nbytes": memory.nbytes,
        }
    ]


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return tiny_compressor("llama", rule="mean", sink=2, window=8)


@pytest.fixture(scope="module")
def file(compressor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    Memory.stack([history(compressor, SEGMENTS[0]), history(compressor, SEGMENTS[1])]).save(path)
    return path


def test_save_load_continue_equals_never_having_saved(compressor, tmp_path):
    """Bit for bit, saving after every segment."""
    path, kept, saved = tmp_path / "m", None, None
    for segment in SEGMENTS[0]:
        assert torch.equal(compressor.logits([segment], kept), compressor.logits([segment], saved))
        kept, saved = compressor.compress([segment], kept), compressor.compress([segment], saved)
        saved.save(path, {"note": "kept"})
        saved, metadata = Memory.load(path)
        same_memory(saved, kept)
        assert metadata["note"] == "kept"
    assert saved.fingerprint == kept.fingerprint
    assert os.listdir(tmp_path) == ["m"]


def test_rows_that_share_storage_are_saved(compressor, tmp_path):
    """A batch, and one conversation twice: safetensors refuses tensors of one storage."""
    first = compressor.compress([[1, 2, 3, 4], [5, 6, 7, 8]])
    batch = compressor.compress([[3, 2, 1], [8, 7, 6]], first, sink=2, window=5)
    for memory in (first, batch, Memory.stack([batch, batch])):
        memory.save(tmp_path / "m.ccm")
        loaded, _ = Memory.load(tmp_path / "m.ccm")
        assert len(loaded) == len(memory)
        for one, other in zip(memory.rows, loaded.rows, strict=True):
            assert torch.equal(one.slots.keys, other.slots.keys)
            assert torch.equal(one.window.values, other.window.values)


def test_save_and_load_keep_bf16_windows(tmp_path):
    model = tiny_model().bfloat16()
    memory = Reader(model).empty()
    memory.save(tmp_path / "m")
    row = Memory.load(tmp_path / "m")[0].rows[0]
    assert (row.window.keys.dtype, row.slots.keys.dtype) == (torch.bfloat16, torch.float32)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused(file, data):
    good = file.read_bytes()
    kind = data.draw(st.sampled_from(["truncate", "flip", "header", "overwrite", "append"]))
    bad = bytearray(good)
    if kind == "truncate":
        del bad[data.draw(st.integers(0, len(good) - 1)) :]
    elif kind == "append":
        bad += data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "overwrite":
        start = data.draw(st.integers(0, len(good) - 64))
        bad[start : start + 64] = data.draw(st.binary(min_size=64, max_size=64))
    else:
        last = 8 + int.from_bytes(good[:8], "little") if kind == "header" else len(good)
        bad[data.draw(st.integers(0, last - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if bytes(bad) == good:
        return
    damaged = file.with_name("damaged")
    damaged.write_bytes(bad)
    with pytest.raises(MemoryFileError):
        Memory.load(damaged)


GOLDEN = Path(__file__).parent.parent / "golden"


def test_a_file_from_before_merged_tokens_were_counted_loads_and_goes_on():
    """Four folds of 6, 9, 4 and 5 tokens into three blocks, and 7 raw tokens: saved without ``merged``."""
    memory, metadata = Memory.load(GOLDEN / "memory-without-merged.ccm")
    (row,) = memory.rows
    assert json.loads(metadata["session"])["turns"] == 5
    assert (row.steps, row.tokens, row.segments, row.slots.length) == (4, 24, (7,), 6)
    assert (row.merged, row.merged_segments, row.recent) == (0, 0, ())

    compressor = tiny_compressor(rule="bounded", rule_options={"blocks": 3})
    found = counted(row, compressor.rule)  # lengths are gone: 24 tokens in four segments are 6 each
    assert (found.merged, found.merged_segments, found.recent, found.reach) == (12, 2, (6, 6), 19)
    assert counted(found, compressor.rule) is found
    memory = replace(memory, fingerprint=compressor.fingerprint())
    (row,) = compressor.compress([[5] * 3], memory, window=8).rows
    assert (row.merged, row.merged_segments, row.recent, row.reach) == (18, 3, (6, 7), 16)


def test_a_file_of_a_newer_version_is_named_as_that(file, tmp_path):
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del metadata["digest"]

    def written(**changes: str) -> Path:
        changed = {**metadata, **changes}
        changed["digest"] = memory_file.content_digest(tensors, changed)
        save_file(tensors, tmp_path / "m", changed)
        return tmp_path / "m"

    rows = json.loads(metadata["rows"])
    assert len(Memory.load(written())[0]) == 2  # the forger could make a good one
    newer = written(rows=json.dumps([{**row, "forgotten": 3} for row in rows]))
    with pytest.raises(MemoryFileError, match="written by a newer ccm: row 0 counts 'forgotten'"):
        Memory.load(newer)
    with pytest.raises(MemoryFileError, match="written by a newer ccm: its format is 'ccm-memory/4'"):
        Memory.load(written(format="ccm-memory/4"))


def test_missing_and_foreign_files_are_refused(tmp_path, compressor):
    with pytest.raises(MemoryFileError, match="no memory file"):
        Memory.load(tmp_path / "nothing")
    with pytest.raises(MemoryFileError, match="no usable stored memory"):
        Memory.load(tmp_path)
    (tmp_path / "text").write_text("a memory, honestly")
    with pytest.raises(MemoryFileError, match="no usable stored memory"):
        Memory.load(tmp_path / "text")
    compressor.save_pretrained(tmp_path)
    with pytest.raises(MemoryFileError, match="its format is 'pt', expected 'ccm-memory'"):
        Memory.load(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["sink", "slots", "window"])
def test_nan_is_refused(compressor, tmp_path, monkeypatch, part, value):
    path = tmp_path / "m"
    history(compressor, SEGMENTS[1]).save(path)
    before = path.read_bytes()
    memory = history(compressor, SEGMENTS[0])
    kv: KV = getattr(memory.rows[0], part)
    kv.values[1, 0, 0, 3] = value
    with pytest.raises(MemoryFileError, match=f"{part} holds NaN"):
        memory.save(path)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:  # someone else wrote it
        patch.setattr(Memory, "check_finite", lambda self: None)
        memory.save(path)
    with pytest.raises(MemoryFileError, match=f"{part} holds NaN"):
        Memory.load(path)


def test_the_wrong_model_or_adapter_is_refused(file, compressor):
    memory = Memory.load(file)[0]
    compressor.check(memory, 2)
    same_weights = tiny_compressor("llama", rule="mean", sink=2, window=8)
    same_weights.check(memory, 2)
    others = [
        tiny_compressor("llama", rule="concat", sink=2, window=8),
        tiny_compressor("llama", rule="mean", sink=2, window=8, model={"seed": 1}),
        tiny_compressor("qwen2", rule="mean", sink=2, window=8),
    ]
    with torch.no_grad():
        same_weights.comp_embeddings[0, 0] += 1  # another adapter
    for other in (*others, same_weights):
        with pytest.raises(MismatchError, match="the memory was made by"):
            other.logits([[5], [6]], memory)
    with pytest.raises(MismatchError):
        others[0].compress([[5], [6]], memory)
    with pytest.raises(MismatchError):
        others[0].generate([[5], [6]], memory)
    # the base model itself reads what any adapter of it has made
    assert torch.equal(
        Reader(compressor.model).logits([[5], [6]], memory), compressor.logits([[5], [6]], memory)
    )


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_no_space_leaves_the_old_file(compressor, tmp_path, monkeypatch, call):
    path = tmp_path / "m"
    old = history(compressor, SEGMENTS[1])
    old.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="No space left on device"):
            history(compressor, SEGMENTS[0]).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m"]
    same_memory(Memory.load(path)[0], old)
    with pytest.raises(StorageError, match="No such file or directory"):
        old.save(tmp_path / "no" / "such" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        old.save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "m"]


def test_the_file_appears_in_one_step(compressor, tmp_path, monkeypatch):
    """At the moment of the rename, the old file is whole and the new one is complete."""
    path = tmp_path / "m"
    old, new = history(compressor, SEGMENTS[1]), history(compressor, SEGMENTS[0])
    old.save(path)
    rename, seen = os.replace, []

    def watch(source, target):
        same_memory(Memory.load(path)[0], old)
        same_memory(Memory.load(source)[0], new)
        seen.append(Path(source).parent)
        rename(source, target)

    monkeypatch.setattr(os, "replace", watch)
    new.save(path)
    assert seen == [tmp_path]  # same folder, hence the same file system
    same_memory(Memory.load(path)[0], new)


def test_everything_works_under_inference_mode() -> None:
    with torch.inference_mode():
        compressor = tiny_compressor("llama", slots=2, rule="mean", window=4, sink=1)
        memory = compressor.compress([[5, 6, 7, 8, 9, 10]])
        memory = compressor.compress([[11, 12, 13]], memory)
        ids = compressor.generate([[4, 5]], memory, max_new_tokens=3, do_sample=False)
    assert memory.slots == 2 and ids.shape[1] <= 5
    compressor.check(memory)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_memory_is_placed_layer_by_layer_as_a_whole(family):
    """Also where layers rotate in several ways."""
    compressor = tiny_compressor(family, window=8, sink=2)
    (row,) = compressor.compress([list(range(5, 25))], compressor.compress([list(range(5, 25))])).rows
    whole, positions = KV.cat((row.sink, row.slots, row.window)), torch.arange(row.length)
    placed = row.placed(compressor.rotary, torch.float32)
    assert torch.equal(placed.keys, rotate(whole.keys, *compressor.rotary.stacked(positions)))
    assert torch.equal(placed.values, whole.values)


@torch.inference_mode()
def test_a_cache_is_filled_without_a_second_one_beside_it():
    """Of many rows a layer at a time is copied, and what comes behind them is written where they lie."""
    compressor = tiny_compressor(window=8, sink=2)
    ids = torch.randint(3, 90, (16, 40))
    memory = compressor.compress(ids, window=40, sink=2)
    largest = operations = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest, operations
            out = func(*args, **(kwargs or {}))
            if (
                func.overloadpacket.__name__ != "new_zeros"
                and not func.is_view
                and isinstance(out, torch.Tensor)
            ):
                largest, operations = max(largest, out.nbytes), operations + 1
            return out

    with Sizes():
        live = Live.over(memory, compressor.rotary, torch.float32)
    layers = live.cache.layers
    assert largest <= memory.nbytes / 16 / len(layers)  # of a row in one layer
    assert operations <= 16 * (13 + 9 * len(layers))
    places = [layer.keys.data_ptr() for layer in layers]
    live, call = live.ahead(torch.ones(16, 3, dtype=torch.bool))
    compressor.model(input_ids=ids[:, :3], **call)
    assert [layer.keys.data_ptr() for layer in layers] == places
