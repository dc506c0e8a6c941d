"""Attention Matching: slots that attend as what they stand for did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_models import family_model
from tiny import random_rows, tiny_model, tiny_tokenizer

from ccm import get_method
from ccm.core.memory import KV, Row
from ccm.core.window import joined
from ccm.errors import ConfigError
from ccm.methods.scores import scoring, weights
from ccm.methods.synthesis import matching

#: Plain; a few layers that slide; soft caps; partial rotary; learned sinks.
FAMILIES = ["llama", "gemma3_text", "gemma2", "gpt_neox", "gpt_oss"]
#: No token comes twice: equal ones have equal keys in the first layer.
TEXT = [3 + (7 * i) % 41 for i in range(40)]
(LATER,) = random_rows([[12]])[0]


def bound(family: str = "llama", **options):
    return get_method("attention-matching", **{"slots": 6, "sink": 2, **options}).bind(family_model(family))


def held(method, text=TEXT):
    """A row whose sink is out of the window, what leaves, and the queries of the text."""
    ((read, queries),) = method.reader.watch([text])
    row = joined(method.empty().rows[0], read, read.length)
    return replace(row, sink=read.slice(0, 2), window=read.slice(0, 0)), read.slice(2), queries


def output(method, parts: list[KV], memory: int, queries: torch.Tensor) -> torch.Tensor:
    """What attention gives queries that come next (L, H, G, w, D)."""
    kv = KV.cat(part.to(torch.float32) for part in parts)
    found = weights(method.reader, queries, kv.keys, memory=memory, start=kv.length)
    return found @ kv.values.unsqueeze(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_attend_as_the_text_did(family: str) -> None:
    """For the reference queries, fitted values miss less than those of the same entries as they were."""
    method = bound(family)
    row, leaving, queries = held(method)
    new = method.keep(row, leaving, queries)
    assert new.length == 6 and all(part.isfinite().all() for part in new)
    # the entries that were kept, by their keys, with the values that they had
    at = (new.keys.unsqueeze(3) - leaving.keys.float().unsqueeze(2)).abs().sum(-1).argmin(-1)
    assert torch.allclose(leaving.take(at).keys.float(), new.keys, atol=1e-6)
    assert (at.diff(dim=2) > 0).all(), "in the order of the text, each once"
    before = output(method, [row.sink, leaving], 2, queries)
    fitted = output(method, [row.sink, new], 8, queries)
    raw = output(method, [row.sink, leaving.take(at)], 8, queries)

    def missed(other: torch.Tensor) -> torch.Tensor:
        return (other - before).square().sum((2, 3, 4))

    # a ridge may cost a little where nothing was missing
    assert (missed(fitted) <= missed(raw) * 1.05 + 1e-6).float().mean() > 0.8
    assert missed(fitted).sum() < missed(raw).sum() * 0.9


def test_the_keys_are_those_that_explain_most() -> None:
    """Picked columns explain more than any others, in a case where all choices can be tried."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 1, 30, 6, generator=generator)
    y = a[..., [1, 4]] @ torch.rand(2, 3, generator=generator)
    best = matching.pick(a.mT @ a, a.mT @ y, 2)
    left = [
        (y - a[..., pair] @ torch.linalg.lstsq(a[..., pair], y).solution).square().sum()
        for pair in torch.combinations(torch.arange(6)).tolist()
    ]
    assert min(left) < 1e-8, "two columns explain all"
    chosen = a[..., best.flatten()]
    alone = min(
        (y - a[..., [j]] @ torch.linalg.lstsq(a[..., [j]], y).solution).square().sum() for j in range(6)
    )
    assert (y - chosen @ torch.linalg.lstsq(chosen, y).solution).square().sum() < alone / 2
    assert matching.pick(a.mT @ a, a.mT @ y, 6).flatten().tolist() == list(range(6))


def test_few_queries_and_many_slots_stay_finite() -> None:
    """One query a text, again and again: more unknowns than equations."""
    method = bound(slots=20)
    memory = method.empty()
    method = replace(method).bind(method.reader)
    for token in TEXT * 3:
        memory = method.fold(memory, [[token]])
    (row,) = memory.rows
    assert row.slots.length == 20
    raw = torch.cat([kv.values for kv in method.reader.read([TEXT])], dim=2)
    assert row.slots.values.abs().max() < 5 * raw.abs().max(), "values drift away"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_is_the_full_context(family: str) -> None:
    method = bound(family, slots=64)
    memory = method.fold(method.fold(method.empty(), [TEXT[:15]]), [TEXT[15:]])
    got = method.reader.logits([LATER], memory)
    reader = method.reader
    whole = get_method("full").bind(reader)
    expected = reader.logits([LATER], whole.fold(whole.fold(whole.empty(), [TEXT[:15]]), [TEXT[15:]]))
    if not any(how.sliding for how in scoring(reader)):  # slots are seen from everywhere
        assert torch.allclose(got, expected, atol=1e-4)
    assert memory.rows[0].slots.length == len(TEXT) - 2
    few = bound(family, slots=8)
    less = few.fold(few.fold(few.empty(), [TEXT[:15]]), [TEXT[15:]])
    assert not torch.allclose(reader.logits([LATER], less), expected, atol=1e-4), "the control"


def test_a_text_before_which_nothing_is_seen() -> None:
    """A layer that slides sees nothing of what leaves: its queries ask for nothing, and nothing breaks."""
    method = bound("mistral", sink=0, slots=3)
    memory = method.fold(method.empty(), [TEXT])
    assert all(part.isfinite().all() for part in memory.rows[0].slots)


def test_old_slots_outlast_a_text_that_does_not_ask_for_them() -> None:
    """Without the weight of what is held, one text of another kind takes all slots."""
    method = bound(slots=8)
    memory = method.fold(method.empty(), [TEXT])
    old = memory.rows[0].slots.keys

    def stay(weight: float, monkey: pytest.MonkeyPatch) -> float:
        monkey.setattr(matching, "HELD", weight)
        new = method.fold(memory, [LATER]).rows[0].slots.keys
        return float(((new.unsqueeze(3) - old.unsqueeze(2)).abs().sum(-1) < 1e-5).any(2).float().mean())

    with pytest.MonkeyPatch.context() as monkey:
        none, usual, much = (stay(weight, monkey) for weight in (0.0, matching.HELD, 3.0))
    assert none <= usual <= much
    assert none < much


def test_it_needs_no_tokenizer_and_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="slots is 0"):
        get_method("attention-matching", slots=0)
    assert type(get_method("am")) is type(get_method("attention-matching"))
    row: Row = bound().fold(bound().empty(), [TEXT]).rows[0]
    assert (row.sink.length, row.slots.length, row.window.length) == (2, 6, 0)


def test_its_own_questions_fit_a_short_context() -> None:
    """Bytes as words: they are longer than the model's context."""
    model = tiny_model(vocab_size=300, max_position_embeddings=96)
    method = get_method("attention-matching", slots=6).bind(model, tiny_tokenizer())
    memory = method.fold(method.empty(), [TEXT])
    assert memory.rows[0].slots.length == 6
