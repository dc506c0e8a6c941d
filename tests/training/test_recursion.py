"""One parallel pass has the gradients of the recursion; and the ablations of the core are what they claim to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import random_rows, tiny_compressor
from torch import Tensor

from ccm.core import folding
from ccm.core.compressor import Compressor
from ccm.core.memory import KV
from ccm.data.rows import ConversationRow
from ccm.errors import ConfigError
from ccm.training import recursion
from ccm.training.recipe import load_recipe

TOLERANCE = 1e-4
FAMILIES = ["llama", "gemma3_text", "gpt_neox"]


def rows_of(lengths: list[list[int]]) -> list[ConversationRow]:
    """Random rows; all but the first token of a segment is scored, and of the third segment nothing."""
    return [
        ConversationRow(
            str(r),
            tuple(map(tuple, row)),
            tuple((1, len(segment) if i != 2 else 1) for i, segment in enumerate(row)),
        )
        for r, row in enumerate(random_rows(lengths))
    ]


# Rows of different lengths, segments longer than the recent window and than the sliding window.
ROWS = rows_of([[5, 4, 7, 3, 8], [4, 11, 3], [6, 2, 9, 5]])


def gradients(losses, compressor: Compressor, **options) -> dict[str, Tensor]:
    """Loss, its number of tokens, and the gradient of each trained parameter, by name."""
    compressor.zero_grad(set_to_none=True)
    loss, tokens = losses(compressor, ROWS, **options)
    loss.backward()
    names = {id(p): name for name, p in compressor.named_parameters()}
    found = {
        # in the last layer nothing reads what COMP tokens put out: zero, or not in the graph at all
        names[id(p)]: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for p in compressor.trainable_parameters()
    }
    return {"loss": loss.detach(), "tokens": torch.tensor(float(tokens)), **found}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of the same tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-6)) for k in a)


@pytest.mark.parametrize("sizes", [{}, {"sink": 2, "window": 9}], ids=["plain", "window"])
@pytest.mark.parametrize("rule", ["concat", "mean", "ema"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parallel_pass_has_the_gradients_of_the_recursion(family, rule, sizes, record_property):
    compressor = tiny_compressor(family, rule=rule)
    expected = gradients(recursion.recurrent_losses, compressor, objective="ce", **sizes)
    got = gradients(recursion.parallel_losses, compressor, objective="ce", **sizes)
    assert expected["comp_embeddings"].abs().max() > 1e-2
    assert sum("lora_" in name and bool(grad.abs().max() > 1e-3) for name, grad in got.items()) >= 6
    record_property("largest_difference", error := difference(expected, got))
    assert error < TOLERANCE


@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_also_against_the_teacher_and_with_fewer_slots(rule):
    compressor = tiny_compressor("llama", rule=rule, slots=3)
    losses = recursion.recurrent_losses, recursion.parallel_losses
    expected, got = (gradients(each, compressor, objective="distill", slots=2) for each in losses)
    assert difference(expected, got) < TOLERANCE
    assert not expected["comp_embeddings"][2].any()  # the third COMP token took no part


@pytest.mark.parametrize("rule", ["concat", "mean", "ema"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_the_memory_out_of_the_graph_breaks_it(family, rule, monkeypatch):
    """Negative control: the same loss, but no gradient through slots of more than one step ago."""
    compressor = tiny_compressor(family, rule=rule)
    expected = gradients(recursion.parallel_losses, compressor, objective="ce")

    def truncated(row, block, rule, sink):
        return folding.put(replace(row, slots=KV(*(t.detach() for t in row.slots))), block, rule, sink)

    monkeypatch.setattr("ccm.core.compressor.put", truncated)
    got = gradients(recursion.recurrent_losses, compressor, objective="ce")
    assert abs(got["loss"] - expected["loss"]) < TOLERANCE * expected["loss"]
    assert difference(expected, got) > 0.05


def test_the_recursion_leaves_no_hook_behind():
    compressor = tiny_compressor("llama")
    recursion.recurrent_losses(compressor, ROWS)
    assert not compressor.model.base_model._forward_hooks


@pytest.mark.parametrize("losses", [recursion.recurrent_losses, recursion.parallel_losses])
def test_rows_without_a_target_are_refused(losses):
    with pytest.raises(ConfigError, match="without a target"):
        losses(tiny_compressor("llama"), rows_of([[4]]))


# ---------------------------------------------------------------------- benchmarks/ablations.py


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return pytest.importorskip("ablations")


SEGMENTS = [row.segments for row in ROWS]


def all_logits(compressor: Compressor) -> list[list[Tensor]]:
    with torch.no_grad():
        out = compressor(SEGMENTS)
    return [[out.segment_logits(r, i) for i in range(len(row))] for r, row in enumerate(SEGMENTS)]


def largest_gap(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    return max(
        float((x - y).abs().max()) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def live(compressor: Compressor, alone: bool) -> list[list[Tensor]]:
    """Logits by the recursion; with ``alone``, every segment is compressed from an empty memory."""
    result = []
    for row in SEGMENTS:
        memory, logits = compressor.empty(), []
        for segment in row:
            logits.append(compressor.logits([list(segment)], memory)[0])
            new = compressor.compress([list(segment)], None if alone else memory)
            if alone:
                (old,), (block,) = memory.rows, new.rows
                step = old.steps + 1
                slots = KV(
                    *(compressor.rule.update(m, h, step) for m, h in zip(old.slots, block.slots, strict=True))
                )
                new = replace(new, rows=(replace(block, slots=slots, steps=step),))
            memory = new
        result.append(logits)
    return result


@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_without_recursion_every_segment_is_compressed_alone(rule):
    compressor = tiny_compressor("llama", rule=rule, kind="gisting-online")
    got = all_logits(compressor)
    assert largest_gap(got, live(compressor, alone=True)) < TOLERANCE
    recursive = tiny_compressor("llama", rule=rule)
    assert largest_gap(got, live(recursive, alone=False)) > 0.1  # the control: it is not the recursion


def test_without_recursion_nothing_reaches_the_next_fold():
    for kind, same in (("gisting-online", True), ("ccm", False)):
        compressor = tiny_compressor("llama", rule="replace", kind=kind)  # the last segment reads h(2) only
        first, other, second, last = random_rows([[5, 5, 7, 4]])[0]
        with torch.no_grad():
            a, b = (compressor([[start, second, last]]).segment_logits(0, 2) for start in (first, other))
        assert (float((a - b).abs().max()) < 1e-6) == same


def test_every_variant_is_a_recipe_of_its_own(ablations):
    configs = {
        name: load_recipe(ablations.RECIPE, each.overrides) for name, each in ablations.VARIANTS.items()
    }
    baseline = load_recipe(ablations.RECIPE)
    assert configs[ablations.BASELINE] == baseline
    assert len({repr(config) for config in configs.values()}) == len(configs)
    longer = {name for name, config in configs.items() if config.steps != baseline.steps}
    assert longer == {"steps-60", "steps-120"}


def test_the_page_has_what_is_stored(ablations):
    def run(share, difference, **more):
        interval = [difference - 0.01, difference + 0.01]
        return {"recovered_share": share, "difference": difference, "difference_ci": interval,
                "parameters": 920_000, "tokens": 32_413, "seconds": 160.0, **more}  # fmt: skip

    fewer = {"1": [0.61, 0.6, 0.62], "2": [0.63, 0.62, 0.64]}
    runs = {
        "rank-2": run(0.57, -0.09),
        "seed": run(0.64, -0.02),
        "baseline": run(0.66, 0.0),
        "rank-32": run(0.7, 0.04),
    }
    result = {"schedule": {"steps": 30, "held_out_rows": 96}, "variants": runs}
    text = ablations.page(result)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]
    assert rows == ["`baseline`", "`rank-32`", "`seed`", "`rank-2`"]  # the best first
    assert "32,413 tokens" in text and "−0.090 <sub>−0.100 to −0.080</sub>" in text and "budgets" not in text
    runs |= {"slots-1": run(0.6, -0.06), "slots-2": run(0.65, -0.01)}
    runs["nested"] = run(0.65, -0.01, recovered_share_with_fewer_slots=fewer)
    assert "| 1 | 0.610 | 0.600 (`slots-1`) |" in ablations.page(result)
    del runs["seed"]
    with pytest.raises(ConfigError, match="needs seed"):
        ablations.page(result)


def test_other_kinds_have_another_recursion():
    compressor = tiny_compressor("llama", kind="gisting-online")
    with pytest.raises(ConfigError, match="gisting-online"):
        recursion.recurrent_losses(compressor, ROWS)


def test_intervals_are_paired(ablations):
    """A method that is always a little better is so with certainty, however much rows differ."""
    generator = torch.Generator().manual_seed(0)
    none = (100 + 50 * torch.rand(60, generator=generator)).tolist()
    references = {"none": none, "full": [0.5 * x for x in none]}
    baseline, better = [0.7 * x for x in none], [0.69 * x for x in none]
    assert ablations.share_interval(references, baseline)[0] == pytest.approx(0.6)
    assert ablations.share_interval(references, better, baseline) == pytest.approx((0.02, 0.02, 0.02))
    noisy = [x + 20 * (torch.rand(1, generator=generator).item() - 0.5) for x in baseline]
    share, low, high = ablations.share_interval(references, noisy, baseline)
    assert low < share < high and low < 0 < high


def test_results_of_another_schedule_are_not_mixed(ablations, tmp_path):
    path, schedule = tmp_path / "results" / "ablations.json", {"budget": "100 tokens", "turns": 10}
    assert ablations.read_stored(path, schedule) is None
    ablations.write(path, {"schedule": schedule, "variants": {"baseline": {}}})
    assert ablations.read_stored(path, schedule)["variants"] == {"baseline": {}}
    with pytest.raises(ConfigError, match="100 tokens, not 200 tokens"):
        ablations.read_stored(path, {**schedule, "budget": "200 tokens"})
