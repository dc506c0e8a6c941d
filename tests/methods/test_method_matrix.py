"""What every method of the registry must do, on tiny models of families that differ in their attention."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from engine_contract import check_many_at_a_time
from method_cases import NAMES, PACKED, TOKENIZER, model, small_method, tiny_adapters
from tiny import random_rows

from ccm import Session, get_method
from ccm.core.memory import Memory
from ccm.errors import ConfigError, MismatchError
from ccm.methods import Method
from ccm.methods.accounting import most_nbytes
from ccm.methods.base import METHODS
from ccm.methods.bits.packed import Packed
from ccm.methods.compressed import Compressed, Trained
from ccm.methods.selection.evict import Evict
from ccm.methods.text.summary import Summary
from ccm.serving.engine import PaddedEngine

FAMILIES = ["llama", "gemma3_text", "gpt_neox"]  # plain; layers that slide; partial rotary
#: Three conversations of five segments each.
ROWS = random_rows([[6, 9, 5, 7, 8], [4, 3, 11, 2, 6], [12, 1, 4, 9, 3]])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model and the adapters for it."""
    return model(request.param), tiny_adapters(tmp_path_factory.mktemp("adapters"), request.param)


@pytest.fixture(params=[*NAMES, *PACKED])
def method(request: pytest.FixtureRequest, case) -> Method:
    of, adapters = case
    return small_method(request.param, adapters).bind(of, TOKENIZER)


def lived(method: Method, segments: list[list[int]], memory: Memory | None = None) -> Memory:
    memory = method.empty() if memory is None else memory
    for segment in segments:
        memory = method.fold(memory, [segment])
    return memory


def parts(memory: Memory, r: int = 0) -> list[torch.Tensor]:
    row = memory.rows[r]
    return [*row.sink, *row.slots, *row.window]


def same(a: Memory, b: Memory) -> bool:
    """To the last bit, with all counters."""
    counters = [
        [(r.segments, r.steps, r.tokens, r.dropped, r.merged, r.notes) for r in m.rows] for m in (a, b)
    ]
    tensors = zip(parts(a), parts(b), strict=True)
    return counters[0] == counters[1] and all(torch.equal(x, y) for x, y in tensors)


def test_holds_what_it_says(method: Method) -> None:
    memory, lengths = method.empty(), []
    for segment in ROWS[0] + ROWS[1] + ROWS[2]:
        memory = method.fold(memory, [segment])
        row = memory.rows[0]
        lengths.append(len(segment))
        if isinstance(method, Summary):  # as long as the model makes it
            with pytest.raises(ConfigError, match="does not say"):
                method.size(lengths)
        else:
            assert method.size(lengths) == (row.sink.length, row.slots.length, row.window.length)
        assert row.tokens + row.window.length == sum(lengths) or isinstance(method, Summary)
    if method.limit is not None:
        assert memory.length <= method.limit and memory.nbytes <= most_nbytes(memory, method)
        assert memory.length == method.limit or method.limit == 0 or method.name in ("ccm-merge", "gisting")
    elif not isinstance(method, Summary):
        assert sum(method.size(lengths * 2)) > memory.length


def test_a_batch_is_as_each_alone(method: Method) -> None:
    """Rows of different lengths, padded at the left."""
    memory = method.empty(3)
    for segments in zip(*ROWS, strict=True):
        width = max(map(len, segments))
        ids = torch.tensor([[0] * (width - len(s)) + s for s in segments])
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in segments])
        memory = method.fold(memory, ids, mask)
    for r, segments in enumerate(ROWS):
        alone = lived(method, segments)
        row, other = memory.rows[r], alone.rows[0]
        assert (row.segments, row.steps, row.tokens, row.notes) == (
            other.segments,
            other.steps,
            other.tokens,
            other.notes,
        )
        one, atol = memory[r], 2e-3  # soft prompts feed on their own rounding
        if isinstance(method, Packed):  # a code may be rounded to the number beside
            one, alone, atol = method.expanded(one), method.expanded(alone), 5e-2
        for x, y in zip(parts(one), parts(alone), strict=True):
            assert torch.allclose(x, y, atol=atol)


def test_it_goes_on_from_a_file(method: Method, tmp_path: Path) -> None:
    """And nothing that is folded into a copy changes what it was copied from."""
    before = lived(method, ROWS[0][:3])
    before.save(tmp_path / "memory")
    kept = [part.clone() for part in parts(before)]
    after = lived(method, ROWS[0][3:], before)
    loaded, _ = Memory.load(tmp_path / "memory")
    method.check(loaded, 1)
    assert same(loaded, before)
    assert same(lived(method, ROWS[0][3:], loaded), after)
    assert all(torch.equal(x, y) for x, y in zip(parts(before), kept, strict=True))


def test_twice_is_the_same(method: Method) -> None:
    assert same(lived(method, ROWS[0]), lived(method, ROWS[0]))


