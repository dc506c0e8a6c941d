"""Pins: a text that is read in full in front of everything, under every method, for as long as the memory lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_cases import NAMES, PACKED, TOKENIZER, model, small_method, tiny_adapters
from tiny import random_rows, tiny_compressor, two_sided_compressor, two_sided_model

from ccm import Message, Session, get_method
from ccm.comparison import Comparison
from ccm.core.memory import Memory
from ccm.errors import ConfigError, MemoryFileError
from ccm.files import memory_file
from ccm.methods import Method, as_method
from ccm.methods.accounting import describe
from ccm.methods.picture import picture, words
from ccm.methods.text.summary import Summary

PINS = random_rows([[7, 4]], seed=9)[0]
SEGMENTS = random_rows([[6, 9, 5, 7, 8]])[0]
PINNED = sum(map(len, PINS))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    return model(), tiny_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=[*NAMES, *PACKED])
def method(request: pytest.FixtureRequest, case) -> Method:
    of, adapters = case
    return small_method(request.param, adapters).bind(of, TOKENIZER)


def lived(method: Method, segments: Sequence[list[int]], memory: Memory | None = None) -> Memory:
    memory = method.empty() if memory is None else memory
    for segment in segments:
        memory = method.fold(memory, [segment])
    return memory


def pinned(method: Method, memory: Memory | None = None, pins: Sequence[list[int]] = PINS) -> Memory:
    memory = method.empty() if memory is None else memory
    for ids in pins:
        memory = method.pin(memory, ids)
    return memory


# ---------------------------------------------------------------------- what it is


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_it_is_as_the_base_model_with_the_text_in_front(family: str) -> None:
    method = get_method("full").bind(model(family))
    memory, asked = lived(method, SEGMENTS[:4], pinned(method)), [SEGMENTS[4]]
    got = method.reader.logits(asked, method.recall(memory, asked))
    whole = [[token for ids in (*PINS, *SEGMENTS) for token in ids]]
    expected = method.reader.model(torch.tensor(whole)).logits[:, -len(SEGMENTS[4]) :]
    assert torch.allclose(got, expected, atol=1e-3)
    without = method.reader.logits(asked, lived(method, SEGMENTS[:4]))
    assert not torch.allclose(got, without, atol=1e-1), "nobody has read the pin"


def test_it_stands_in_front_word_for_word_whatever_is_said(method: Method) -> None:
    """And what is kept of the text is as much as without it."""
    first = pinned(method, pins=PINS[:1])
    memory = pinned(method, lived(method, SEGMENTS[:3], first), PINS[1:])
    memory = lived(method, SEGMENTS[3:], memory)
    (row,), (alone,) = memory.rows, pinned(method).rows
    assert row.pinned == PINNED
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(row.pins, alone.sink, strict=True))
    (read,) = method.reader.read([[*PINS[0], *PINS[1]]])
    assert torch.allclose(row.pins.keys, read.keys, atol=1e-4)
    plain = lived(method, SEGMENTS).rows[0]
    assert (row.seen, row.steps, row.sunk) == (plain.seen, plain.steps, plain.sunk)
    if not isinstance(method, Summary):  # as long as the model makes it
        assert method.size(list(map(len, SEGMENTS))) == (row.sunk, row.slots.length, row.window.length)


def test_a_prompt_reads_it(method: Method) -> None:
    asked = [SEGMENTS[4]]
    got, without = (
        method.reader.logits(asked, method.recall(lived(method, SEGMENTS[:4], begun), asked))
        for begun in (pinned(method), method.empty())
    )
    assert not torch.allclose(got, without, atol=1e-2)


def test_it_is_counted_and_shown(method: Method) -> None:
    memory = lived(method, SEGMENTS, pinned(method))
    token = method.reader.kv_bytes_per_token()
    unpinned = memory.pinned_as(method.empty())
    assert memory.nbytes - unpinned.nbytes == PINNED * token
    assert describe(memory)[0]["pinned"] == PINNED
    row = method.recall(memory).rows[0]
    first, *rest = method.parts(row, [len(ids) for ids in SEGMENTS])
    assert (first.kind, first.how, first.entries) == ("pinned", "raw", (0, PINNED))
    ends = [first.entries[1], *(part.entries[1] for part in rest)]
    assert [part.entries[0] for part in rest] == ends[:-1] and ends[-1] == row.length


def test_it_is_in_files_and_batches(method: Method, tmp_path: Path) -> None:
    memory = pinned(method, lived(method, SEGMENTS[:2]))
    memory.save(tmp_path / "memory")
    loaded = method.admit(Memory.load(tmp_path / "memory")[0])
    other = lived(method, SEGMENTS[2:3])
    both = Memory.stack([loaded, other])
    ids = [SEGMENTS[3], SEGMENTS[3]]
    after = method.fold(both, ids)
    for got, before in zip(after.rows, (memory, other), strict=True):
        alone = lived(method, SEGMENTS[3:4], before).rows[0]
        assert got.pinned == alone.pinned
        assert torch.allclose(got.sink.values, alone.sink.values, atol=2e-3)
        assert got.slots.length == alone.slots.length
    assert [row.pinned for row in after.rows] == [PINNED, 0], "the twin does not see it"


# ---------------------------------------------------------------------- learned slots in one pass


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("said", [0, 1, 4])
@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_several_segments_at_once_are_as_one_by_one(rule: str, said: int, sink: int, window: int) -> None:
    method = as_method(tiny_compressor(rule=rule), slots=2, sink=sink, window=window, segment=20)
    more = random_rows([[5, 8, 6, 9]], seed=3)[0]
    memory = pinned(method, lived(method, SEGMENTS[:said]))
    one, together = lived(method, more, memory).rows[0], method.take_in(memory, [more]).rows[0]
    assert (one.pinned, one.steps, one.segments) == (together.pinned, together.steps, together.segments)
    assert one.pinned == PINNED
    for part in ("sink", "slots", "window"):
        for a, b in zip(getattr(one, part), getattr(together, part), strict=True):
            assert torch.allclose(a, b, atol=2e-3), part
    without = method.take_in(lived(method, SEGMENTS[:said]), [more]).rows[0]
    assert not torch.allclose(together.slots.values, without.slots.values, atol=1e-2)


# ---------------------------------------------------------------------- encoder-decoders


@pytest.mark.parametrize("name", ["full", "streaming-llm", "ccm"])
def test_an_encoder_reads_it_alone(name: str) -> None:
    if name == "ccm":
        method: Method = as_method(two_sided_compressor(), sink=2, window=6)
    else:
        method = get_method(name).bind(two_sided_model())
    memory, asked = lived(method, SEGMENTS[:3], pinned(method)), [SEGMENTS[3]]
    held = method.recall(memory, asked)
    assert held.rows[0].pinned == PINNED and held.rows[0].length >= PINNED
    got = method.reader.logits(asked, held)[0, -1]
    before = lived(method, SEGMENTS[:3])
    without = method.reader.logits(asked, method.recall(before, asked))[0, -1]
    assert not torch.allclose(got, without, atol=1e-2)


# ---------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused() -> None:
    method = get_method("streaming-llm", sink=4, window=20, segment=10).bind(tiny_compressor().model)
    room = 256 - 24 - 2 * 10 - 1
    memory = method.pin(method.empty(), [5] * room)
    for segment in random_rows([[10] * 4])[0]:
        memory = method.fold(memory, [segment], answered=True)
    with pytest.raises(ConfigError, match=rf"a pin of {room + 1} tokens does not fit, {room} would"):
        method.pin(method.empty(), [5] * (room + 1))
    with pytest.raises(ConfigError, match="a pin of 1 tokens does not fit, 0 would"):
        method.pin(memory, [5])
    with pytest.raises(ConfigError, match="empty text to pin"):
        method.pin(memory, [])


def test_a_file_that_pins_more_than_it_holds_is_refused() -> None:
    method = get_method("full").bind(model())
    memory = pinned(method)
    data = memory.dumps()
    assert memory_file.read(data, memory_file.FILE)[1]["format"] == "ccm-memory/3"
    assert memory_file.read(lived(method, SEGMENTS).dumps(), memory_file.FILE)[1]["format"] == "ccm-memory/1"
    lying = Memory((replace(memory.rows[0], pinned=PINNED + 1),), memory.fingerprint)
    with pytest.raises(MemoryFileError, match="more is pinned than its sink holds"):
        Memory.loads(lying.dumps())


# ---------------------------------------------------------------------- sessions


def session(name: str = "streaming-llm:sink=2,window=40") -> Session:
    return Session.open(model(), TOKENIZER, name)


def test_a_session_keeps_it_through_files_forks_and_what_is_taken_back(tmp_path: Path) -> None:
    talk = session()
    talk.append("hello there")
    twin = talk.fork()
    talk.pin("Answer in Latin.")
    talk.generate("and now?", max_new_tokens=4)
    talk.pin("Be short.")
    talk.append("so long " * 20)
    assert talk.pins == ("Answer in Latin.", "Be short.") and twin.pins == ()
    assert twin.memory.rows[0].pinned == 0 < talk.memory.rows[0].pinned
    talk.save(tmp_path / "talk.ccm")
    back = Session.load(tmp_path / "talk.ccm", talk.method, TOKENIZER)
    assert back.pins == talk.pins and back.stats() == talk.stats()
    assert back.generate("and?", max_new_tokens=4) == talk.generate("and?", max_new_tokens=4)
    twin.pin_as(talk)
    assert twin.pins == talk.pins
    assert torch.equal(twin.memory.rows[0].pins.keys, talk.memory.rows[0].pins.keys)
    talk.reset()
    assert talk.pins == () and talk.stats()["pinned"] == 0


def test_it_is_system_text_of_the_chat_template() -> None:
    talk = session("full")
    talk.pin("Answer in Latin.")
    ids = TOKENIZER.apply_chat_template([{"role": "system", "content": "Answer in Latin."}], tokenize=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert talk.memory.rows[0].pinned == len(ids)
    (read,) = talk.method.reader.read([ids])
    assert torch.allclose(talk.memory.rows[0].pins.values, read.values, atol=1e-5)


def test_an_exchange_that_is_written_anew_keeps_it() -> None:
    """A pin between two messages of one exchange, whose memory goes back to the one before."""
    talk = session()
    talk.append("one", role="user")
    talk.pin("Be short.")
    talk.append("two", role="user")
    talk.append("three", role="assistant")
    assert talk.memory.rows[0].pinned and (talk._before is None or talk._before.rows[0].pinned)


def test_a_pin_that_is_refused_changes_nothing() -> None:
    talk = session()
    before = talk.memory
    for text in ("  ", "far too long " * 2000):
        with pytest.raises(ConfigError, match=r"nothing to pin|does not fit"):
            talk.pin(text)
    assert talk.memory is before and talk.pins == ()


def test_it_is_in_pictures_and_in_full_context() -> None:
    talk = session()
    talk.pin("Answer in Latin.")
    talk.append("hello")
    (line, *_) = talk.inside().lines()
    assert line.kind == "pinned" and line.tokens == talk.memory.rows[0].pinned
    assert words(talk.inside(), line) == "Answer in Latin." in picture(talk.inside(), "")
    answers = Comparison(talk).ask("and?", [Message("user", "hello")], max_new_tokens=2)
    assert answers["full"].kv_bytes == talk.stats()["full_context_nbytes"] > answers["none"].kv_bytes == 0
    assert talk.ask("and?", max_new_tokens=3).read[0][0] > 0, "the answer has read it"
