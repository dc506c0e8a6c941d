"""The contract of the library: one parallel pass gives the same logits as folding segment by segment."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from tiny import CASES, pad, random_rows, tiny_compressor, tiny_model
from torch import Tensor

from ccm.core import attention
from ccm.core.compressor import Compressor
from ccm.core.visibility import within_window

TOLERANCE = 1e-4
BROKEN = 0.1  # what a negative control must exceed
SIZES = [(0, 0), (3, 0), (0, 9), (2, 12)]  # (sink, window)

# Segments shorter than the sink, longer than the window and longer than the sliding window; rows of 1 to 5.
ROWS = random_rows([[5, 4, 7, 3, 8], [2, 11, 3, 13, 4], [4, 6, 3], [9]])


@lru_cache(maxsize=2)  # parameters are ordered so that neighbours share one
def compressor_for(family: str, backend: str, rule: str) -> Compressor:
    name, _, overflow = rule.partition("-")
    options = {"blocks": 2, "overflow": overflow} if name == "bounded" else {}
    return tiny_compressor(family, backend, rule=name, rule_options=options)


@torch.no_grad()
def parallel(compressor: Compressor, sink: int, window: int) -> list[list[Tensor]]:
    out = compressor(segments=ROWS, sink=sink, window=window)
    return [[out.segment_logits(r, j) for j in range(len(row))] for r, row in enumerate(ROWS)]


def recurrent(compressor: Compressor, sink: int, window: int) -> list[list[Tensor]]:
    """Row by row, segment by segment."""
    result = []
    for row in ROWS:
        memory, logits = None, []
        for segment in row:
            logits.append(compressor.logits([segment], memory)[0])
            memory = compressor.compress([segment], memory, sink=sink, window=window)
        result.append(logits)
    return result


def recurrent_batch(compressor: Compressor, sink: int, window: int) -> list[list[Tensor]]:
    """The rows of five segments as one ragged batch, padded now at the left, now at the right."""
    memory, result = None, [[], []]
    for j, segments in enumerate(zip(*ROWS[:2], strict=True)):
        ids, mask = pad(segments, ("left", "right")[j % 2])
        logits = compressor.logits(ids, memory, mask)
        for r in range(2):
            result[r].append(logits[r][mask[r].bool()])
        memory = compressor.compress(ids, memory, mask, sink=sink, window=window)
    return result


def distance(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """The largest difference of any logit."""
    return max(
        (x - y).abs().max().item() for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def check(compressor: Compressor, sink: int, window: int, record) -> None:
    expected, got = recurrent(compressor, sink, window), parallel(compressor, sink, window)
    batch = recurrent_batch(compressor, sink, window)
    error = max(distance(expected, got), distance(expected[:2], batch))
    record("largest_error", error)
    assert error < TOLERANCE
    for row, logits in zip(ROWS, expected, strict=True):
        for segment, with_memory in zip(row[1:], logits[1:], strict=True):
            assert (with_memory - compressor.logits([segment])[0]).abs().max() > 1e-2, (
                "the memory does not matter"
            )


@pytest.mark.parametrize(("sink", "window"), SIZES)
@pytest.mark.parametrize("rule", ["concat", "mean", "ema"])
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_parallel_equals_recurrent(family, backend, rule, sink, window, record_property):
    check(compressor_for(family, backend, rule), sink, window, record_property)


@pytest.mark.parametrize(("sink", "window"), SIZES)
@pytest.mark.parametrize("rule", ["replace", "bounded-merge", "bounded-drop"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_other_rules(backend, rule, sink, window, record_property):
    check(compressor_for("llama", backend, rule), sink, window, record_property)


_SCALED = {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
ROPE = {
    # multiplies cos and sin, so that taking a key off its position must divide
    "yarn": {**_SCALED, "rope_type": "yarn", "attention_factor": 1.3},
    "llama3": {**_SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (2, 12)])
@pytest.mark.parametrize("kind", list(ROPE))
def test_scaled_rotary_embeddings(kind, sink, window, record_property):
    compressor = tiny_compressor("llama", rule="mean", model={"rope_parameters": ROPE[kind]})
    cos, sin, _ = compressor.rotary.stacked(torch.arange(3))
    assert ((cos**2 + sin**2).mean() > 1.2) == (kind == "yarn")
    check(compressor, sink, window, record_property)


def test_fewer_slots_than_trained(record_property):
    """Any number of slots up to n can be chosen at run time."""
    compressor = tiny_compressor("llama", slots=4, rule="concat")
    expected = []
    for row in ROWS:
        memory, logits = None, []
        for segment in row:
            logits.append(compressor.logits([segment], memory)[0])
            memory = compressor.compress([segment], memory, slots=1)
        expected.append(logits)
    with torch.no_grad():
        out = compressor(segments=ROWS, slots=1)
    got = [[out.segment_logits(r, j) for j in range(len(row))] for r, row in enumerate(ROWS)]
    assert distance(expected, got) < TOLERANCE
    assert distance(got, parallel(compressor, 0, 0)) > 1e-2


def test_the_models_are_what_the_tests_need():
    """Logits of order 1 to 10, uneven attention, partial rotary embeddings, both kinds of layers."""
    for family, backend in CASES:
        compressor = compressor_for(family, backend, "concat")
        logits = torch.cat([part for row in recurrent(compressor, 0, 0) for part in row])
        assert 0.5 < logits.std() < 20, family
    for family in ("phi3", "gpt_neox"):
        compressor = compressor_for(family, "sdpa", "concat")
        assert (
            compressor.rotary.stacked(torch.arange(1))[0].shape[-1]
            < compressor.empty().rows[0].slots.keys.shape[-1]
        )
    assert set(compressor_for("gemma3_text", "sdpa", "concat").rotary.layer_types) == {
        "full_attention",
        "sliding_attention",
    }
    attended = tiny_model("llama", "eager")(torch.tensor([ROWS[1][3]]), output_attentions=True).attentions
    assert max(a[0, :, -1].max().item() for a in attended) > 0.5  # 13 keys, uniform would be 0.08


# ---------------------------------------------------------------------- negative controls: each must break equality


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_a_plain_causal_mask_breaks_it(family, backend, rule, monkeypatch):
    compressor = compressor_for(family, backend, rule)
    expected = recurrent(compressor, 0, 0)

    def causal(layout, rule):
        batch, width = layout.segment.shape
        states = rule.placed(*layout.comp_index.shape[1:]).place.numel()
        text = torch.ones(batch, 1, width, width, dtype=torch.bool).tril()
        return torch.cat([text.new_zeros(batch, 1, width, states), text], dim=-1)

    monkeypatch.setattr(attention, "parallel_mask", causal)
    assert distance(expected, parallel(compressor, 0, 0)) > BROKEN


@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_slots_that_are_not_put_in_their_place_break_it(rule, monkeypatch):
    compressor = compressor_for("llama", "sdpa", rule)
    expected = recurrent(compressor, 0, 0)
    monkeypatch.setattr(attention, "rotate", lambda x, *tables: x)
    assert distance(expected, parallel(compressor, 0, 0)) > BROKEN


def test_keys_merged_out_of_phase_break_it(monkeypatch):
    compressor = compressor_for("llama", "sdpa", "mean")
    expected = recurrent(compressor, 0, 0)
    monkeypatch.setattr(attention, "unrotate", lambda x, *tables: x.float())
    monkeypatch.setattr(attention, "rotate", lambda x, *tables: x)
    assert distance(expected, parallel(compressor, 0, 0)) > BROKEN


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_slots_lost_to_a_sliding_window_break_it(family, rule, monkeypatch):
    compressor = compressor_for(family, "sdpa", rule)
    expected = parallel(compressor, 0, 0)
    monkeypatch.setattr(
        attention, "within_window", lambda q, k, memory, w: within_window(q, k, memory & False, w)
    )
    assert distance(expected, recurrent(compressor, 0, 0)) > BROKEN


def test_the_window_in_the_wrong_frame_breaks_it(monkeypatch):
    """With a recent window, queries meet slots and raw text in two frames; one frame for both is wrong."""
    compressor = compressor_for("llama", "sdpa", "concat")
    expected = recurrent(compressor, 2, 12)
    build = attention.ParallelPlan.build.__func__

    def one_frame(cls, *args):
        plan = build(cls, *args)
        plan.query_tables = plan.text_tables
        return plan

    monkeypatch.setattr(attention.ParallelPlan, "build", classmethod(one_frame))
    assert distance(expected, parallel(compressor, 2, 12)) > BROKEN
