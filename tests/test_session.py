"""The online loop, on a tiny model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save
from tiny import scramble, tiny_model, tiny_tokenizer

import ccm
from ccm.chat.dialogue import Dialogues
from ccm.chat.turns import render, turns_of
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import ConfigError, MemoryFileError, MismatchError, StorageError
from ccm.methods.accounting import reach_in_words
from ccm.methods.answering import BEHIND
from ccm.methods.default import CHAT
from ccm.session import Session

TOKENIZER = tiny_tokenizer()
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def compressor(**settings: object) -> Compressor:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    return scramble(Compressor(model, CompressorConfig(**{"slots": 2, "sink": 0, **settings})))


@pytest.fixture(scope="module")
def merge() -> Compressor:
    return compressor(rule="mean")


def equal(a: Session, b: Session) -> bool:
    return all(
        torch.equal(x, y)
        for name in ("sink", "slots", "window")
        for x, y in zip(getattr(a.memory.rows[0], name), getattr(b.memory.rows[0], name), strict=True)
    )


def test_append_is_compress_of_the_rendered_turn(merge: Compressor) -> None:
    session = Session(merge, TOKENIZER)
    session.append("hello", role="user")
    memory = merge.compress([list(render(TOKENIZER, "user", "hello").ids)])
    assert torch.equal(session.memory.rows[0].slots.keys, memory.rows[0].slots.keys)
    assert session.memory.slots == 2


def test_turns_are_rendered_by_the_chat_template() -> None:
    turn = render(TOKENIZER, "user", "hi")
    assert TOKENIZER.decode(turn.ids) == "<|im_start|>user\nhi<|im_end|>\n"
    assert TOKENIZER.decode(turn.ids[slice(*turn.content)]) == "hi<|im_end|>"
    whole = TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert TOKENIZER.decode(turn.ids) == whole


def test_generate_answers_from_memory_and_remembers_its_answer(merge: Compressor) -> None:
    session = Session(merge, TOKENIZER, window=48, sink=2)
    session.append("my name is Ada")
    before = session.memory
    answer = session.generate("who am I?", **GREEDY)

    by_hand = Session(merge, TOKENIZER, window=48, sink=2)
    by_hand.memory = before
    by_hand.append("who am I?")
    ids = merge.generate(
        [turns_of(TOKENIZER).head], by_hand.memory, **GREEDY, eos_token_id=TOKENIZER.eos_token_id
    )
    reply = [t for t in ids[0, len(turns_of(TOKENIZER).head) :].tolist() if t != TOKENIZER.eos_token_id]
    assert answer == TOKENIZER.decode(reply, skip_special_tokens=True).strip()
    by_hand.append(answer, role="assistant")
    assert session.memory.rows[0].segments == by_hand.memory.rows[0].segments
    for name in ("sink", "slots", "window"):  # what was read to write the answer is not read again
        for x, y in zip(
            getattr(session.memory.rows[0], name), getattr(by_hand.memory.rows[0], name), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("window", [0, 24])
def test_nothing_is_folded_between_a_question_and_its_answer(merge: Compressor, window: int) -> None:
    session = Session(merge, TOKENIZER, sink=2, window=window)
    for n in range(6):
        before, during = session.memory.tokens, []
        session.generate(f"hello {n}", streamer=lambda _, d=during: d.append(session.memory.tokens), **GREEDY)
        assert set(during) == {before} and session.memory.rows[0].window.length <= window
    assert session.memory.tokens > 0
    # what is not answered is folded at once
    session.append("a turn that is long enough to push something out of the window")
    assert session.memory.rows[0].window.length <= window


def test_streaming_gives_the_same_text(merge: Compressor) -> None:
    pieces: list[str] = []
    session = Session(merge, TOKENIZER)
    answer = session.generate("hi", streamer=pieces.append, **GREEDY)
    assert len(pieces) > 1 and "".join(pieces).strip() == answer


@pytest.mark.parametrize("sizes", [{}, {"sink": 2, "window": 40}])
def test_memory_is_bounded_however_long_the_conversation(merge: Compressor, sizes: dict[str, int]) -> None:
    session = Session(merge, TOKENIZER, **sizes)
    held = []
    for turn in range(120):
        session.append(f"this is turn number {turn}", role="user" if turn % 2 == 0 else "assistant")
        held.append(session.memory.nbytes)
    if not sizes:
        assert len(set(held)) == 1
    per_entry = merge.kv_bytes_per_token()
    assert max(held) <= (2 + sum(sizes.values())) * per_entry
    stats = session.stats()
    assert stats["nbytes"] == sum(
        t.nbytes for n in ("sink", "slots", "window") for t in getattr(session.memory.rows[0], n)
    )
    assert stats["tokens_seen"] == stats["tokens_folded"] + stats["window"]
    assert stats["full_context_nbytes"] == stats["tokens_seen"] * per_entry > 20 * stats["nbytes"]


def test_a_turn_longer_than_the_context_is_cut_into_segments(merge: Compressor) -> None:
    session = Session(merge, TOKENIZER)
    session.append("word " * 500)
    assert session.stats()["tokens_folded"] > merge.model.config.max_position_embeddings
    assert session.memory.steps > 8


def test_a_long_turn_leaves_recent_text_in_the_window(merge: Compressor) -> None:
    session = Session(merge, TOKENIZER, **CHAT)
    session.append("word " * 100)
    assert 0 < session.stats()["window"] <= CHAT["window"]


def test_forks_do_not_hear_each_other(merge: Compressor) -> None:
    session = Session(merge, TOKENIZER, window=16)
    session.append("the start of it")
    fork = session.fork()
    untouched = session.memory
    fork.append("only for the fork")
    assert session.memory is untouched and fork.turns == session.turns + 1
    session.append("only for the fork")
    assert equal(session, fork)
    copied = copy.deepcopy(session)  # with the same model
    assert copied.method is session.method and equal(copied, session)


def test_save_load_continue_equals_never_having_saved(merge: Compressor, tmp_path: Path) -> None:
    session = Session(merge, TOKENIZER, window=20, sink=3)
    for text in ("one thing", "another thing, somewhat longer", "a third"):
        session.append(text)
    session.save(tmp_path / "s.ccm")
    loaded = Session.load(tmp_path / "s.ccm", merge, TOKENIZER)
    assert loaded.method.sizes() == session.method.sizes() and loaded.turns == session.turns
    assert loaded.generate("and now?", **GREEDY) == session.generate("and now?", **GREEDY)
    assert equal(loaded, session)


def test_a_save_replaces_a_memory_file_and_nothing_else(merge: Compressor, tmp_path: Path) -> None:
    session, file = Session(merge, TOKENIZER), tmp_path / "s.ccm"
    file.touch()  # an empty file holds nothing
    for turns in (1, 2):
        session.append("one thing")
        session.save(file)
        assert Session.load(file, merge, TOKENIZER).turns == turns
    Session(merge, TOKENIZER).save(file)
    assert Session.load(file, merge, TOKENIZER).turns == 0, "another conversation's too"
    weights = {"x": torch.zeros(2)}
    for name, content in (("notes.txt", b"my diary"), ("model.safetensors", save(weights, {"format": "pt"}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StorageError, match=r"is no memory file, .* give another name, or delete it"):
            session.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_errors_leave_the_session_as_it_was(
    merge: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(merge, TOKENIZER)
    session.append("something")
    memory, turns = session.memory, session.turns
    with pytest.raises(ConfigError, match="no text"):
        session.append("  ")
    for wrong in ([], [{"role": "user", "content": "hello"}]):
        with pytest.raises(
            ConfigError, match="got list, expected a text; of several messages give one after"
        ):
            session.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing to answer: append a message first"):
        Session(merge, TOKENIZER).generate()
    with pytest.raises(KeyboardInterrupt):
        session.generate("hello", streamer=lambda text: (_ for _ in ()).throw(KeyboardInterrupt))
    assert session.memory is memory and session.turns == turns
    monkeypatch.setattr(Dialogues, "stands", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = dict(vars(session))
    with pytest.raises(KeyboardInterrupt):
        session.append("hello")  # at its very end, when it is folded already
    assert vars(session) == before
    monkeypatch.undo()
    session.append("it goes on")
    memory.save(tmp_path / "bare.ccm")
    with pytest.raises(MemoryFileError, match="no session"):
        Session.load(tmp_path / "bare.ccm", merge, TOKENIZER)


def test_a_session_of_another_adapter_is_refused(merge: Compressor, tmp_path: Path) -> None:
    other = compressor(rule="concat")
    Session(other, TOKENIZER).save(tmp_path / "s.ccm")
    with pytest.raises(MismatchError, match="the memory was made by model"):
        Session.load(tmp_path / "s.ccm", merge, TOKENIZER)


def test_dropping_is_said_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    dropping = compressor(rule="bounded", rule_options={"blocks": 2, "overflow": "drop"})
    session = Session(dropping, TOKENIZER)
    with caplog.at_level(logging.WARNING):
        session.append("one")
        session.append("two")
        assert not caplog.records
        session.append("three")
    assert "dropped, not folded" in caplog.text
    assert session.stats()["tokens_dropped"] == len(render(TOKENIZER, "user", "one").ids)


def test_blurring_is_said_once_and_the_reach_is_counted(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bounded = compressor(rule="bounded", rule_options={"blocks": 3})
    session = Session(bounded, TOKENIZER, window=0, segment=64)
    length = len(render(TOKENIZER, "user", "one").ids)
    assert session.stats()["reach_when_full"] == 2 * 64  # before the first segment, the longest
    with caplog.at_level(logging.WARNING):
        for text in ("one", "two", "sea"):
            session.append(text)
        stats = session.stats()
        assert not caplog.records
        assert (stats["reach"], stats["tokens_merged"], stats["segments_merged"]) == (3 * length, 0, 0)
        assert stats["reach_when_full"] == 2 * length
        assert reach_in_words(stats) == f"reaches back to the start, ~{2 * length} tokens when full"
        for text in ("for", "fiv"):
            session.append(text)
    stats = session.stats()
    assert (stats["reach"], stats["tokens_merged"], stats["segments_merged"]) == (2 * length, 3 * length, 3)
    assert stats["tokens_seen"] == stats["reach"] + stats["tokens_merged"] and stats["tokens_dropped"] == 0
    assert reach_in_words(stats) == f"reaches back ~{2 * length} tokens"
    (record,) = caplog.records
    assert f"older than the newest {2 * length} tokens is merged" in record.getMessage()
    session.save(tmp_path / "s.ccm")
    loaded = Session.load(tmp_path / "s.ccm", bounded, TOKENIZER)
    assert loaded.stats() == stats
    with caplog.at_level(logging.WARNING):
        loaded.append("six")
    assert len(caplog.records) == 1 and loaded.stats()["segments_merged"] == 4


def test_a_rule_that_merges_by_design_warns_of_nothing(
    merge: Compressor, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(merge, TOKENIZER)
    for text in ("one", "two", "three"):
        session.append(text)
    assert not caplog.records and session.stats()["reach"] == 0


def test_without_merging_the_context_ends_the_reach() -> None:
    session = Session(compressor(rule="concat"), TOKENIZER, sink=4, window=60, segment=10)
    assert session.stats()["reach_when_full"] == (1024 - 4 - 60 - 10) // 2 * 10 + 60  # two slots a segment
    session.append("one")
    assert session.stats()["reach"] == session.stats()["tokens_seen"]


@pytest.mark.parametrize("rule", ["mean", "bounded"])
def test_one_paste_longer_than_the_context_is_answered(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=160)
    small = scramble(Compressor(model, CompressorConfig(slots=2, rule=rule)))
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 160
    session = Session(small, tokenizer, **CHAT)
    transformers.utils.logging.enable_propagation()
    try:
        assert session.generate("word " * 100, **GREEDY)
        assert not caplog.records
        tokenizer.encode(
            "word " * 100
        )  # negative control: transformers warns of errors that there are none of
        assert "indexing errors" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()
    stats = session.stats()
    assert stats["tokens_seen"] > 500 and stats["window"] <= CHAT["window"]


def test_an_answer_is_cut_to_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=160)
    small = scramble(Compressor(model, CompressorConfig(slots=2, rule="mean")))
    session = Session(small, TOKENIZER, sink=2, window=24)
    with caplog.at_level(logging.WARNING):
        session.generate("hello", max_new_tokens=20, eos_token_id=None)
        assert not caplog.records
        before = session.memory.length, session.stats()["tokens_seen"]
        session.generate("hello", max_new_tokens=5000, eos_token_id=None)
    assert "max_new_tokens: got 5000, the model's context of 160" in caplog.text
    # as much as fits, and all of it is remembered (what is no text takes more tokens when it is read)
    assert session.stats()["tokens_seen"] - before[1] >= 160 - before[0] - 2 * BEHIND
    assert session.generate("hello", max_new_tokens=5, eos_token_id=None)


def test_a_full_memory_says_what_is_full() -> None:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=96)
    small = scramble(Compressor(model, CompressorConfig(slots=2)))
    session = Session(small, TOKENIZER, window=0, segment=8)
    with pytest.raises(ConfigError, match=r"the memory has \d+ of them.*let a rule merge"):
        for _ in range(60):
            session.append("more and more")
    turns = session.turns
    with pytest.raises(ConfigError, match="begin a new"):
        session.generate(**GREEDY)
    assert session.turns == turns


def test_more_slots_than_trained_are_refused(merge: Compressor) -> None:
    with pytest.raises(ConfigError, match="slots"):
        ccm.Session(merge, TOKENIZER, slots=3)


def test_a_tokenizer_that_ends_nothing_writes_to_the_limit(merge: Compressor) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.chat_template = None
    session = Session(merge, tokenizer)
    session.generate("hi", **GREEDY)
    assert session.turns == 2
