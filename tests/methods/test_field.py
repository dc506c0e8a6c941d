"""Methods of the field: each does what its paper says, by hand."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from method_cases import TOKENIZER, model
from tiny import random_rows

from ccm import get_method, list_methods
from ccm.core.memory import KV, Row
from ccm.core.rotary import rotate
from ccm.methods.base import METHODS
from ccm.methods.recall.retrieve_text import bm25
from ccm.methods.scores import scoring
from ccm.methods.selection.compactor import RIDGE, leverage
from ccm.methods.synthesis.freqkv import cosines
from ccm.methods.synthesis.merging import joined_to_nearest
from ccm.methods.synthesis.subgen import far_apart

NONE = torch.empty(1, 1, 0, 2)
ROW = Row(KV(NONE, NONE), KV(NONE, NONE), KV(NONE, NONE))


def kv(keys: list[list[float]], values: list[list[float]] | None = None) -> KV:
    tensor = torch.tensor(keys, dtype=torch.float32)[None, None]
    return KV(tensor, tensor if values is None else torch.tensor(values, dtype=torch.float32)[None, None])


def test_chunks_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best single entry is in a chunk that has less attention than another."""
    method = get_method("chunkkv", tokens=4)
    monkeypatch.setattr(type(method), "chunk", 2)
    seen = torch.tensor([0.1, 0.0, 0.2, 0.2, 0.3, 0.0, 0.15, 0.2]).view(1, 1, 1, 1, 8)
    monkeypatch.setattr(type(method), "seen", lambda *_: seen)
    kept = method.keep(ROW, kv([[i, 0] for i in range(8)]), torch.empty(0))
    assert kept.keys[0, 0, :, 0].tolist() == [2, 3, 6, 7]


def test_keys_along_the_queries_stay() -> None:
    """Their direction counts with its sign, and their length does."""
    queries = torch.tensor([[0.0, -2], [0.1, -3], [-0.1, -1]])[None, None]
    score = get_method("q-filters").score(ROW, kv([[9, 0], [0, -1], [0, 1], [0, -4]]), queries)
    assert score.argsort(descending=True)[0, 0, :2].tolist() == [3, 1] and score[0, 0, 2] < -0.9


