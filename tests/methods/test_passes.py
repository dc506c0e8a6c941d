"""How often the model runs for a turn, and over how many tokens; and that nothing is lost by its running less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_contract import Heard, turn
from passes import counted
from tiny import TEMPLATE, scramble, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from ccm import Session, get_method
from ccm.chat.answers import Answer
from ccm.chat.messages import Message
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import Memory
from ccm.core.reader import Known
from ccm.methods import Method, as_method
from ccm.methods.compressed import TOGETHER
from ccm.serving.engine import Job, PaddedEngine, Sampling

TOKENIZER = tiny_tokenizer()
FAMILIES = ["llama", "gemma3_text", "gpt_neox"]
NEW = 8
HEAD = len(TOKENIZER.encode("<|im_start|>assistant\n"))
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
CCM: dict[str, dict[str, Any]] = {
    "concat": {"rule": "concat"},
    "mean": {"rule": "mean"},
    "bounded": {"rule": "bounded", "rule_options": {"blocks": 2}},
}
CASES = [
    *((rule, window) for rule in CCM for window in (0, 64)),
    ("streaming-llm", 24),
    ("snapkv", 24),
    ("attention-matching", 24),
    ("full", 0),
]
#: Methods that look at the queries of new text: it is read again.
ASKING = ("snapkv", "attention-matching")


def spelling_model(family: str) -> PreTrainedModel:
    """A tiny model that writes letters alone, so that its answers are the same tokens when they are read again."""
    model = tiny_model(family, vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    letters = TOKENIZER.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    bias = torch.full((len(TOKENIZER),), -1e4)
    bias[letters] = 0
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + bias)
    return model


def method_of(name: str, window: int, family: str = "llama", segment: int = 48) -> Method:
    model = spelling_model(family)
    if name in CCM:
        compressor = scramble(Compressor(model, CompressorConfig(slots=2, sink=0, **CCM[name])))
        return as_method(compressor, TOKENIZER, window=window, sink=2, segment=segment)
    options = {} if name == "full" else {"window": window, "sink": 2}
    return get_method(name, **options, segment=segment).bind(model, TOKENIZER)


@pytest.fixture(scope="module", params=[(*case, family) for family in FAMILIES for case in CASES], ids=str)
def method(request: pytest.FixtureRequest) -> Method:
    name, window, family = request.param
    return method_of(name, window, family)


def close(a: Memory, b: Memory) -> None:
    for row, other in zip(a.rows, b.rows, strict=True):
        assert (row.segments, row.steps, row.tokens) == (other.segments, other.steps, other.tokens)
        for name in ("sink", "slots", "window"):
            for x, y in zip(getattr(row, name), getattr(other, name), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


def answered(
    method: Method,
    monkeypatch: pytest.MonkeyPatch,
    again: bool = False,
    tokenizer: Any = TOKENIZER,
    **options: Any,
) -> tuple[Session, list[int]]:
    """A session of two turns, and what each pass of the second one runs over."""
    with monkeypatch.context() as patch:
        if again:
            patch.setattr(Known, "shared", lambda *args: None)
        session = Session(method, tokenizer)
        session.generate("one thing", **GREEDY)
        with counted(method.reader) as passes:
            session.generate("and another", **GREEDY | options)
    return session, passes


def test_an_answer_is_not_read_again(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    session, passes = answered(method, monkeypatch)
    other, more = answered(method, monkeypatch, again=True)
    assert session.last == other.last and len(session.last.content) == NEW
    close(session.memory, other.memory)
    less = sum(more) - sum(passes)
    read = HEAD + NEW - 1  # the last token was drawn and not read
    assert less == (0 if method.name in ASKING else read)
    assert len(passes) <= len(more)


def test_passes_of_a_turn() -> None:
    """The question, the head of the answer, a pass for every token but the last, and what ends the turn."""
    question = len(TOKENIZER.encode("<|im_start|>user\nand another<|im_end|>\n"))
    end = len("x") + len(TOKENIZER.encode("<|im_end|>\n"))
    steps = [HEAD, *[1] * (NEW - 1)]
    for name, window, folds in (
        ("streaming-llm", 24, 0),
        ("concat", 0, 2),
        ("bounded", 64, 1),
        ("mean", 64, 1),
    ):
        session = Session(method_of(name, window), TOKENIZER)
        session.generate("one thing", **GREEDY)
        with counted(session.method.reader) as passes:
            session.generate("and another", **GREEDY)
        assert passes == [question, *steps, end + 2 * folds], name


def test_text_of_many_segments_is_one_pass() -> None:
    method = method_of("concat", 64, segment=32)
    session = Session(method, TOKENIZER)
    for _ in range(4):
        session.append("x" * 100)
    slots, steps = session.memory.slots, session.memory.steps
    with counted(method.reader) as passes:
        session.append("y" * 200)
    text = len(TOKENIZER.encode("<|im_start|>user\n" + "y" * 200 + "<|im_end|>\n"))
    assert session.memory.slots - slots == 2 * (session.memory.steps - steps) >= 2 * 6
    assert passes == [text + session.memory.slots - slots]
    with counted(method.reader) as passes:  # what is long goes in parts, each at the price of its tokens
        session.append("z" * 1000)
    assert len(passes) == 4 and max(passes) <= TOGETHER + 2 * (TOGETHER // 32 + 1)


def test_the_parts_of_a_text_fit_the_context() -> None:
    method = method_of("concat", 0, segment=32)
    segments = [range(32)] * 20
    assert method.portion(0, segments) == TOGETHER // 32
    assert method.portion(1024 - 3 * 34, segments) == 3
    assert method.portion(1024 - 1, segments) == 1  # is refused, and says why


def test_what_is_known_is_shared_behind_the_same_memory_alone() -> None:
    method = method_of("full", 0)
    memory = method.fold(method.empty(), [[5, 6, 7]])
    (kv,) = method.reader.read([[8, 9, 10]], memory)
    reading = Known(memory, (8, 9, 10), kv)
    assert reading.shared(memory, [8, 9, 10, 11]).length == 3
    assert reading.shared(memory, [8, 9]).length == 2
    assert reading.shared(memory, [8, 9, 11]).length == 2
    assert reading.shared(memory, [7, 9, 10]) is None
    assert reading.shared(Memory(memory.rows, memory.fingerprint), [8, 9, 10]) is None
    other = method.fold(method.empty(), [[5, 6, 8]])
    wrong = method.fold(other, [[8, 9, 10]], read=[kv])  # it does matter behind which memory it was read
    with pytest.raises(AssertionError):
        close(wrong, method.fold(other, [[8, 9, 10]]))


@pytest.mark.parametrize("name", ["concat", "streaming-llm"])
def test_a_long_answer_is_shared_as_far_as_its_first_segment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(name, 64, segment=16)
    session, passes = answered(method, monkeypatch)
    other, more = answered(method, monkeypatch, again=True)
    close(session.memory, other.memory)
    assert sum(more) - sum(passes) == 16 < HEAD + NEW - 1


@pytest.mark.parametrize("name", ["concat", "streaming-llm"])
def test_an_answer_that_is_remembered_in_other_words_is_shared_as_far_as_it_is_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(name, 64)
    monkeypatch.setattr(Answer, "message", lambda self: Message("assistant", self.content[:3] + "."))
    (session, passes), (other, more) = (answered(method, monkeypatch, again=again) for again in (False, True))
    close(session.memory, other.memory)
    assert sum(more) - sum(passes) == HEAD + 3


@pytest.mark.parametrize("name", ["concat", "streaming-llm"])
def test_an_answer_whose_question_is_written_anew_is_read_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, tokenizer = method_of(name, 64), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'user' %}now: {% endif %}{{ m['content'] }}"
    )
    session, passes = answered(method, monkeypatch, tokenizer=tokenizer)
    other, more = answered(method, monkeypatch, again=True, tokenizer=tokenizer)
    close(session.memory, other.memory)
    assert passes == more


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "early_stopping": True}])
def test_beams_are_read_again(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of("concat", 64)
    session, passes = answered(method, monkeypatch, **options)
    other, more = answered(method, monkeypatch, again=True, **options)
    assert passes == more
    close(session.memory, other.memory)


# ---------------------------------------------------------------------- the engine


def served(method: Method, sampling: Sampling, texts: list[str]) -> tuple[list[Memory], list[int]]:
    """Memories of conversations after two turns, side by side, and the passes of the second one."""
    engine = PaddedEngine(method, TOKENIZER)
    memories = [method.empty() for _ in texts]
    try:
        for _ in range(2):
            heard = [Heard() for _ in texts]
            jobs = [turn(TOKENIZER, m, text, sampling, 48) for m, text in zip(memories, texts, strict=True)]
            with counted(method.reader) as passes:
                for job, listener in zip(jobs, heard, strict=True):
                    engine.submit(job, listener)
                results = [listener.result() for listener in heard]
            memories = [result.memory for result in results]
            assert all(result.tokens for result in results)
    finally:
        engine.close()
    return memories, passes


@pytest.mark.parametrize("name", ["concat", "bounded", "streaming-llm", "snapkv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_does_not_read_an_answer_again(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(name, 64 if name == "bounded" else 24, family)
    sampling, texts = Sampling(max_tokens=NEW, temperature=0), ["one thing", "two", "things of three kinds"]
    memories, _ = served(method, sampling, texts)
    alone, passes = served(method, sampling, texts[:1])
    monkeypatch.setattr(Known, "shared", lambda *args: None)
    others, _ = served(method, sampling, texts)
    again, more = served(method, sampling, texts[:1])
    for a, b in zip([*memories, *alone], [*others, *again], strict=True):
        close(a, b)
    assert sum(more) - sum(passes) == (0 if method.name in ASKING else HEAD + NEW - 1)


def test_an_answer_that_a_stop_text_cuts_is_shared_as_far_as_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = method_of("concat", 64)
    written: list[str] = []
    whole = Sampling(max_tokens=NEW, temperature=0)
    engine = PaddedEngine(method, TOKENIZER)
    listener = Heard()
    engine.submit(turn(TOKENIZER, method.empty(), "one thing", whole, 48), listener)
    written.append(listener.result().text)
    engine.close()
    cut = Sampling(max_tokens=NEW, temperature=0, stop=(written[0][4:6],))
    (memory,), _ = served(method, cut, ["one thing"])
    monkeypatch.setattr(Known, "shared", lambda *args: None)
    (other,), _ = served(method, cut, ["one thing"])
    close(memory, other)


def test_an_engine_takes_in_many_segments_with_one_pass() -> None:
    method = method_of("concat", 24, segment=32)
    engine, listener = PaddedEngine(method, TOKENIZER), Heard()
    segments = tuple(tuple(range(5, 37)) for _ in range(7))
    with counted(method.reader) as passes:
        engine.submit(Job(method.empty(), segments), listener)
        memory = listener.result().memory
    engine.close()
    assert passes == [7 * 32 + 7 * 2] and memory.steps == 7
