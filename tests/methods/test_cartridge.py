"""A memory trained for one text: it foresees more like the text itself, and nothing but its slots has changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import TOKENIZER, model
from torch.nn.functional import kl_div

from ccm import get_method
from ccm.core.memory import KV, Row
from ccm.core.window import joined
from ccm.errors import ConfigError
from ccm.methods.synthesis.cartridge import Cartridge

#: Letters, which the tiny tokenizer tells apart.
TEXT = [30 + (7 * i) % 41 for i in range(40)]


def bound(family: str = "llama", **options: Any) -> Cartridge:
    method = get_method("cartridge", **{"slots": 6, "sink": 2, **options}).bind(model(family), TOKENIZER)
    assert isinstance(method, Cartridge)
    return method


def held(method: Cartridge, text: list[int]) -> tuple[Row, KV, torch.Tensor]:
    """A row whose sink is out of the window, what leaves, and the queries of the text."""
    ((read, queries),) = method.reader.watch([text])
    row = joined(method.heard(method.empty().rows[0], text), read, read.length)
    row = replace(row, sink=read.slice(0, 2), window=read.slice(0, 0), tokens=len(text))
    return row, read.slice(2), queries


@torch.no_grad()
def missed(method: Cartridge, row: Row, leaving: KV, slots: KV) -> float:
    """The distillation loss, as the docstring says it."""
    whole = replace(row, window=leaving)
    passages = method.passages(whole, leaving.length)
    wanted, found = (method.foreseen(of, passages) for of in (whole, replace(row, slots=slots)))
    return float(kl_div(found, wanted, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_the_loss_falls_and_the_model_stays(family: str) -> None:
    method = bound(family)
    weights = {name: weight.clone() for name, weight in method.reader.model.state_dict().items()}
    row, leaving, queries = held(method, TEXT)
    start = method.resized(steps=0).keep(row, leaving, queries)
    slots = method.keep(row, leaving, queries)
    assert start.length == slots.length == 6 and not slots.keys.requires_grad
    assert missed(method, row, leaving, slots) < 0.8 * missed(method, row, leaving, start)
    for name, weight in method.reader.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert all(weight.grad is None for weight in method.reader.model.parameters())
    assert torch.equal(row.sink.keys, held(method, TEXT)[0].sink.keys)

    other, gone, asked = held(method, TEXT[::-1])  # negative control: trained for another text
    foreign = method.keep(other, gone, asked)
    assert missed(method, row, leaving, foreign) > missed(method, row, leaving, slots)


def test_without_steps_it_is_attention_matching() -> None:
    method = bound(steps=0)
    row, leaving, queries = held(method, TEXT)
    plain = get_method("attention-matching", slots=6, sink=2).bind(method.reader, TOKENIZER)
    for mine, other in zip(
        method.keep(row, leaving, queries), plain.keep(row, leaving, queries), strict=True
    ):
        assert torch.equal(mine, other)
    assert not torch.equal(
        bound().keep(row, leaving, queries).values, plain.keep(row, leaving, queries).values
    )


def test_it_recites_what_leaves_and_a_stretch_of_what_left() -> None:
    method = bound(study=5, segment=8)
    memory = method.empty()
    for start in range(0, 24, 8):
        memory = method.fold(memory, [TEXT[start : start + 8]])
    row = memory.rows[0]
    assert row.notes == tuple(TEXT[:24]) and row.slots.length == 6
    request = TOKENIZER.encode("\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False)
    (newest, count), (old, before) = method.passages(row, 8)
    assert list(newest) == [*request, *TEXT[16:24]] and count == 8
    assert before == 5 and any(list(old) == [*request, *TEXT[i : i + 5]] for i in range(12))
    assert method.passages(row, 8) == method.passages(row, 8)
    nobody = method.bind(method.reader)  # without a tokenizer: the first token is given
    assert nobody.passages(row, 8)[0] == (tuple(TEXT[16:24]), 7)


def test_it_learns_where_engines_fold() -> None:
    """In inference mode, where nothing has gradients."""
    method = bound()
    row, leaving, queries = held(method, TEXT)
    expected = method.keep(row, leaving, queries)
    with torch.inference_mode():
        inside = held(method, TEXT)
        got = method.keep(*inside)
    assert torch.allclose(got.values, expected.values, atol=1e-4)


def test_it_refuses_a_step_that_goes_nowhere() -> None:
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="rate is"):
            get_method("cartridge", rate=rate)
    with pytest.raises(ConfigError, match="steps is -1"):
        get_method("cartridge", steps=-1)