def test_expected_attention_is_the_mean_weight_of_normal_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against many queries drawn with the mean and covariance of those that were asked."""
    of = model()
    method = get_method("expected-attention", tokens=4).bind(of)
    monkeypatch.setattr(type(method), "AHEAD", (4,))
    reader = method.reader
    layers, heads, size = reader.kv_shape()
    torch.manual_seed(0)
    shape = (layers, heads, 10, size)
    held = KV(torch.randn(shape), torch.nn.functional.normalize(torch.randn(shape), dim=3))
    query_heads = of.config.num_attention_heads
    queries = torch.randn(layers, query_heads, 40, size) + 1
    row = Row(*[held.slice(0, 0)] * 3)
    got = method.score(row, held, queries)
    turned = rotate(queries, *reader.rotary.stacked(torch.full((40,), 14)))[0].reshape(heads, -1, size)
    keys = rotate(held.keys, *reader.rotary.stacked(torch.arange(10)))[0]
    for h in range(heads):
        normal = torch.distributions.MultivariateNormal(
            turned[h].mean(0), torch.cov(turned[h].T, correction=0) + 1e-6 * torch.eye(size)
        )
        weight = (normal.sample((200_000,)) @ keys[h].T * scoring(reader)[0].scaling).exp().mean(0)
        assert torch.allclose(got[0, h], weight / weight.sum(), rtol=0.1)


def test_leverage_is_what_only_one_can_say() -> None:
    states = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])[None, None]
    score = leverage(states)[0, 0]
    ridge = RIDGE * 2  # K^T K is diag(3, 1)
    expected = torch.tensor([1 / (3 + ridge)] * 3 + [1 / (1 + ridge)])
    assert torch.allclose(score, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["compactor", "curdkv"])
def test_what_is_said_once_stays(name: str) -> None:
    entries = kv([[1, 0], [1, 0], [1, 0], [0, 1]], [[0, 1], [0, 1], [0, 1], [1, 0]])
    assert get_method(name, tokens=1).keep(ROW, entries, None).keys[0, 0].tolist() == [[0, 1]]


def test_low_frequencies_of_entries() -> None:
    """What does not vary is as it was, and what varies fastest is gone."""
    assert torch.allclose(cosines(7, "cpu") @ cosines(7, "cpu").T, torch.eye(7), atol=1e-5)
    fast = [[2.0, (-1.0) ** i] for i in range(8)]
    kept = get_method("freqkv", tokens=2).keep(ROW, kv(fast), None).keys[0, 0]
    assert torch.allclose(kept[:, 0], torch.tensor([2.0, 2.0]), atol=1e-5) and kept[:, 1].abs().max() < 0.5
    slow = torch.cos(torch.pi / 8 * (torch.arange(8) + 0.5))  # the lowest frequency but one
    kept = get_method("freqkv", tokens=2).keep(ROW, kv([[x, 0] for x in slow.tolist()]), None).keys[0, 0]
    assert torch.allclose(kept[:, 0], torch.cos(torch.pi / 2 * (torch.arange(2) + 0.5)), atol=1e-5)


def test_clusters_become_their_means() -> None:
    entries = kv([[0, 0], [9, 9], [0, 1], [9, 8]], [[1, 1], [2, 2], [3, 3], [4, 4]])
    assert far_apart(entries.keys, 2)[0, 0].tolist() == [0, 3]
    kept = get_method("subgen", tokens=2).keep(ROW, entries, None)
    assert kept.keys[0, 0].tolist() == [[0, 0.5], [9, 8.5]] and kept.values[0, 0].tolist() == [[2, 2], [3, 3]]


def test_evicted_entries_join_the_most_similar() -> None:
    entries = kv([[2, 0], [0, 1], [1, 0.1], [-1, -1]], [[1, 0], [0, 1], [4, 0], [8, 8]])
    weight = torch.tensor([1.0, 1, 2, 5])[None, None]
    kept = joined_to_nearest(entries, torch.tensor([[[0, 1]]]), weight, torch.tensor(0.6))
    assert torch.allclose(
        kept.values[0, 0], torch.tensor([[3.0, 0], [0, 1]])
    )  # (1 + 2 x 4) / 3; the last joins none
    assert torch.allclose(kept.keys[0, 0, 0], torch.tensor([4 / 3, 0.2 / 3]))


@pytest.mark.parametrize("name", ["d2o", "ems"])
def test_values_that_stay_hold_more_than_their_own(name: str) -> None:
    """A negative control for the eviction that they begin with."""
    of, (segments,) = model(), random_rows([[30]])
    method = get_method(name, sink=2, window=3, tokens=8).bind(of, TOKENIZER)
    kept = method.fold(method.empty(), segments).rows[0].slots
    raw = get_method("full").bind(of)
    values = raw.fold(raw.empty(), segments).rows[0].window.values
    known = (kept.values.unsqueeze(3) - values.unsqueeze(2)).abs().sum(-1).amin(-1) < 1e-6
    assert known.any() and not known.all()


def test_what_could_be_guessed_goes() -> None:
    of, (segments,) = model(), random_rows([[20]])
    method = get_method("selective-context", window=0, tokens=6).bind(of, TOKENIZER)
    folded = method.fold(method.empty(), segments).rows[0]
    (ids,) = segments
    guess = of(torch.tensor([ids])).logits[0].log_softmax(-1)
    guessed = [float("-inf")] + [guess[i, token].item() for i, token in enumerate(ids[1:])]
    least = sorted(sorted(range(20), key=guessed.__getitem__)[:6])
    assert list(folded.notes) == [ids[i] for i in least]
    (alone,) = method.reader.read([[ids[i] for i in least]])
    assert torch.allclose(folded.slots.keys, alone.keys, atol=1e-6)


def test_sentences_with_the_words_of_the_text_stay() -> None:
    """And the second is not the first over again."""
    text = "a cat saw a cat. I slept well. a cat saw a cat. a dog saw a cat."
    method = get_method("extractive", window=0, tokens=33).bind(model(), TOKENIZER)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    row = method.fold(method.empty(), [ids]).rows[0]
    assert TOKENIZER.decode(list(row.notes)).count("a cat saw") < 2 and row.slots.length == 33


def test_bm25() -> None:
    """Rare words count more than common ones, and short blocks more than long ones."""
    blocks = [Counter([1, 2, 2]), Counter([1, 3, 3]), Counter([1, 3, 4, 4, 4, 4])]
    assert bm25(blocks, [9]) == [0, 0, 0]
    assert bm25(blocks, [2])[0] > bm25(blocks, [1])[0] > 0
    assert bm25(blocks, [3])[1] > bm25(blocks, [3])[2] > bm25(blocks, [3])[0] == 0


def test_words_of_old_text_are_found() -> None:
    """However much came between; and what is read is what was found, as if nothing else had been said."""
    method = get_method("retrieve-text", window=4, tokens=8, block=4).bind(model(), TOKENIZER)
    told = [[31, 32, 33, 34], *([40 + i, 50 + i, 60 + i, 70 + i] for i in range(6)), [33, 5, 6, 7]]
    memory = method.empty()
    for segment in told:
        memory = method.fold(memory, [segment])
    row = memory.rows[0]
    assert row.slots.length == 8 and list(row.notes) == list(chain(*told))
    (alone,) = method.reader.read([[*told[0], *told[6]]])  # of blocks without its words the newest
    assert torch.allclose(row.slots.keys, alone.keys, atol=1e-6)


def test_segments_are_read_apart() -> None:
    """Each as behind the sink alone, whatever stands between."""
    method = get_method("ape", sink=2).bind(model(), TOKENIZER)
    first, second, third = [11, 12, 13, 14], [21, 22, 23], [31, 32]
    long, short = ([first, second, third], [first, third])
    memories = []
    for told in (long, short):
        memory = method.empty()
        for segment in told:
            memory = method.fold(memory, [segment])
        memories.append(memory.rows[0].window)
    assert torch.equal(memories[0].slice(7).values, memories[1].slice(4).values)
    full = get_method("full").bind(method.reader)
    memory = full.empty()
    for segment in long:
        memory = full.fold(memory, [segment])
    assert not torch.allclose(memory.rows[0].window.slice(7).values, memories[0].slice(7).values, atol=1e-4)


def test_every_method_stands_on_the_page_of_papers() -> None:
    """And the page names none that is not there."""
    page = Path(__file__).parents[2].joinpath("docs/papers.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[2])}
    methods = {METHODS[name].name for name in list_methods()} - {"none", "full"}
    assert named == methods
    without = [row for row in rows if "`" not in row[2] and row[2].strip() != "runs"]
    assert without and all(row[2].strip() == "no" and len(row[3].strip()) > 10 for row in without)


def test_every_paper_of_the_field_has_its_place() -> None:
    """119 abstracts were read; each is a row of the page, or in a sentence that says why it is none."""
    page = " ".join(Path(__file__).parents[2].joinpath("docs/papers.md").read_text().split()).lower()
    lines = Path(__file__).with_name("papers.txt").read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines]
    assert len(set(names)) == 119
    assert [name for name in names if name.lower() not in page] == []
