"""The gate: ordinary tokens go through the base model bit for bit, only COMP tokens through the adapter."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import CASES, history, random_rows, scramble, tiny_compressor, tiny_model
from transformers import DynamicCache

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.rotary import unrotate
from ccm.errors import MismatchError

ROWS = random_rows([[6, 9, 5], [9, 4, 7]])
IDS = torch.tensor([ROWS[0][1], ROWS[1][0]])


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_closed_gate_is_the_base_model_bit_for_bit(family, backend, targets):
    untouched = tiny_model(family, backend)
    compressor = tiny_compressor(family, backend, target_modules=targets)
    model = compressor.model
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # left-padded
    with torch.no_grad():
        for call in ({}, {"attention_mask": mask}):
            assert torch.equal(model(IDS, **call).logits, untouched(IDS, **call).logits)
        compressor(ROWS)  # opens the gate for one pass ...
        compressor.compress(IDS)
        assert torch.equal(model(IDS).logits, untouched(IDS).logits)  # ... and leaves it closed
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(IDS, **options), untouched.generate(IDS, **options))
        assert torch.equal(compressor.logits(IDS), untouched(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_only_comp_tokens_get_the_lora(family):
    """Every projection, against W x + 1[x is COMP] (alpha / r) B A x written out by hand."""
    compressor = tiny_compressor(family, target_modules="all", rank=3, alpha=6.0)
    seen = {}
    for name, module in compressor.model.named_modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: (m, args[0], out)})
            )
    with torch.no_grad():
        layout = compressor(ROWS).layout
        is_comp = (layout.comp >= 0).unsqueeze(-1)
        assert 0 < is_comp.sum() < is_comp.numel() and len(seen) >= 8
        for layer, x, out in seen.values():
            base = layer.base_layer(x)
            delta = (
                2.0
                * x
                @ layer.lora_A[compressor.adapter].weight.T
                @ layer.lora_B[compressor.adapter].weight.T
            )
            torch.testing.assert_close(out, base + is_comp * delta, rtol=0, atol=1e-4)
            assert torch.equal(torch.where(is_comp, 0.0, out), torch.where(is_comp, 0.0, base))
            assert (is_comp * delta).abs().max() > 0.1


def test_two_adapters_on_one_model_do_not_disturb_each_other():
    first = tiny_compressor("mistral", rule="mean")
    before = history(first, ROWS[0])
    with torch.no_grad():
        logits = first(ROWS).logits
    config = CompressorConfig(slots=3, rule="concat", rank=4, target_modules="all", seed=7, window=8)
    second = scramble(Compressor(first.model, config), seed=8)
    alone = scramble(Compressor(tiny_model("mistral"), config), seed=8)
    with torch.no_grad():
        assert torch.equal(first(ROWS).logits, logits)
        assert torch.equal(second(ROWS).logits, alone(ROWS).logits)
    after = history(first, ROWS[0])
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.rows[0].slots.keys, before.rows[0].slots.keys)
    ours, theirs = history(second, ROWS[0]), history(alone, ROWS[0])
    assert torch.equal(ours.rows[0].slots.values, theirs.rows[0].slots.values)
    with pytest.raises(MismatchError, match="made by"):
        second.logits(IDS[:1], before)
    first(ROWS).loss.backward()
    assert all(p.grad is None for p in second.trainable_parameters())


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def saved(request, tmp_path_factory):
    """A compressor, and the folder where its adapter was saved without rounding."""
    compressor = tiny_compressor(request.param, rank=4)
    folder = tmp_path_factory.mktemp("adapter")
    compressor.save_pretrained(folder, dtype=torch.float32)
    return request.param, compressor, folder


def test_the_adapter_is_a_plain_peft_folder(saved):
    family, compressor, folder = saved
    peft = PeftModel.from_pretrained(tiny_model(family), folder)
    loaded = get_peft_model_state_dict(peft)
    ours = get_peft_model_state_dict(compressor.model, adapter_name=compressor.adapter)
    assert len(loaded) == len(ours) == len(compressor.lora_parameters)
    for name, weight in ours.items():
        assert torch.equal(loaded[f"base_model.model.{name}"], weight), name


def test_peft_itself_makes_the_same_slots(saved):
    """The outside reference: plain PEFT LoRA, off for the segments, on for the COMP tokens, over a plain cache."""
    family, compressor, folder = saved
    peft = PeftModel.from_pretrained(tiny_model(family), folder)
    base = peft.get_base_model()
    cache = DynamicCache()
    with torch.no_grad():
        with peft.disable_adapter():
            text = peft(IDS, past_key_values=cache).logits
        comp = compressor.comp_embeddings.expand(len(IDS), -1, -1)
        base.base_model(inputs_embeds=comp, past_key_values=cache)
    n, position = comp.shape[1], torch.arange(IDS.shape[1], IDS.shape[1] + comp.shape[1])
    cos, sin, _ = compressor.rotary.stacked(position)
    memory = compressor.compress(IDS)
    for r, row in enumerate(memory.rows):
        keys = torch.stack([unrotate(layer.keys[r, :, -n:], cos[0], sin[0]) for layer in cache.layers])
        values = torch.stack([layer.values[r, :, -n:] for layer in cache.layers])
        torch.testing.assert_close(row.slots.keys, keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(row.slots.values, values, rtol=0, atol=1e-5)
    torch.testing.assert_close(compressor.logits(IDS), text, rtol=0, atol=1e-5)
    untrained = Compressor(tiny_model(family), compressor.config).compress(IDS)
    assert (untrained.rows[0].slots.keys - memory.rows[0].slots.keys).abs().max() > 0.1  # the adapter matters


def test_saved_and_loaded_adapter_makes_the_same_memory(saved):
    family, compressor, folder = saved
    loaded = Compressor.from_pretrained(tiny_model(family), folder)
    assert loaded.config == compressor.config
    ours, theirs = compressor.compress(IDS), loaded.compress(IDS)
    assert ours.fingerprint == theirs.fingerprint
    assert torch.equal(ours.rows[1].slots.keys, theirs.rows[1].slots.keys)


def test_a_second_adapter_leaves_the_first_one_trainable():
    first = tiny_compressor("llama")
    second = Compressor(first.model, CompressorConfig(slots=2))
    for compressor in (first, second):
        compressor(ROWS).loss.backward()
        assert all(p.requires_grad for p in compressor.trainable_parameters())
        assert any(p.grad is not None and p.grad.any() for p in compressor.lora_parameters)