def test_what_it_keeps_is_read(method: Method) -> None:
    memory = lived(method, ROWS[0][:4])
    reader, asked = method.reader, [ROWS[0][4]]
    got, empty = (reader.logits(asked, method.recall(m, asked)) for m in (memory, method.empty()))
    assert torch.allclose(got, empty, atol=1e-3) == (method.name == "none")


def test_another_method_refuses_it(method: Method) -> None:
    other = get_method("none" if method.name != "none" else "full").bind(method.reader.model)
    with pytest.raises(MismatchError):
        other.fold(method.empty(), [[5]])


def test_what_cannot_be_folded_is_refused_by_all_alike(method: Method) -> None:
    """Whether one segment is given or several."""
    for text in ([[]], [[5, 6], []]):
        with pytest.raises(ConfigError, match=r"got shape \(1, 0\)"):
            method.take_in(method.empty(), [text])
    with pytest.raises(ConfigError, match=r"got shape \(1, 0\)"):
        method.fold(method.empty(), [[]])
    with pytest.raises(ConfigError, match="2 rows of tokens for a memory of 1"):
        method.take_in(method.empty(), [[[5]], [[6]]])
    with pytest.raises(ConfigError, match="2 rows of tokens for a memory of 1"):
        method.fold(method.empty(), [[5], [6]])


#: Methods whose window may be as long as one likes.
WINDOWED = [
    name
    for name in NAMES
    if name not in ("none", "summary", "ape")  # "ape" reads no segment behind another
    and (issubclass(METHODS[name], Compressed) or not issubclass(METHODS[name], Trained))
]


@pytest.mark.parametrize("name", WINDOWED)
def test_with_room_for_everything_it_is_full_context(name: str, case) -> None:
    of, adapters = case
    full = get_method("full").bind(of)
    method = small_method(name, adapters, window=1000).bind(of, TOKENIZER)
    expected = full.reader.logits([ROWS[0][4]], lived(full, ROWS[0][:4]))
    memory = method.recall(lived(method, ROWS[0][:4]), [ROWS[0][4]])
    assert torch.allclose(method.reader.logits([ROWS[0][4]], memory), expected, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if "tokens" in METHODS[n].__dataclass_fields__])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # slots do not slide, full context may
def test_with_slots_for_everything_it_is_full_context(name: str, family: str) -> None:
    of = model(family)
    method = get_method(name, sink=2, window=3, tokens=100).bind(of, TOKENIZER)
    whole = lived(get_method("full").bind(of), ROWS[0][:4])
    memory = lived(method, ROWS[0][:4])
    assert memory.rows[0].slots.length > 20
    expected = method.reader.logits([ROWS[0][4]], whole)
    assert torch.allclose(method.reader.logits([ROWS[0][4]], method.recall(memory)), expected, atol=1e-4)
    less = method.resized(tokens=16)  # negative control, a block of retrieval
    memory = less.recall(lived(less, ROWS[0][:4]))
    assert not torch.allclose(less.reader.logits([ROWS[0][4]], memory), expected, atol=1e-2)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
)
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_answers_as_a_session(name: str, family: str, tmp_path: Path) -> None:
    of, kind = model(family), METHODS[name]
    adapters = tiny_adapters(tmp_path, family, [name]) if issubclass(kind, Trained) else {}
    method = small_method(name, adapters).bind(of, TOKENIZER)
    engine = PaddedEngine(method, TOKENIZER, rows=4)
    try:
        check_many_at_a_time(engine, method, TOKENIZER)
    finally:
        engine.close()


def test_a_session_goes_on_from_a_file(method: Method, tmp_path: Path) -> None:
    session = Session(method, TOKENIZER)
    session.append("my cat is Miso, and so is yours")
    session.save(tmp_path / "session")
    loaded = Session.load(tmp_path / "session", method, TOKENIZER)
    assert loaded.stats() == session.stats() and loaded.method.sizes() == session.method.sizes()
    for one in (session, loaded):
        one.append("no")
    assert same(loaded.memory, session.memory)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if issubclass(METHODS[n], Evict) and METHODS[n].shortened is Evict.shortened]
)
def test_entries_that_stay_are_as_they_were(name: str) -> None:
    """Each head has entries of its own choice, in the order of the text, out of those of full context."""
    of = model()
    method = get_method(name, sink=2, window=0, tokens=20).bind(of, TOKENIZER)
    text = [[*chain(*ROWS[0])]]
    kept = method.fold(method.empty(), text).rows[0].slots
    full = get_method("full").bind(of)
    raw = full.fold(full.empty(), text).rows[0].window
    where = (kept.keys.unsqueeze(3) - raw.keys.unsqueeze(2)).abs().sum(-1).argmin(-1)  # (L, H, 20)
    assert (where.diff(dim=2) > 0).all() and where.min() >= 2
    assert torch.equal(kept.values, raw.take(where).values)
    assert len({tuple(head.tolist()) for head in where.flatten(0, 1)}) > 1
