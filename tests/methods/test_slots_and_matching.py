"""Learned slots and fitted entries: the slots stay as they were learned, and the entries are fitted beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_cases import TOKENIZER, model, tiny_adapters

from ccm import get_method
from ccm.core.memory import KV, Memory
from ccm.errors import ConfigError
from ccm.methods import Method
from ccm.methods.synthesis.attention_matching import asked
from ccm.methods.synthesis.matching import match

#: Token ids of three segments.
TOLD = [[40, 41, 42, 43, 44, 45], [50, 51, 52, 53], [60, 61, 62, 63, 64, 65, 66]]


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    return tiny_adapters(tmp_path, names=["slots-and-matching"])["slots-and-matching"]


@pytest.fixture
def method(adapter: str) -> Method:
    options = {"slots": 2, "fitted": 5, "sink": 2, "window": 0}
    return get_method("slots-and-matching", adapter=adapter, **options).bind(model(), TOKENIZER)


def lived(method: Method, segments: list[list[int]] = TOLD) -> Memory:
    memory = method.empty()
    for segment in segments:
        memory = method.fold(memory, [segment])
    return memory


def test_slots_are_those_of_the_adapter(method: Method, adapter: str) -> None:
    """Of the first segment; later ones are read behind what was fitted, too. Each one's stay as they were."""
    alone = get_method("ccm-concat", adapter=adapter, slots=2, sink=2, window=0).bind(method.reader)
    first, second = lived(method, TOLD[:1]).rows[0], lived(method, TOLD[:2]).rows[0]
    for own, expected in zip(first.slots, lived(alone, TOLD[:1]).rows[0].slots, strict=True):
        assert torch.allclose(own[:, :, :2], expected, atol=1e-5)
    assert torch.equal(second.slots.values[:, :, :2], first.slots.values[:, :, :2])


def test_text_that_fits_stays_as_it_was_read(method: Method) -> None:
    """The first tokens are the sink, and behind the learned slots stands all that follows them."""
    row = lived(method, TOLD[:1]).rows[0]
    (text,) = method.reader.read([TOLD[0]], method.empty())
    assert torch.allclose(row.sink.keys, text.keys[:, :, :2], atol=1e-5)
    assert row.notes == (4,) and torch.allclose(row.slots.keys[:, :, 2:], text.keys[:, :, 2:], atol=1e-5)


def test_entries_are_fitted_beside_the_learned_slots(method: Method) -> None:
    before, after = lived(method, TOLD[:1]), lived(method, TOLD[:2]).rows[0]
    ((text, queries),) = method.reader.watch([TOLD[1]], before)
    learned, old = after.slots.slice(0, 4), before.rows[0].slots.slice(2)
    beside = replace(after, sink=KV.cat((after.sink, learned)), slots=old)
    held = KV.cat((old, text))
    expected = match(method.reader, beside, held, 5, asked(method.reader, TOKENIZER, queries))
    assert after.notes == (5,) and after.slots.length == 9
    for own, other in zip(after.slots.slice(4), expected, strict=True):
        assert torch.allclose(own, other, atol=1e-4)


def test_a_window_holds_whole_segments(method: Method) -> None:
    row = lived(method.resized(window=8)).rows[0]
    assert row.segments == (7,) and row.steps == 2 and row.slots.length == 2 * 2 + 5


def test_sizes_are_those_of_its_memories(method: Method) -> None:
    for count in range(1, 4):
        row = lived(method, TOLD[:count]).rows[0]
        lengths = list(map(len, TOLD[:count]))
        assert method.size(lengths) == (row.sink.length, row.slots.length, row.window.length)
    assert method.limit is None
    options = {"rule": "bounded", "rule_options": {"blocks": 2}}
    bounded = get_method("slots-and-matching", adapter=method.adapter, slots=2, fitted=5, sink=2, **options)
    bounded = bounded.bind(method.reader.model, TOKENIZER)
    assert lived(bounded, TOLD * 2).length <= bounded.limit == 2 + 2 * 2 + 5
    with pytest.raises(ConfigError, match="fitted"):
        get_method("slots-and-matching", fitted=0)


def test_a_memory_of_the_adapter_goes_on(method: Method, adapter: str) -> None:
    alone = get_method("ccm-concat", adapter=adapter, slots=3, sink=2, window=0).bind(method.reader)
    before = lived(alone, TOLD[:2])
    row = method.fold(Memory(before.rows, method.fingerprint()), [TOLD[2]]).rows[0]
    assert row.slots.length == 2 * 3 + 2 + 5 and row.notes == (5,)
    assert torch.equal(row.slots.values[:, :, :6], before.rows[0].slots.values)


def test_its_parts_are_slots_and_entries(method: Method) -> None:
    parts = method.parts(lived(method).rows[0], list(map(len, TOLD)))
    assert [(part.how, part.entries, part.tokens) for part in parts] == [
        ("raw", (0, 2), (0, 2)),
        ("folded", (2, 4), (0, 6)),
        ("folded", (4, 6), (6, 10)),
        ("folded", (6, 8), (10, 17)),
        ("fitted", (8, 13), (2, 17)),
    ]


def test_in_four_bits(method: Method) -> None:
    options = {"slots": 2, "fitted": 5, "sink": 2, "window": 0, "adapter": method.adapter}
    packed = get_method("packed", of="slots-and-matching", code="int4", options=options)
    packed = packed.bind(method.reader.model, TOKENIZER)
    assert lived(packed).nbytes < lived(method).nbytes / 2
    assert packed.recall(lived(packed)).length == lived(method).length
