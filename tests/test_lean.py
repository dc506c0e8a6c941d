"""The lean pass of training gives the numbers of the compressor's own parallel pass, and their gradients."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import VOCAB, tiny_compressor

from ccm.data.packed import ArrayRow
from ccm.rules import get_rule
from ccm.training.intervals import BLOCK, pack
from ccm.training.lean import LeanPass, Unfit
from ccm.training.targets import Row

FITTING = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")


def some_rows(seed: int = 0, count: int = 5) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        segments = tuple(
            tuple(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 12)))
            for _ in range(rng.randrange(1, 8))
        )
        rows.append(Row(segments, tuple(tuple(1 for _ in s) for s in segments)))
    return rows


def own(compressor, rows, rule, **sizes):
    """The text of every row, one behind the other, by ``Compressor.hidden``: (T, d)."""
    before = compressor.rule
    compressor.rule = rule
    try:
        layout = compressor.lay_out([row.segments for row in rows], **sizes)
        hidden = compressor.hidden(layout)
    finally:
        compressor.rule = before
    return torch.cat([hidden[r, a:b] for r, spans in enumerate(layout.spans) for a, b in spans])


def lean(compressor, rows, rule, **sizes):
    passes = LeanPass(compressor)
    sizes = {"sink": 0, "window": 0, **sizes}
    packed = pack([ArrayRow.from_row(row) for row in rows], rule, near=passes.near, **sizes)
    return passes.norm(passes.hidden(packed))[: packed.tokens]


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("rule", ["concat", "mean", "ema", "replace", "bounded"])
@pytest.mark.parametrize(
    "sizes", [{"slots": 2}, {"slots": 1, "sink": 3}, {"slots": 2, "sink": 2, "window": 9}]
)
def test_equals_the_compressor(family, rule, sizes):
    compressor = tiny_compressor(family, target_modules="all")
    how = get_rule(rule, **({"blocks": 3} if rule == "bounded" else {}))
    rows = some_rows()
    expected = own(compressor, rows, how, **sizes)
    got = lean(compressor, rows, how, **sizes)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    other = lean(compressor, rows, get_rule("replace" if rule != "replace" else "mean"), **sizes)
    assert (other - expected).abs().max() > 1e-2, "the test could not fail"


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("window", [0, 9])
def test_gradients_are_the_same(family, window):
    compressor = tiny_compressor(family, target_modules="all")
    rows, rule = some_rows(3), get_rule("mean")
    sizes = {"slots": 2, "sink": 2, "window": window}
    weights = torch.randn(sum(row.tokens for row in rows), 32, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (own, lean):
        for parameter in compressor.trainable_parameters():
            parameter.grad = None
        (run(compressor, rows, rule, **sizes) * weights).sum().backward()
        found.append([parameter.grad.clone() for parameter in compressor.trainable_parameters()])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert max(float(grad.abs().max()) for grad in found[0]) > 1


@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_padding_changes_nothing(rule):
    compressor = tiny_compressor(target_modules="all")
    passes, how = LeanPass(compressor), get_rule(rule)
    rows = [ArrayRow.from_row(row) for row in some_rows(2)]
    sizes = {"slots": 2, "sink": 2, "window": 9}
    tight = pack(rows, how, **sizes)
    wide = pack(rows, how, text=4 * BLOCK, comps=2 * BLOCK, **sizes)
    assert (len(wide.ids), len(wide.comp)) == (4 * BLOCK, 2 * BLOCK)
    torch.testing.assert_close(passes.hidden(tight)[: tight.tokens], passes.hidden(wide)[: tight.tokens])


def test_a_model_of_another_shape_is_told():
    with pytest.raises(Unfit):
        LeanPass(tiny_compressor("gpt_neox"))
