"""The lean pass of training gives the numbers of the compressor's own parallel pass, and their gradients."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_compressor
from torch.utils._python_dispatch import TorchDispatchMode

from ccm.core.compressor import Compressor
from ccm.core.rule import Rule, get_rule
from ccm.training.engines import Engine, Lean, Padded, make_engine
from ccm.training.intervals import BLOCK, pack
from ccm.training.lean import LeanPass, Unfit
from ccm.training.objectives import distill, summed_loss
from ccm.training.packed import ArrayRow
from ccm.training.targets import ECHO, NONE, RECALL, TEXT, Row

FITTING = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
RULES = ("concat", "mean", "ema", "replace", "bounded")
SIZES = ({"slots": 2}, {"slots": 1, "sink": 3}, {"slots": 2, "sink": 2, "window": 9})

#: Every family with two rules, of which one with a window and sinks: all rules and sizes occur.
CASES = [(family, RULES[k], SIZES[k % 2]) for k, family in enumerate(FITTING)]
CASES += [(family, RULES[(k + 1) % 5], SIZES[2]) for k, family in enumerate(FITTING)]
PRODUCT = [(family, rule, sizes) for family in FITTING for rule in RULES for sizes in SIZES]
ALL = [
    pytest.param(
        *case, marks=() if case in CASES else pytest.mark.slow, id=f"{case[0]}-{case[1]}-{len(case[2])}"
    )
    for case in PRODUCT
]


def some_rows(seed: int = 0, count: int = 5, segments: int = 7) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        parts = tuple(
            tuple(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 12)))
            for _ in range(rng.randrange(1, segments + 1))
        )
        rows.append(Row(parts, tuple(tuple(1 for _ in s) for s in parts)))
    return rows


def scored_rows(seed: int = 0, **sizes: int) -> list[ArrayRow]:
    """Rows of which tokens have any role, none that begins a segment."""
    draw = np.random.default_rng(seed)
    rows = [ArrayRow.from_row(row) for row in some_rows(seed, **sizes)]
    for row in rows:
        row.roles[:] = draw.choice([NONE, TEXT, RECALL, ECHO], len(row.ids))
        row.roles[np.concatenate([[0], row.stops[:-1]])] = NONE
    assert {TEXT, RECALL, ECHO} <= set(np.concatenate([row.roles for row in rows]).tolist())
    return rows


def rule_of(name: str) -> Rule:
    return get_rule(name, **({"blocks": 3} if name == "bounded" else {}))


def own(compressor: Compressor, rows: list[Row], rule: Rule, **sizes: int) -> torch.Tensor:
    """The text of every row, one behind the other, by ``Compressor.hidden``: (T, d)."""
    before = compressor.rule
    compressor.rule = rule
    try:
        layout = compressor.lay_out([row.segments for row in rows], **sizes)
        hidden = compressor.hidden(layout)
    finally:
        compressor.rule = before
    return torch.cat([hidden[r, a:b] for r, spans in enumerate(layout.spans) for a, b in spans])


def lean(compressor: Compressor, rows: list[Row], rule: Rule, **sizes: int) -> torch.Tensor:
    passes = LeanPass(compressor)
    sizes = {"sink": 0, "window": 0, **sizes}
    packed = pack([ArrayRow.from_row(row) for row in rows], rule, near=passes.near, **sizes)
    return passes.norm(passes.hidden(packed))[: packed.tokens]


def gradients(compressor: Compressor) -> list[torch.Tensor]:
    """Those of the trained parameters, which have none afterwards."""
    found = [parameter.grad.clone() for parameter in compressor.trainable_parameters()]
    compressor.zero_grad(set_to_none=True)
    return found


def step(engine: Engine, prepared: Any) -> torch.Tensor:
    """One step without the optimizer's part; the loss. Gradients add up."""
    found = engine.run(prepared)
    loss = summed_loss(found.student, found.teacher, found.ids, engine.compressor.head, distill)
    loss.backward()
    return loss.detach()


# ---------------------------------------------------------------------- the pass


@pytest.mark.parametrize(("family", "rule", "sizes"), ALL)
def test_equals_the_compressor(family: str, rule: str, sizes: dict[str, int]) -> None:
    compressor = tiny_compressor(family, target_modules="all")
    rows = some_rows()
    with torch.no_grad():
        expected = own(compressor, rows, rule_of(rule), **sizes)
        got = lean(compressor, rows, rule_of(rule), **sizes)
        other = lean(compressor, rows, get_rule("replace" if rule != "replace" else "mean"), **sizes)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert (other - expected).abs().max() > 1e-2, "the test could not fail"


