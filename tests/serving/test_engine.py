"""The padded engine: what it answers to many at a time is what a session answers to one."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_contract import SIZES, EngineContract, check_many_at_a_time, compressor_of
from tiny import tiny_tokenizer

from ccm.chat.template import template_of
from ccm.chat.writer import Writer
from ccm.errors import ConfigError
from ccm.methods import as_method
from ccm.serving.engine import Job, PaddedEngine, Result, Sampling
from ccm.serving.engine.sampling import Sampler


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compressor():
    return compressor_of()


class TestPadded(EngineContract):
    @pytest.fixture
    def make(self, compressor, tokenizer):
        def make(rows=4, waiting=16, **sizes):
            method = as_method(compressor, tokenizer, **SIZES | sizes)
            return PaddedEngine(method, tokenizer, rows=rows, waiting=waiting)

        return make

    def test_a_long_prompt_is_read_in_chunks(self, compressor, tokenizer, engine, monkeypatch):
        monkeypatch.setattr("ccm.serving.engine.padded.CHUNK", 16)
        self.test_a_long_prompt_without_a_memory(compressor, tokenizer, engine)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_other_families(family, tokenizer):
    compressor = compressor_of(family)
    engine = PaddedEngine(as_method(compressor, tokenizer, **SIZES), tokenizer, rows=4)
    check_many_at_a_time(engine, compressor, tokenizer, **SIZES)
    engine.close()


def test_the_engine_keeps_its_threads_to_itself(compressor, tokenizer):
    """The server gives the model's thread all cores, and afterwards one to all others."""
    before, seen = torch.get_num_threads(), {}

    def note(name):
        seen[name] = torch.get_num_threads()

    try:
        torch.set_num_threads(3)
        engine = PaddedEngine(as_method(compressor, tokenizer), tokenizer)
        torch.set_num_threads(1)
        done = threading.Event()

        def listener(event):
            note("engine")
            if isinstance(event, Result):
                done.set()

        engine.submit(Job(compressor.empty(), ((5, 6, 7),)), listener)
        assert done.wait(60)
        other = threading.Thread(target=note, args=["other"])
        other.start()
        other.join()
        engine.close()
    finally:
        torch.set_num_threads(before)
    assert seen == {"engine": 3, "other": 1}


# ------------------------------------------------------------------ sampling and text


def test_sampling_follows_the_probabilities():
    """Frequencies of 4,000 draws, with and without a nucleus, and both penalties."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()

    def shares(**options):
        sampler = Sampler(Sampling(seed=0, **options), (3,))
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[sampler._draw(sampler._penalized(logits))] += 1
        return counts / 4000

    assert torch.allclose(shares(temperature=1), logits.exp(), atol=0.03)
    few = shares(top_k=2)
    assert few[2:].sum() == 0 and abs(few[0] - 2 / 3) < 0.03
    likely = shares(min_p=0.45, top_p=0.95)
    assert likely[2:].sum() == 0 and abs(likely[0] - 2 / 3) < 0.03
    assert shares(top_k=3, top_p=0.8)[2] == 0  # 0.75 of 0.9 is enough: the nucleus is one of these three
    assert shares()[0] == 1, "a model without settings of its own is greedy"
    nucleus = shares(top_p=0.7)
    assert nucleus[2:].sum() == 0 and abs(nucleus[0] - 2 / 3) < 0.03
    cold = shares(temperature=0.5)
    assert abs(cold[0] - 0.25 / 0.345) < 0.03
    assert shares(temperature=1, repetition_penalty=5.0)[3] < 0.01  # of the prompt; its logit is negative
    plain, penalized = (Sampler(Sampling(temperature=0, frequency_penalty=f), ()) for f in (0, 0.5))
    assert [plain.draw(logits) for _ in range(4)] == [0, 0, 0, 0]
    assert [penalized.draw(logits) for _ in range(4)] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 1.5}, {"stop": ("",)}, {"repetition_penalty": 0}],
)
def test_sampling_out_of_range(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Sampling(**change)


def write(tokenizer, text, *stop):
    writer = Writer(template_of(tokenizer).decode, stop)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(writer.put(token))
        if writer.stopped:
            break
    return writer, [*pieces, writer.end()]


def test_text_comes_in_whole_characters(tokenizer):
    """Every byte is a token here: no half of a character is given out, and nothing is lost."""
    text = "naïve 🙂 日本 end"
    writer, pieces = write(tokenizer, text)
    assert "".join(pieces) == text == writer.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert " 🙂" in pieces


def test_blanks_around_an_answer_go(tokenizer):
    writer, pieces = write(tokenizer, "\n  hello there \n ")
    assert "".join(pieces) == writer.text == "hello there"


def test_stop_texts_are_never_shown(tokenizer):
    writer, pieces = write(tokenizer, "one two STOP three", "STOP", "xyz")
    assert "".join(pieces) == writer.text == "one two" and writer.stopped
    writer, pieces = write(tokenizer, "one STO", "STOP")  # only a beginning of it
    assert "".join(pieces) == writer.text == "one STO" and not writer.stopped
