"""Passes whose layers read the copies of the weights: what they give, and when they are run so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import history, pad, random_rows, tiny_compressor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccm.core.attention import PLAN
from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.core.onward import Turn
from ccm.decoding import Decoder, install, layers
from ccm.decoding.step import Step
from ccm.models.placement import can_pack

SEGMENTS = random_rows([[6, 9, 4], [5], [8, 3]], seed=3)
PROMPTS = random_rows([[5, 8, 3]], seed=4)[0]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3"]
packs = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="torch has no packed products here")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Packed(TorchDispatchMode):
    """Counts the products of copies."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "linear_dynamic" in str(func)
        return func(*args, **(kwargs or {}))


def by_layers(compressor: Compressor) -> Compressor:
    """All of its passes run by a step that has the model's own weights."""
    body = compressor.body
    layers.install(body.layers)
    step = Step(compressor.model)
    body.register_forward_pre_hook(
        lambda m, args, kwargs: setattr(kwargs[PLAN], "step", step), with_kwargs=True
    )
    return compressor


def copied() -> Compressor:
    """A model that reads float16 copies, and has proved it."""
    compressor = tiny_compressor()
    compressor.model.ccm_decode_in = "float16"
    install(compressor.model)
    compressor.generate([PROMPTS[0]], max_new_tokens=3, do_sample=False)
    return compressor


def tensors(of: Compressor) -> list[Tensor]:
    """Of folds of all kinds, of a prompt with padding, and of queries that are looked at."""
    memory = Memory.stack([history(of, segments, sink=2, window=8) for segments in SEGMENTS])
    turns = [Turn(own, [8] * len(own)) for own in random_rows([[7, 9], [3], [12, 5]], seed=9)]
    ids, mask = pad(PROMPTS, "left")
    after = [memory, of.take_in(memory, turns, sink=2)]
    rows = [row for each in after for row in each.rows]
    found = [states for row in rows for part in (row.sink, row.slots, row.window) for states in part]
    watched = [queries for _, queries in of.watch(ids, memory, mask, newest=2)]
    return [*found, of.logits(ids, memory, mask)[mask.bool()], *watched]


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_give_what_those_of_the_model_give(family, targets, monkeypatch):
    right = tensors(tiny_compressor(family, target_modules=targets))
    ran, run = [], layers._run
    monkeypatch.setattr(layers, "_run", lambda *args: (ran.append(args[1]), run(*args))[1])
    found = tensors(by_layers(tiny_compressor(family, target_modules=targets)))
    assert {type(plan).__name__ for plan in ran} == {"RecurrentPlan", "OnwardPlan"}
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_the_adapter_of_another_pass_is_not_taken():
    """A negative control: two adapters on one model, each with its own deltas."""
    first = by_layers(tiny_compressor(target_modules="all"))
    second = Compressor(first.model, first.config)
    ours, theirs = (history(each, SEGMENTS[0]).rows[0].slots.values for each in (first, second))
    assert (ours - theirs).abs().max() > 0.1


@packs
def test_passes_read_copies_once_the_step_is_proved():
    compressor, plain = copied(), tiny_compressor()
    for x, y in zip(tensors(compressor), tensors(plain), strict=True):
        if x.numel():
            error = float((x - y).abs().max() / y.std())
            assert 0 < error < 0.05

    def packed(call: Any) -> int:
        with Packed() as found:
            call()
        return found.count

    decoder = compressor.model.__dict__["_ccm_decoder"]
    compressor.model.__dict__["_ccm_decoder"] = Decoder()  # as benchmarks do, to go back
    assert not packed(lambda: compressor.logits([PROMPTS[0]]))
    compressor.model.__dict__["_ccm_decoder"] = decoder
    memory = history(compressor, SEGMENTS[0])
    assert packed(lambda: compressor.compress([PROMPTS[0]], memory)) == 4 * 2 + 1  # none behind the last keys
    assert packed(lambda: compressor.logits([PROMPTS[0]], memory)) == 4 * 3
    assert not packed(lambda: compressor.model(torch.tensor([PROMPTS[0]])))  # a pass without a plan
    with torch.enable_grad():
        assert not packed(lambda: compressor(SEGMENTS[:1]).loss.backward())
    shown = compressor.live(memory).ahead(torch.ones(1, 5, dtype=torch.bool))[1]
    out = compressor.model(torch.tensor([PROMPTS[0]]), output_hidden_states=True, **shown)
    assert len(out.hidden_states) == 4


@packs
def test_a_copy_of_the_model_reads_its_own_weights():
    compressor = copied()
    right = compressor.logits([PROMPTS[0]])
    twin = copy.deepcopy(compressor)
    for parameter in twin.model.parameters():
        parameter.zero_()
    assert not twin.logits([PROMPTS[0]]).any()
    assert torch.equal(compressor.logits([PROMPTS[0]]), right)


@packs
@pytest.mark.parametrize(("decode_in", "dtype"), [("int8", torch.float32), ("float16", torch.bfloat16)])
def test_other_copies_and_types_are_left_to_decoding(decode_in, dtype):
    compressor = tiny_compressor()
    compressor.model.ccm_decode_in = decode_in
    compressor.model.to(dtype)
    compressor = Compressor(compressor.model, compressor.config)
    right = compressor.logits([PROMPTS[0]])
    install(compressor.model)
    compressor.generate([PROMPTS[0]], max_new_tokens=3, do_sample=False)
    assert torch.equal(compressor.logits([PROMPTS[0]]), right)
