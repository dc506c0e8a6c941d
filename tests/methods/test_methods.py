"""Every context memory behind the one protocol, on tiny random models."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from method_cases import ABSENT, TOKENIZER, model, tiny_adapters
from tiny import random_rows, tiny_model

from ccm import get_method, list_methods, load_default_model, open_method, shipped_adapters
from ccm.core.compressor import Compressor
from ccm.errors import ConfigError, UnknownNameError
from ccm.evaluation.suites import parse_method
from ccm.methods import Method, Run, register
from ccm.methods.accounting import counters, most_nbytes
from ccm.methods.base import METHODS
from ccm.methods.references import NoContext

SEGMENTS = random_rows([[6, 9, 5, 7]])[0]
ENTRY = 2 * 3 * 2 * 8 * 4  # keys and values, 3 layers, 2 KV heads of 8, fp32: bytes of one token


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=[name for name in list_methods() if name not in ABSENT])
def method(request: pytest.FixtureRequest, adapters: dict[str, str]) -> Method:
    options = {"adapter": adapters[request.param]} if request.param in adapters else {}
    return get_method(request.param, **options)


def fed(method: Method, segments: list[list[int]]) -> Run:
    run = method.open(model(), TOKENIZER)
    for segment in segments:
        run.append(segment)
    return run


def test_every_method_takes_in_and_scores(method: Method) -> None:
    run = fed(method, SEGMENTS[:2])
    before = run.kv_bytes
    first, again = run.logits(SEGMENTS[2]), run.logits(SEGMENTS[2])
    assert first.shape == (len(SEGMENTS[2]), len(TOKENIZER))
    assert torch.equal(first, again), "scoring changed what the run holds"
    assert run.kv_bytes == before


def test_a_choice_by_the_prompt_does_not_know_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = get_method("retrieve").open(model(), TOKENIZER), []
    monkeypatch.setattr(
        type(run.method), "recall", lambda self, memory, ids=None: asked.append(ids) or memory
    )
    run.logits([5, 6, 7, 8], begin=2)
    assert asked == [[[5, 6]]]


def test_a_fork_is_independent(method: Method) -> None:
    run = fed(method, SEGMENTS[:2])
    before, held = run.logits(SEGMENTS[3]), run.kv_bytes
    twin = run.fork()
    twin.append(SEGMENTS[2])
    assert torch.equal(run.logits(SEGMENTS[3]), before)
    assert run.kv_bytes == held
    if method.name != "none":
        assert not torch.allclose(twin.logits(SEGMENTS[3]), before, atol=1e-2)


def test_none_is_the_base_model_on_the_segment_alone() -> None:
    expected = model()(torch.tensor([SEGMENTS[2]])).logits[0]
    run = fed(get_method("none"), SEGMENTS[:2])
    assert torch.allclose(run.logits(SEGMENTS[2]), expected, atol=1e-5)
    assert run.kv_bytes == 0


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("full", "llama"),
        ("full", "mistral"),
        ("full", "gpt_neox"),
        ("streaming-llm", "llama"),
        ("streaming-llm", "gpt_neox"),
    ],
)
def test_full_context_is_the_base_model_on_the_whole_text(name: str, family: str) -> None:
    """So is a streaming cache that never overflows (but for models that slide themselves: its sink stays)."""
    model = tiny_model(family)
    whole = model(torch.tensor([[*chain(*SEGMENTS)]])).logits[0]
    run, start = get_method(name).open(tiny_model(family)), 0
    for segment in SEGMENTS:
        assert torch.allclose(run.logits(segment), whole[start : start + len(segment)], atol=1e-4)
        run.append(segment)
        start += len(segment)
    if family == "llama":
        assert run.kv_bytes == start * ENTRY


def test_streaming_keeps_sink_and_newest_tokens_as_they_were_computed() -> None:
    run = get_method("streaming-llm", sink=2, window=5).open(model())
    full = get_method("full").open(model())
    run.append(SEGMENTS[0] + SEGMENTS[1])
    full.append(SEGMENTS[0] + SEGMENTS[1])
    held, whole = run.memory.rows[0], full.memory.rows[0].window
    assert run.kv_bytes == 7 * ENTRY
    assert torch.equal(held.sink.keys, whole.keys[:, :, :2])
    assert torch.equal(held.window.keys, whole.keys[:, :, -5:])
    newest = held.window.values[:, :, -3:]
    run.append(SEGMENTS[2][:2])
    assert torch.equal(run.memory.rows[0].window.values[:, :, :3], newest), "old entries were computed again"


def test_streaming_budget_can_move() -> None:
    run = get_method("window").open(model())
    run.resize(0)
    assert run.kv_bytes == 0
    run.resize(5)
    run.append(SEGMENTS[0] + SEGMENTS[1])
    assert [run.memory.rows[0].sink.length, run.memory.rows[0].window.length] == [1, 4]
    run.resize(12)
    run.append(SEGMENTS[2])
    assert [run.memory.rows[0].sink.length, run.memory.rows[0].window.length] == [4, 8]
    full = fed(get_method("full"), [SEGMENTS[0] + SEGMENTS[1]])
    assert torch.equal(run.memory.rows[0].sink.keys, full.memory.rows[0].window.keys[:, :, :4])
    assert run.kv_bytes == 12 * ENTRY


@pytest.mark.parametrize(("name", "slots"), [("ccm-concat", 9), ("ccm-merge", 3)])
def test_compressed_methods_are_the_compressor(name: str, slots: int, adapters: dict[str, str]) -> None:
    compressor = Compressor.from_pretrained(model(), adapters[name])
    memory = None
    for segment in SEGMENTS[:3]:
        memory = compressor.compress([segment], memory)
    run = fed(get_method(name, adapter=adapters[name]), SEGMENTS[:3])
    assert torch.equal(run.logits(SEGMENTS[3]), compressor.logits([SEGMENTS[3]], memory)[0])
    assert run.kv_bytes == memory.nbytes == slots * ENTRY


def test_compressed_options(adapters: dict[str, str]) -> None:
    method = get_method("ccm-concat", adapter=adapters["ccm-concat"], slots=2, sink=3, window=8, rule="ema")
    run = fed(method, SEGMENTS[:3])
    row = run.memory.rows[0]
    assert [row.sink.length, row.slots.length, row.window.length] == [3, 2, 5]


def test_runs_of_one_model_share_the_compressor(adapters: dict[str, str]) -> None:
    shared, method = model(), get_method("ccm-merge", adapter=adapters["ccm-merge"])
    assert method.open(shared).reader is method.open(shared).reader
    other = get_method("ccm-merge", adapter=adapters["ccm-merge"], rule="ema")
    assert other.open(shared).reader is not method.open(shared).reader


def test_adapters_on_one_model_do_not_meet(adapters: dict[str, str]) -> None:
    shared = model()
    methods = [get_method(name, adapter=folder) for name, folder in adapters.items()]
    runs = [method.open(shared) for method in methods]
    for method, run in zip(methods, runs, strict=True):
        run.append(SEGMENTS[0])
        alone = fed(method, SEGMENTS[:1])
        assert torch.equal(run.logits(SEGMENTS[1]), alone.logits(SEGMENTS[1]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none", {"tokens": 1}),
        ("streaming-llm", {"sink": -1}),
        ("streaming-llm", {"window": -1}),
        ("ccm-merge", {"slots": 0}),
        ("ccm-merge", {"budget": 3}),
        ("gisting", {"slots": 0}),
        ("gisting-online", {"window": 8}),
        ("mean-pool", {"slots": 0}),
        ("summary", {"every": 0}),
        ("summary", {"max_tokens": 0}),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=name):
        get_method(name, **options)


def test_unknown_names_are_refused(adapters: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"expected one of .*ccm-concat"):
        get_method("h3o")
    with pytest.raises(ConfigError, match="no adapter"):
        get_method("ccm-merge", adapter=str(tmp_path)).open(model())
    with pytest.raises(ConfigError, match="slots is 4"):
        get_method("ccm-merge", adapter=adapters["ccm-merge"], slots=4).open(model())


def test_an_empty_segment_is_refused_and_changes_nothing(method: Method) -> None:
    run = fed(method, SEGMENTS[:1])
    before = run.kv_bytes
    with pytest.raises(ConfigError):
        run.append([])
    assert run.kv_bytes == before


def test_a_new_method_joins_by_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(NoContext):
        def open(self, model, tokenizer=None):
            return get_method("none").open(model)

    for name in ("ours", "mine"):  # undone after the test
        monkeypatch.setitem(METHODS, name, Ours)
    register("ours", "mine")(Ours)
    assert {"ours", "mine"} <= set(list_methods())
    assert get_method("mine").name == "ours"


@pytest.mark.parametrize("name", shipped_adapters())
def test_shipped_adapters_open_by_name(name: str) -> None:
    model, tokenizer = load_default_model()
    run = parse_method(name).method().open(model, tokenizer)
    run.append(tokenizer.encode("My cat is called Miso."))
    assert run.kv_bytes > 0


@pytest.mark.parametrize(
    ("name", "reach", "full"),
    [  # after 40 tokens, and whatever comes
        ("attention-matching:slots=8", 8, 8),
        ("snapkv:tokens=8,window=8", 8 + 8, 8 + 8),
        ("streaming-llm:sink=4,window=8", 8, 8),
        ("mean-pool:slots=2", 4 * 2, 256),
        ("retrieve:tokens=8,block=4,window=8", 40, 40),
        ("none", 0, 0),
        ("full", 40, 256),
    ],
)
def test_reach_counts_tokens_that_have_an_entry_of_their_own(name, reach, full):
    method = open_method(name, tiny_model())
    memory = method.empty()
    for k in range(4):
        memory = method.fold(memory, [list(range(3 + 10 * k, 13 + 10 * k))])
        if k == 0 and name.startswith("snapkv"):
            assert counters(memory, method)["tokens_merged"] == 0, "all of it is still there"
    stats = counters(memory, method)
    assert (stats["reach"], stats["reach_when_full"]) == (reach, full)
    assert stats["tokens_merged"] == 40 - reach
    assert stats["segments_merged"] == (4 - bool(stats["window"]) if stats["tokens_merged"] else 0)


def test_a_full_memory_of_a_16_bit_model_has_the_bytes_that_were_foretold() -> None:
    """Its slots are fp32, so a chat said "1.4 MB of at most 1.2 MB"."""
    small = model().to(torch.bfloat16)
    method = get_method("attention-matching", slots=8, sink=2, window=6).bind(small, TOKENIZER)
    memory = method.empty()
    for segment in random_rows([[9] * 6])[0]:
        memory = method.fold(memory, [segment])
    assert memory.length == method.limit
    assert memory.nbytes == most_nbytes(memory, method) > method.limit * method.reader.kv_bytes_per_token()
