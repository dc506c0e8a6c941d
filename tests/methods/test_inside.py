"""Inside a memory: what entries stand for, and what an answer read of them."""

from __future__ import annotations

import json

import pytest
import torch
from method_cases import NAMES, TOKENIZER, model, small_method, tiny_adapters
from tiny import random_rows, tiny_compressor, tiny_model
from transformers import DynamicCache

from ccm import Session
from ccm.methods import as_method
from ccm.methods.inside import Said, attended, cut, groups, look, read_by
from ccm.methods.parts import RAW
from ccm.methods.picture import shorter, speaker

SEGMENTS = random_rows([[9, 7, 8, 5, 6]])[0]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return model(), tiny_adapters(tmp_path_factory.mktemp("adapters"))


def lived(method, segments=SEGMENTS):
    memory = method.empty()
    for segment in segments:
        memory = method.fold(memory, [segment])
    return memory


def of(method, segments=SEGMENTS):
    lengths = [len(segment) for segment in segments]
    return method.parts(method.recall(lived(method, segments)).rows[0], lengths)


def told(parts):
    return [(part.kind, part.how, part.entries, part.tokens) for part in parts]


@pytest.mark.parametrize("name", NAMES)
def test_parts_cover_every_entry_once_and_stay_within_the_text(name, case):
    base, adapters = case
    method = small_method(name, adapters).bind(base, TOKENIZER)
    memory = method.recall(lived(method))
    parts = method.parts(memory.rows[0], [len(segment) for segment in SEGMENTS])
    ends = [0, *(part.entries[1] for part in parts)]
    assert [part.entries[0] for part in parts] == ends[:-1] and ends[-1] == memory.length
    for part in parts:
        assert 0 <= part.tokens[0] < part.tokens[1] <= sum(map(len, SEGMENTS)), part
        if part.how == RAW:
            assert part.entries[1] - part.entries[0] == part.tokens[1] - part.tokens[0]
    assert told(method.parts(memory.rows[0])) or not memory.length  # lengths need not be known


def test_a_segment_has_its_own_block_of_slots():
    method = as_method(tiny_compressor(rule="concat"), slots=2, sink=3, window=12)
    assert told(of(method)) == [
        ("sink", RAW, (0, 3), (0, 3)),
        ("slots", "folded", (3, 5), (0, 9)),
        ("slots", "folded", (5, 7), (9, 16)),
        ("slots", "folded", (7, 9), (16, 24)),
        ("window", RAW, (9, 20), (24, 35)),
    ]
    row = lived(method).rows[0]
    assert told(method.parts(row))[1] == ("slots", "folded", (3, 9), (0, 24))  # nobody knows the lengths


def test_blocks_that_share_their_slots_are_one_part():
    full = tiny_compressor(rule="bounded", rule_options={"blocks": 3})
    assert told(of(as_method(full, slots=2, sink=0, window=0))) == [
        ("slots", "merged", (0, 2), (0, 24)),
        ("slots", "folded", (2, 4), (24, 29)),
        ("slots", "folded", (4, 6), (29, 35)),
    ]
    drop = tiny_compressor(rule="bounded", rule_options={"blocks": 3, "overflow": "drop"})
    assert told(of(as_method(drop, slots=2, sink=0, window=0)))[0] == ("slots", "folded", (0, 2), (16, 24))
    mean = tiny_compressor(rule="mean")
    assert told(of(as_method(mean, slots=2, sink=0, window=0))) == [("slots", "merged", (0, 2), (0, 35))]


