"""The contract in every family, on tiny models with the traits of real configurations."""

from __future__ import annotations

import logging
from functools import lru_cache

import pytest
import torch
from family_models import FAMILIES, REFUSED, family_config, family_model, known
from test_contract import BROKEN, ROWS, distance, parallel, recurrent
from tiny import history, scramble, tiny_model

from ccm.core import attention, families, hooks, rotary, trial, twin
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.head import run_head
from ccm.errors import ConfigError, UnsupportedModelError
from ccm.models.load import random_model

TOLERANCE = 1e-4  # in standard deviations of the logits
IDS = torch.tensor([ROWS[0][4], ROWS[3][0][:8]])

here = [name for name in FAMILIES if known(name)]
refused = [name for name in REFUSED if known(name)]


@lru_cache(maxsize=1)  # tests of a family are neighbours
def compressor_for(family: str) -> Compressor:
    return scramble(Compressor(family_model(family), CompressorConfig(slots=2)))


def plain(compressor: Compressor, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return compressor.model(torch.tensor([tokens])).logits[0]


@pytest.fixture(params=here, scope="module")
def family(request) -> str:
    return request.param


def test_the_list_is_what_is_tested():
    assert set(FAMILIES) == families.TESTED and len(here) >= 35
    assert not families.TESTED & families.REFUSED.keys()


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (2, 12)])
def test_parallel_equals_recurrent(family, sink, window, record_property):
    compressor = compressor_for(family)
    expected, got = recurrent(compressor, sink, window), parallel(compressor, sink, window)
    scale = expected[0][0].std().item()
    record_property("error", distance(expected, got) / scale)
    assert distance(expected, got) < TOLERANCE * scale
    for segment, logits in zip(ROWS[0][1:], expected[0][1:], strict=True):
        assert (logits - compressor.logits([segment])[0]).abs().max() > 0.01 * scale  # the memory matters


def test_a_raw_window_is_the_plain_model(family):
    """Segments over raw tokens, and the same tokens one after the other."""
    compressor = compressor_for(family)
    expected = plain(compressor, [token for segment in ROWS[0] for token in segment])
    got = torch.cat(recurrent(compressor, 0, 64)[0])
    assert (expected - got).abs().max() < TOLERANCE * expected.std()


def test_a_closed_gate_is_the_base_model_bit_for_bit(family):
    compressor = compressor_for(family)
    model, untouched = compressor.model, family_model(family, compressor.family.backends[0])
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # left-padded
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        compressor(ROWS[:1])  # opens the gate for one pass, and leaves it closed
        for call in ({}, {"attention_mask": mask}):
            assert torch.equal(model(IDS, **call).logits, untouched(IDS, **call).logits)
        assert torch.equal(model.generate(IDS, **options), untouched.generate(IDS, **options))


def test_generate_reads_the_memory_as_logits_do(family):
    compressor = compressor_for(family)
    memory = history(compressor, ROWS[0][:3], sink=2)
    ids = compressor.generate([ROWS[0][3]], memory, max_new_tokens=4, do_sample=False)[0]
    logits = compressor.logits(ids[None, :-1], memory)[0]
    assert torch.equal(logits.argmax(-1)[len(ROWS[0][3]) - 1 :], ids[len(ROWS[0][3]) :])


def test_a_plain_causal_mask_breaks_it(family, monkeypatch):
    compressor = compressor_for(family)
    expected = recurrent(compressor, 0, 0)

    def causal(layout, rule):
        batch, width = layout.segment.shape
        states = rule.placed(*layout.comp_index.shape[1:]).place.numel()
        text = torch.ones(batch, 1, width, width, dtype=torch.bool).tril()
        return torch.cat([text.new_zeros(batch, 1, width, states), text], dim=-1)

    monkeypatch.setattr(attention, "parallel_mask", causal)
    assert distance(expected, parallel(compressor, 0, 0)) > BROKEN * expected[0][0].std()


# ---------------------------------------------------------------------- what is found on a model


@pytest.mark.parametrize(
    ("name", "way", "unrotated"),
    [
        ("llama", ("halves", "first"), []),
        ("glm", ("interleaved", "first"), []),
        ("cohere2", ("interleaved", "even"), [3]),
        ("smollm3", ("halves", "first"), [3]),
        ("gpt_oss", ("halves", "whole"), []),
    ],
)
def test_how_keys_turn_is_measured(name, way, unrotated):
    found = families.get_family(random_model(family_config(name), "meta"))  # no weights are needed
    assert found.way == way
    assert [layer for layer, turns in enumerate(found.rotated) if not turns] == unrotated


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "mixtral"])
def test_the_head_scales_and_caps_as_the_model_does(name):
    model = family_model(name)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        logits = model(IDS).logits
        assert torch.equal(run_head(model, hidden), logits)
        torch.testing.assert_close(run_head(model, hidden[0, 1:3]), logits[0, 1:3], rtol=0, atol=1e-5)
        bare = model.get_output_embeddings()(hidden)
    assert torch.equal(bare, logits) == (name == "mixtral")


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_only_the_decoder_of_a_model_that_sees_gets_an_adapter(name):
    compressor = compressor_for(name)
    adapted = [n for n, _ in compressor.model.named_parameters() if "lora_" in n]
    assert adapted and all(name.startswith("model.language_model.layers.") for name in adapted)
    assert compressor.family.body == "model.language_model"


