"""Slots and words: the words that are asked for are read, and the slots are those of the adapter alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_cases import TOKENIZER, model, tiny_adapters

from ccm import get_method
from ccm.core.memory import Memory
from ccm.errors import ConfigError, MismatchError
from ccm.methods import Method
from ccm.methods.hybrid import slots_and_words
from ccm.methods.hybrid.slots_and_words import SlotsAndWords

#: Token ids of three segments; letters, which the tiny tokenizer tells apart.
TOLD = [[40, 41, 42, 43, 44, 45], [50, 51, 52, 53], [60, 61, 62, 63, 64, 65, 66]]


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    return tiny_adapters(tmp_path, names=["slots-and-words"])["slots-and-words"]


@pytest.fixture
def method(adapter: str, monkeypatch: pytest.MonkeyPatch) -> Method:
    """One slot and two words for a segment; attention, which means nothing in tiny models, chooses nothing."""
    monkeypatch.setattr(slots_and_words, "ASKED", 2)
    monkeypatch.setattr(SlotsAndWords, "_attended", lambda self, row, asked: [0.0] * row.steps)
    return get_method("slots-and-words", adapter=adapter, slots=1, words=2, sink=2).bind(model(), TOKENIZER)


def lived(method: Method) -> Memory:
    memory = method.empty()
    for segment in TOLD:
        memory = method.fold(memory, [segment])
    return memory


def noted() -> list[int]:
    return [2 * token + (i == 0) for segment in TOLD for i, token in enumerate(segment)]


@pytest.mark.parametrize("segment", TOLD)
def test_words_that_are_asked_for_are_read(method: Method, segment: list[int]) -> None:
    """Behind the sink, as if nothing else had been said; and what was held stays as it was."""
    memory = lived(method)
    asked = [segment[1], segment[0]]
    row = method.recall(memory, [asked]).rows[0]
    assert row.slots.length == 3 + 6 and row.window.length == 0
    expected = method._chosen(noted(), asked, [0.0] * 3, 6)
    assert len(set(expected) & set(segment)) == min(6, len(segment))
    sink = replace(row, slots=row.slots.slice(0, 0))
    (alone,) = method.reader.read([expected], Memory((sink,), method.fingerprint()))
    assert torch.allclose(row.slots.values[:, :, 3:], alone.values.float(), atol=1e-5)
    assert memory.rows[0].slots.length == 9


def test_the_slots_are_an_index(method: Method) -> None:
    """Where no word tells, the segment whose slots are attended to does."""
    for best, segment in enumerate(TOLD):
        attention = [float(k == best) for k in range(3)]
        assert method._chosen(noted(), [99], attention, len(segment)) == segment


def test_what_the_question_says_itself_goes_first(method: Method) -> None:
    """A piece that does not fit keeps what is new to who asks, and of that its end."""
    assert method._chosen(noted(), [41, 42, 45], [1.0, 0.0, 0.0], 3) == [40, 43, 44]
    assert method._chosen(noted(), [99], [1.0, 0.0, 0.0], 3) == [43, 44, 45]


def test_control_tokens_are_read_last(method: Method) -> None:
    start, end = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    old = [2 * token + (token == start) for token in (start, 40, 41, end, start, 50, 51, end)]
    assert method._chosen(old, [99], [0.0, 0.0], 4) == [40, 41, 50, 51]
    assert method._chosen(old, [99], [0.0, 0.0], 5) == [40, 41, 50, 51, end]


def test_as_many_bytes_as_the_adapter_with_more_slots(method: Method, adapter: str) -> None:
    many = get_method("ccm-concat", adapter=adapter, slots=3, sink=2).bind(model(), TOKENIZER)
    lengths = list(map(len, TOLD))
    assert method.size(lengths) == many.size(lengths) == (2, 9, 0)
    assert lived(method).length == lived(many).length


def test_slots_are_those_of_the_adapter_alone(method: Method, adapter: str) -> None:
    """Words are never folded; a memory of the adapter alone goes on, with words of what comes from then on."""
    alone = get_method("ccm-concat", adapter=adapter, slots=1, sink=2).bind(method.reader.model)
    before = lived(alone)
    assert torch.allclose(
        before.rows[0].slots.values, lived(method).rows[0].slots.values[:, :, :3], atol=1e-5
    )
    row = method.fold(Memory(before.rows, method.fingerprint()), [TOLD[1]]).rows[0]
    assert row.slots.length == 4 + len(TOLD[1]) and row.notes[0] == len(TOLD[1])


def test_several_segments_at_once_are_as_one_by_one(method: Method) -> None:
    one = lived(method).rows[0]
    together = method.take_in(method.empty(), [TOLD]).rows[0]
    assert one.notes == together.notes == (6, *noted())
    assert torch.allclose(one.slots.values, together.slots.values, atol=1e-4)


def test_its_parts_are_slots_and_words(method: Method) -> None:
    parts = method.parts(lived(method).rows[0], list(map(len, TOLD)))
    assert [(part.how, part.entries) for part in parts] == [
        ("raw", (0, 2)),
        ("folded", (2, 3)),
        ("folded", (3, 4)),
        ("folded", (4, 5)),
        ("retold", (5, 11)),
    ]


def test_what_it_keeps_is_no_memory_of_another_method(method: Method, adapter: str) -> None:
    """Words would stay as slots for ever, and fitted entries would be dropped as words."""
    options = {"adapter": adapter, "slots": 1, "sink": 2}
    alone = get_method("ccm-concat", **options).bind(method.reader)
    fitted = get_method("slots-and-matching", fitted=4, **options).bind(method.reader, TOKENIZER)
    of = ("ccm-concat", "slots-and-matching", "slots-and-words")
    packed = {n: get_method("packed", of=n, options=options).bind(method.reader, TOKENIZER) for n in of}
    for own, others in (
        (method, (alone, fitted)),
        (fitted, (alone, method)),
        (packed["slots-and-words"], (packed["ccm-concat"], packed["slots-and-matching"])),
        (packed["slots-and-matching"], (packed["ccm-concat"], packed["slots-and-words"])),
    ):
        memory = lived(own)
        assert own.admit(memory).rows[0].notes == memory.rows[0].notes
        for other in others:
            for read in (other.admit, lambda memory, other=other: other.fold(memory, [[5]])):
                with pytest.raises(MismatchError, match="another method with the same adapter"):
                    read(memory)


def test_words_take_their_part_of_the_context(method: Method) -> None:
    """Each segment has a slot and two words, so it ends as much sooner."""
    row, context = lived(method).rows[0], method.reader.context
    each = row.tokens / row.steps
    assert method.apart(row) == round((context - 2 - method.longest) // 3 * each)
    memory = method.empty()
    small = copy.copy(method.reader)
    small.family = replace(small.family, context=64)
    bound = method.bind(small, TOKENIZER)
    with pytest.raises(ConfigError, match="context"):
        while True:
            memory = bound.fold(memory, [TOLD[0]])
    assert 64 - len(TOLD[0]) - 1 < memory.length <= 64