def test_what_is_true_without_blocks(case):
    base, _ = case

    def parts(name, **options):
        return told(of(small_method(name, {}, **options).bind(base, TOKENIZER)))

    sink, window = ("sink", RAW, (0, 2), (0, 2)), (29, 35)
    assert parts("streaming-llm") == [sink, ("window", RAW, (2, 8), window)]
    assert parts("snapkv") == [sink, ("slots", "chosen", (2, 10), (2, 29)), ("window", RAW, (10, 16), window)]
    assert parts("attention-matching")[1] == ("slots", "fitted", (2, 4), (2, 29))
    assert parts("mean-pool")[1:3] == [
        ("slots", "pooled", (2, 4), (2, 9)),
        ("slots", "pooled", (4, 6), (9, 16)),
    ]
    assert parts("full") == [("window", RAW, (0, 35), (0, 35))]
    assert parts("none", window=0) == []
    (first, *_), blocks = parts("retrieve"), parts("retrieve")[1:-1]
    assert first == sink and all(how == RAW and (start - 2) % 4 == 0 for _, how, _, (start, _) in blocks)
    assert len(blocks) == 2  # of eight tokens


def test_parts_know_their_turns():
    method = as_method(tiny_compressor(rule="concat"), slots=2, sink=0, window=12, segment=8)
    turns = [Said("user", "a", 9), Said("assistant", "b", 15), Said("user", "c", 11)]
    cuts = [n for turn in turns for n in cut(turn.tokens, 8)]
    assert cuts == [8, 1, 8, 7, 8, 3]
    memory = lived(method, random_rows([cuts])[0])
    inside = look(method, memory.rows[0], turns)
    assert [part.turns for part in inside.parts] == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3)]
    assert [(line.entries, line.turns) for line in inside.lines()] == [
        ((0, 4), (0, 1)),
        ((4, 8), (1, 2)),
        ((8, 19), (2, 3)),
    ]
    later = look(method, memory.rows[0], turns[2:])  # what came before is not known: it is no turn's
    assert [(part.entries, part.turns) for part in later.parts] == [((0, 8), (0, 0)), ((8, 19), (0, 1))]
    assert speaker(later, later.lines()[0]) == "earlier text"


def test_raw_parts_end_where_a_turn_ends(case):
    base, _ = case
    method = small_method("full", {}).bind(base, TOKENIZER)
    inside = look(method, lived(method).rows[0], [Said("user", "a", 20), Said("assistant", "b", 15)])
    assert [(part.entries, part.turns) for part in inside.parts] == [((0, 20), (0, 1)), ((20, 35), (1, 2))]


def eager_pass(method, memory, prompt, answer):
    """The attention (L, Hq, Q, N) that a model of its own, never wrapped, gives to a cache and a text behind it."""
    own = tiny_model("llama", "eager", vocab_size=len(TOKENIZER), max_position_embeddings=2048)
    row = memory.rows[0].placed(method.reader.rotary, torch.float32)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(*row, strict=True)):
        cache.update(keys[None], values[None], layer)
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    out = own(ids, past_key_values=cache, output_attentions=True)
    return torch.stack(out.attentions)[:, 0]


@pytest.mark.parametrize("name", ["ccm-concat", "snapkv", "retrieve", "attention-matching"])
@torch.no_grad()
def test_what_an_answer_read_is_the_attention_of_an_eager_pass(name, case):
    base, adapters = case
    method = small_method(name, adapters).bind(base, TOKENIZER)
    memory = lived(method)
    prompt, answer = SEGMENTS[0][:4], [*SEGMENTS[1], *SEGMENTS[2]] * 3  # more than a chunk of queries
    reading = read_by(method, memory, prompt, answer)
    found = eager_pass(method, method.recall(memory), prompt, answer)
    expected = found[:, :, len(prompt) - 1 :].mean(dim=(1, 2))  # where the answer's tokens are written
    assert reading.weights.shape == expected.shape
    assert torch.allclose(reading.weights, expected, atol=1e-5)
    assert not torch.allclose(reading.weights, found.mean(dim=(1, 2)), atol=1e-3)  # negative control
    assert torch.allclose(reading.weights.sum(1), torch.ones(3), atol=1e-5)


def test_one_token_is_read_at_one_place(case):
    base, _ = case
    method = small_method("full", {}).bind(base, TOKENIZER)
    memory = lived(method)
    one = read_by(method, memory, [5, 6], [7]).weights
    assert torch.allclose(one, attended(method.reader, memory, [5, 6], 1))