def test_the_quick_cases_hold_everything() -> None:
    assert all(case in PRODUCT for case in CASES)
    assert {f for f, _, _ in CASES} == set(FITTING) and {r for _, r, _ in CASES} == set(RULES)
    assert all(any(sizes == case[2] for case in CASES) for sizes in SIZES)


@pytest.mark.parametrize("family", FITTING)
def test_gradients_are_the_same(family: str) -> None:
    compressor = tiny_compressor(family, target_modules="all")
    rows, rule = some_rows(3), get_rule("mean")
    sizes = {"slots": 2, "sink": 2, "window": 9 if family in ("llama", "gemma3_text") else 0}
    weights = torch.randn(sum(row.tokens for row in rows), 32, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (own, lean):
        (run(compressor, rows, rule, **sizes) * weights).sum().backward()
        found.append(gradients(compressor))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert max(float(grad.abs().max()) for grad in found[0]) > 1


@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_padding_changes_nothing(rule: str) -> None:
    compressor = tiny_compressor(target_modules="all")
    passes, how = LeanPass(compressor), get_rule(rule)
    rows = [ArrayRow.from_row(row) for row in some_rows(2)]
    sizes = {"slots": 2, "sink": 2, "window": 9}
    tight = pack(rows, how, **sizes)
    wide = pack(rows, how, text=4 * BLOCK, comps=2 * BLOCK, **sizes)
    assert (len(wide.ids), len(wide.comp)) == (4 * BLOCK, 2 * BLOCK)
    torch.testing.assert_close(passes.hidden(tight)[: tight.tokens], passes.hidden(wide)[: tight.tokens])


# ---------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("family", "rule", "sizes"), [("llama", "concat", SIZES[0]), ("gemma3_text", "mean", SIZES[2])]
)
def test_engines_score_the_same(family: str, rule: str, sizes: dict[str, int]) -> None:
    compressor = tiny_compressor(family, target_modules="all")
    rows = scored_rows(4)
    expected, *others = (
        engine.run(engine.prepare(rows, rule_of(rule), teacher=True, **sizes))
        for engine in (Padded(compressor), Lean(compressor), Lean(compressor, width=4096))
    )
    for found in others:
        assert found.roles.tolist() == expected.roles.tolist() and found.ids.equal(expected.ids)
        for role in (TEXT, RECALL, ECHO):
            a, b = expected.of(role), found.of(role)
            assert a.ids.equal(b.ids) and len(a.ids)
            torch.testing.assert_close(b.student, a.student, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(b.teacher, a.teacher, atol=2e-4, rtol=2e-4)
    assert (expected.student - expected.teacher).abs().max() > 0.1


def test_a_bucket_is_wider_than_what_is_needed() -> None:
    compressor = tiny_compressor()
    rows = scored_rows()
    taken = [Lean(compressor, width).prepare(rows).rows for width in (0, 4096)]
    assert len(taken[0].ids) == BLOCK * -(-taken[0].tokens // BLOCK) < len(taken[1].ids) == 4096


@pytest.mark.parametrize("saves", [False, True])
def test_gradients_of_halves_and_of_saved_memory(saves: bool) -> None:
    compressor = tiny_compressor(target_modules="all")
    rows, sizes = scored_rows(5), {"slots": 2, "sink": 2, "window": 9}
    padded, engine = Padded(compressor), Lean(compressor, save_memory=saves)
    loss = step(padded, padded.prepare(rows, teacher=True, **sizes))
    expected = gradients(compressor)
    for parts in ([rows], [rows[:3], rows[3:]]):
        losses = [step(engine, engine.prepare(part, teacher=True, **sizes)) for part in parts]
        torch.testing.assert_close(sum(losses), loss, atol=1e-3, rtol=1e-4)
        for a, b in zip(expected, gradients(compressor), strict=True):
            torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------- models of another shape


def reason(caplog: pytest.LogCaptureFixture) -> str:
    return "; ".join(r.getMessage() for r in caplog.records if "padded" in r.getMessage())


@pytest.mark.parametrize(
    ("compressor", "why"),
    [
        (lambda: tiny_compressor("gpt_neox"), "written in another way"),
        (lambda: tiny_compressor("phi3"), "written in another way"),
        (lambda: tiny_compressor(kind="gisting", rule="replace"), "another kind"),
    ],
    ids=["gpt_neox", "phi3", "gisting"],
)
def test_other_shapes_run_their_own_layers(
    compressor: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert type(make_engine(compressor())) is Padded
    assert why in reason(caplog)


@pytest.mark.parametrize("family", FITTING)
def test_the_common_shape_runs_lean(family: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert type(make_engine(tiny_compressor(family))) is Lean
    assert not reason(caplog)


def test_other_numbers_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    compressor = tiny_compressor()
    layer = compressor.model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda x: 1.1 * plain(x)
    with caplog.at_level("INFO"):
        assert type(make_engine(compressor)) is Padded
    assert "a trial pass differs by" in reason(caplog)
    layer.forward = plain
    assert type(make_engine(compressor)) is Lean


@pytest.mark.parametrize("what", ["quantized", "spread"])
def test_no_trial_where_layers_are_not_plain(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = tiny_compressor()
    if what == "quantized":
        compressor.model.is_quantized = True
    else:
        compressor.model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    monkeypatch.setattr("ccm.training.engines.Lean", None)
    assert type(make_engine(compressor)) is Padded


def test_a_model_of_another_shape_is_told() -> None:
    with pytest.raises(Unfit):
        LeanPass(tiny_compressor("gpt_neox"))


# ---------------------------------------------------------------------- what a step does


class Operations(TorchDispatchMode):
    """Counts what runs, by name, but for views."""

    VIEWS = frozenset(
        [
            "view",
            "_unsafe_view",
            "expand",
            "permute",
            "transpose",
            "t",
            "slice",
            "select",
            "split",
            "split_with_sizes",
            "detach",
            "alias",
            "unsqueeze",
            "squeeze",
            "as_strided",
            "unbind",
            "chunk",
            "lift_fresh",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(engine: Engine, rows: list[ArrayRow], **sizes: int) -> Counter[str]:
    prepared = engine.prepare(rows, teacher=True, **{"slots": 2, "sink": 0, "window": 0, **sizes})
    engine.compressor.zero_grad(set_to_none=True)
    with Operations() as found:
        step(engine, prepared)
    return found.counts


def without_numbers(layers: int, monkeypatch: pytest.MonkeyPatch) -> Lean:
    """An engine on the meta device, where whatever asks for a number fails, as it would wait elsewhere.

    Attention is one operation over the whole mask there; on a CPU it is cut into blocks, on a CUDA device a kernel.
    """
    monkeypatch.setattr("ccm.training.lean.cut", lambda mask, together: [])
    compressor = tiny_compressor(target_modules="all", model={"num_hidden_layers": layers}, slots=4)
    compressor.model.to("meta")
    return Lean(compressor.to("meta"))


#: Operations of one layer in a step (student, teacher, backward pass; an RMS norm counts as five, is one on CUDA).
#: The padded engine has 295 on the same rows (``test_operations_of_the_padded_engine``), 327 with a window.
PER_LAYER, WITH_WINDOW = 168, 185


def test_operations_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, expected in (({}, PER_LAYER), ({"sink": 2, "window": 9}, WITH_WINDOW)):
        few, many = (
            operations(without_numbers(layers, monkeypatch), scored_rows(), **sizes).total()
            for layers in (3, 6)
        )
        assert (many - few) / 3 <= 1.1 * expected, f"{(many - few) / 3} operations a layer"
        assert few <= 1.1 * 4 * expected


def test_rows_segments_and_slots_cost_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = without_numbers(3, monkeypatch)
    expected = operations(engine, scored_rows(count=9))
    for rows in (scored_rows(count=60), scored_rows(count=9, segments=30)):
        for slots in (2, 4):
            assert operations(engine, rows, slots=slots) == expected


def test_a_step_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = without_numbers(3, monkeypatch)
    for rule in ("concat", "mean"):
        prepared = engine.prepare(scored_rows(), get_rule(rule), teacher=True, slots=2, sink=2, window=9)
        with Operations() as found:
            step(engine, prepared)
        assert not {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"} & set(found.counts)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the control: this engine asks
        padded = Padded(engine.compressor)
        step(padded, padded.prepare(scored_rows(), teacher=True))


def test_the_plan_of_the_kernels_asks_nothing_either() -> None:
    kernels = pytest.importorskip("ccm.training.kernels")
    spans = pack(scored_rows(), get_rule("concat"), slots=2).spans[None]
    with Operations() as found:
        kernels.plan_of(spans.to("meta"), 1024, 2)
    assert found.counts and not {"_local_scalar_dense", "nonzero"} & set(found.counts)


def test_operations_of_the_padded_engine() -> None:
    """What the numbers above are to be compared with."""
    few, many = (
        operations(
            Padded(tiny_compressor(target_modules="all", model={"num_hidden_layers": layers})), scored_rows()
        ).total()
        for layers in (3, 6)
    )
    assert 280 <= (many - few) / 3 <= 310