def test_gradients_reach_the_adapter_of_layers_that_drop_the_plan():
    """Also when they run again behind a checkpoint, as in training with little memory."""
    grads = []
    for checkpoint in (False, True):
        compressor = scramble(Compressor(family_model("stablelm"), CompressorConfig(slots=2)))
        assert not compressor.family.hands_on
        if checkpoint:
            compressor.model.gradient_checkpointing_enable({"use_reentrant": False})
            compressor.model.train()
        compressor(ROWS[:2]).loss.backward()
        grads.append([p.grad for p in compressor.trainable_parameters()])
    # queries and outputs of COMP tokens in the last layer serve nobody
    assert sum(bool(grad.any()) for grad in grads[0]) == len(grads[0]) - 4
    for plainly, again in zip(*grads, strict=True):
        torch.testing.assert_close(plainly, again, rtol=1e-3, atol=1e-5)


def test_all_projections_of_experts_are_refused():
    config = CompressorConfig(target_modules="all")
    with pytest.raises(ConfigError, match="got 'all', expected 'attention'"):
        Compressor(family_model("mixtral"), config)
    with pytest.raises(ConfigError, match="lm_head is in no layer"):
        Compressor(tiny_model(), CompressorConfig(target_modules=("q_proj", "lm_head")))


def test_positions_at_which_queries_grow_are_out_of_reach():
    """Ministral 3 makes queries longer from a position on; behind it, text cannot be moved."""
    compressor = compressor_for("ministral3")
    assert compressor.context == 128 < compressor.model.config.max_position_embeddings
    with pytest.raises(ConfigError, match="129 positions are more than the model's context of 128"):
        compressor.logits([[5] * 129])


# ---------------------------------------------------------------------- what is refused, and what is tried


@pytest.mark.parametrize("name", refused)
def test_refused_with_what_was_measured(name):
    model = family_model(name)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is not supported: .*{REFUSED[name][1]}"):
            Compressor(model)
    assert not hasattr(model, "peft_config")  # nothing was injected


@pytest.fixture
def untested(monkeypatch):
    """Nobody has tested any family, and none was met before."""
    monkeypatch.setattr(families, "TESTED", frozenset())
    monkeypatch.setattr(families, "_found", {})


@pytest.mark.parametrize("name", ["llama", "cohere2", "gemma3", "stablelm", "gpt_oss"])
def test_a_family_that_nobody_tested_is_tried_once_and_says_so(name, untested, caplog):
    models = [family_model(name, seed=seed) for seed in (0, 1)]
    for model in models:
        Compressor(model)
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and f"model family '{name}' is not one of those that are tested" in said[0].message


def test_a_tested_family_is_not_tried(caplog, monkeypatch):
    monkeypatch.setattr(families, "_found", {})
    monkeypatch.setattr(trial, "measure", None)
    Compressor(family_model("cohere2"))
    assert not caplog.records


def test_pairs_that_nobody_knows_are_refused(untested, monkeypatch):
    monkeypatch.setattr(families, "WAYS", [way for way in rotary.WAYS if way.pairs == "halves"])
    with pytest.raises(UnsupportedModelError, match=r"in layer \d they are off by \d\.\d+ of their size"):
        Compressor(family_model("glm"))


@pytest.mark.parametrize(
    ("name", "break_it", "reason"),
    [
        (
            "glm",
            ("ccm.core.families", "_rotation", lambda *args: (rotary.Way(), (True,) * 3)),
            "sink and a window",
        ),
        (
            "smollm3",
            ("ccm.core.families", "_rotation", lambda *args: (rotary.Way(), (True,) * 4)),
            "sink and a wind",
        ),
        (
            "granite",
            ("ccm.core.compressor", "run_head", lambda model, hidden: model.lm_head(hidden)),
            "one parallel pass and the recursion: ",
        ),
        ("mistral", ("ccm.core.trial", "MATTERS", 1e6), "its memory does not matter"),
    ],
)
def test_a_trial_that_fails_is_a_refusal(name, break_it, reason, untested, monkeypatch):
    """Each fault that was seen is found by the trial alone, were it not measured before."""
    module, attribute, value = break_it
    monkeypatch.setattr(f"{module}.{attribute}", value)
    with pytest.raises(UnsupportedModelError, match=reason):
        Compressor(family_model(name))


def test_a_plan_that_is_lost_is_a_refusal(untested, monkeypatch):
    monkeypatch.setattr(hooks, "bridge", lambda model, names: None)
    with pytest.raises(
        UnsupportedModelError, match="'stablelm' is not supported: a small model of its config fails"
    ):
        Compressor(family_model("stablelm"))


def test_a_small_model_keeps_what_makes_the_family_different():
    config = family_config("gemma3_text")
    config.update({"hidden_size": 512, "vocab_size": 5000, "num_attention_heads": 16, "sliding_window": 4096})
    small = twin.shrunk(config, 6)
    assert small.layer_types == config.layer_types and small.rope_parameters == config.rope_parameters
    assert (small.head_dim, small.query_pre_attn_scalar) == (8, 12)
    assert (small.hidden_size, small.vocab_size, small.sliding_window) == (16, twin.VOCAB, twin.WINDOW)
    assert config.hidden_size == 512  # the model's own config stays


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"Linear is not a model of transformers: give the one that"
    ):
        families.get_family(torch.nn.Linear(2, 2))