def test_shares_by_layer_group_sum_to_all_of_it(case):
    base, adapters = case
    method = small_method("ccm-concat", adapters).bind(base, TOKENIZER)
    memory = lived(method)
    turns = [Said("user", "hello", 20), Said("assistant", "you", 15)]
    inside = look(method, memory.rows[0], turns, read_by(method, memory, [5], [6, 7]), "fg")
    assert inside.layers == ((0, 1), (1, 2), (2, 3)) and len(inside.read) == 3
    for shares in inside.read:
        assert len(shares) == len(inside.parts) + 1 and abs(sum(shares) - 1) < 1e-5
    lines = inside.lines()
    assert lines[-1].kind == "prompt" and abs(sum(line.read[1] for line in lines) - 1) < 1e-5
    assert json.loads(json.dumps(inside.as_dict()))["answer"] == "fg"
    assert groups(30) == ((0, 5), (5, 10), (10, 15), (15, 20), (20, 25), (25, 30))
    assert groups(32)[0] == (0, 5) and groups(32)[-1][1] == 32


# ---------------------------------------------------------------------- sessions


def session(**sizes):
    made = tiny_compressor(
        rule="concat", model={"vocab_size": len(TOKENIZER), "max_position_embeddings": 2048}
    )
    return Session(made, TOKENIZER, **{"slots": 2, "sink": 2, "window": 40, "segment": 8, **sizes})


def test_a_session_knows_which_turn_is_where(tmp_path):
    one = session()
    one.append("my cat is Miso")
    one.append("a lovely name", role="assistant")
    one.generate("who sleeps?", do_sample=False, max_new_tokens=6)
    assert [turn.role for turn in one.said] == ["user", "assistant", "user", "assistant"]
    assert sum(turn.tokens for turn in one.said) == one.memory.rows[0].seen
    inside = one.inside()
    assert inside.parts[1].turns == (0, 1) and inside.parts[-1].turns == (3, 4)
    one.save(tmp_path / "s.ccm")
    again = Session.load(tmp_path / "s.ccm", one.method, TOKENIZER)
    assert again.said == one.said and again.inside() == inside
    assert one.fork().said == one.said
    one.reset()
    assert one.said == () and again.said


def test_asking_changes_nothing_and_shows_what_was_read(tmp_path):
    one = session()
    one.append("my cat is Miso and it sleeps on the old blue sofa")
    before = one.memory, one.turns, one.said, one.dialogue
    inside = one.ask("what is it called?", do_sample=False, max_new_tokens=6)
    assert (one.memory, one.turns, one.said, one.dialogue) == before
    assert inside.answer == one.fork().generate("what is it called?", do_sample=False, max_new_tokens=6)
    assert [turn.role for turn in inside.turns] == ["user", "user"]
    kinds = [line.kind for line in inside.lines()]
    assert kinds[0] == "sink" and kinds[-1] == "prompt" and {"slots", "window"} <= set(kinds)


def test_a_failed_turn_is_not_among_those_said(monkeypatch):
    one = session()
    one.append("hello")
    said = one.said

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.generate("again", streamer=fail)
    assert one.said == said


def test_a_long_text_and_many_turns_leave_a_file_that_can_be_read(tmp_path):
    one = session(window=64)
    one.append("é" * 3000)
    one.said = one.said * 1000
    one.append("and more")
    assert len(one.said) == 1000 and max(len(turn.text) for turn in one.said) == 200
    one.save(tmp_path / "s.ccm")
    assert Session.load(tmp_path / "s.ccm", one.method, TOKENIZER).said == one.said


def test_pictures_hold_no_control_characters():
    assert shorter("a\x1b[31m b\n\tc\x00", 20) == "a[31m b c" and shorter("abcdef", 4) == "abc…"


def test_a_session_prints_itself():
    one = session()
    assert "0 turns; nothing is kept" in repr(one)
    one.append("<script>alert(1)</script> & my cat is called Miso, it is grey")
    text = repr(one)
    assert (
        text.startswith("<ccm.Session: ") and "1 turns" in text and "2 sink + " in text and "\n" not in text
    )
    html = one._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "slots" in html
