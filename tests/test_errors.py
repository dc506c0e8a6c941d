"""Bad input: one clear error that says what was got and what was expected, and nothing is changed by it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from tiny import history, random_rows, tiny_compressor, tiny_model

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import Memory
from ccm.core.rule import get_rule
from ccm.errors import CCMError, ConfigError, MismatchError, UnknownNameError, UnsupportedModelError


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return tiny_compressor(model={"max_position_embeddings": 64})


SMALL = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (hf.GPT2Config(**SMALL), "'gpt2' is not supported: learned absolute positions"),
        (
            hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
            "'bloom' is not supported: ALiBi",
        ),
    ],
)
def test_unsupported_families_say_why(config, why):
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=why) as caught:
        Compressor(model)
    assert "docs/families.md" in str(caught.value)
    assert not hasattr(model, "peft_config")  # nothing was injected


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_length_are_refused(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' is not supported"):
        Compressor(tiny_model(rope_parameters=rope))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots: got 0, expected a whole number >= 1"),
        ({"slots": 2.5}, "slots: got 2.5"),
        ({"rank": 0}, "rank: got 0"),
        ({"sink": -1}, "sink: got -1"),
        ({"window": -4}, "window: got -4"),
        ({"rule": "sum"}, "unknown rule 'sum': expected one of bounded, concat"),
        ({"rule": "ema", "rule_options": {"weight": 1.5}}, "weight 1.5 is not in"),
        ({"rule": "ema", "rule_options": {"wait": 0.5}}, "rule ema: .*wait"),
        ({"rule": "bounded", "rule_options": {"blocks": 1}}, "got blocks=1, expected at least 2"),
        (
            {"rule": "bounded", "rule_options": {"overflow": "spill"}},
            "unknown overflow 'spill': .*drop, merge",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        CompressorConfig(**settings)


@pytest.mark.parametrize("targets", ["everything", ("no_such_proj",)])
def test_bad_target_modules(targets):
    with pytest.raises(ConfigError, match="target_modules"):
        Compressor(tiny_model(), CompressorConfig(target_modules=targets))


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="unknown rule 'max'"):
        get_rule("max")
    with pytest.raises(ConfigError, match="no adapter 'no-such-adapter': not a folder here"):
        Compressor.from_pretrained(tiny_model(), "no-such-adapter")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c(segments=[]), "got 0 rows"),
        (lambda c: c(segments=[[[1, 2]], []]), "got 2 rows, one without a segment"),
        (lambda c: c(segments=[[[1, 2], [], [3]]]), "row 0, segment 1 is empty"),
        (lambda c: c(segments=[[[1] * 40, [2] * 70]]), "more than the model's context of 64"),
        (lambda c: c.compress([[]]), r"got shape \(1, 0\) of"),
        (lambda c: c.compress(torch.tensor([1, 2])), r"got shape \(2,\) of"),
        (lambda c: c.compress([[1] * 65]), "65 positions are more than the model's context of 64"),
        (
            lambda c: c.logits(torch.ones(2, 3).long(), attention_mask=torch.ones(2, 2)),
            "attention_mask: shape",
        ),
        (lambda c: c.logits([[1, 2], [3, 4]], attention_mask=torch.tensor([[1, 1], [0, 0]])), "an empty row"),
        (lambda c: c.compress([[1, 2]], slots=3), "slots: got 3, expected '?1'? to 2"),
        (lambda c: c.compress([[1, 2]], slots=0), "slots: got 0"),
        (lambda c: c.compress([[1, 2]], window=-1), "window: got -1"),
        (lambda c: c(segments=[[[1, 2], [3]]], sink=-1), "sink: got -1"),
        (lambda c: c.generate([[1, 2]], max_new_tokens=63), "65 positions"),
        (
            lambda c: c.generate([[1, 2]], generation_config=hf.GenerationConfig(max_new_tokens=63)),
            "65 positions",
        ),
        (lambda c: c.generate([[1, 2]], use_cache=False), "use_cache: got False"),
        (lambda c: c.compress([[1, 2], [3]]), "input_ids: .*pad rows to one length"),
        (lambda c: c.compress(torch.ones(1, 3)), "torch.float32, expected .* integers"),
    ],
)
def test_bad_input(compressor, call, message):
    expected = compressor.logits([[5, 6, 7]])
    with pytest.raises(ConfigError, match=message):
        call(compressor)
    assert torch.equal(compressor.logits([[5, 6, 7]]), expected)  # still usable


def test_a_model_in_training_that_keeps_no_cache_reads_no_memory():
    """Its layers would leave the memory out, some with logits that look like an answer."""
    compressor = tiny_compressor()
    memory = compressor.compress([[5, 6, 7]])
    compressor.model.gradient_checkpointing_enable()
    compressor.model.train()
    for call in (compressor.logits, compressor.compress, compressor.generate):
        with pytest.raises(ConfigError, match=r"call model.eval\(\) first"):
            call([[5, 6]], memory)
    compressor.model.eval()
    compressor.logits([[5, 6]], memory)


def test_memory_and_text_together_may_be_too_long(compressor):
    memory = history(compressor, random_rows([[5] * 20])[0])  # 40 slots
    compressor.logits([[1] * 24], memory)
    with pytest.raises(ConfigError, match="65 positions are more than the model's context of 64"):
        compressor.logits([[1] * 25], memory)


@pytest.fixture
def folder(compressor, tmp_path):
    compressor.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "other", [("qwen2", {}), ("llama", {"num_hidden_layers": 2}), ("llama", {"hidden_size": 64})]
)
def test_an_adapter_of_another_model_is_refused(folder, other):
    family, changes = other
    model = tiny_model(family, **changes)
    with pytest.raises(MismatchError, match="adapter"):
        Compressor.from_pretrained(model, folder)
    assert not hasattr(model, "peft_config")


def test_an_adapter_of_other_weights_warns(folder, caplog):
    Compressor.from_pretrained(tiny_model(seed=1), folder)
    assert "trained on other weights" in caplog.text


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "comp_embeddings.safetensors", "ccm_config.json"]
)
def test_a_damaged_adapter_is_refused(folder, file):
    path = folder / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="incomplete or damaged"):
        Compressor.from_pretrained(tiny_model(), folder)
    if file != "ccm_config.json":
        path.unlink()
        with pytest.raises(ConfigError, match="incomplete or damaged"):
            Compressor.from_pretrained(tiny_model(), folder)


def test_an_adapter_with_unknown_or_missing_settings_is_refused(folder):
    path = folder / "ccm_config.json"
    good = json.loads(path.read_text())
    damaged = [{**good, "rule": "?"}, {"base_model": good["base_model"]}, [1]]
    for bad in (*damaged, {k: v for k, v in good.items() if k != "base_model"}):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match="incomplete or damaged"):
            Compressor.from_pretrained(tiny_model(), folder)


def test_settings_of_the_past_are_accepted_at_the_value_that_is_left(folder):
    path = folder / "ccm_config.json"
    good = json.loads(path.read_text())
    assert not {"comp_positions", "conditional"} & good.keys()
    expected = Compressor.from_pretrained(tiny_model(), folder).fingerprint()
    path.write_text(json.dumps({**good, "comp_positions": "after", "conditional": True}))
    assert Compressor.from_pretrained(tiny_model(), folder).fingerprint() == expected
    for name, value in (("comp_positions", "slot"), ("conditional", False)):
        path.write_text(json.dumps({**good, name: value}))
        with pytest.raises(
            MismatchError, match=f"{name} is {value!r}, only .* is left; train the adapter anew"
        ):
            Compressor.from_pretrained(tiny_model(), folder)
    path.write_text(json.dumps({**good, "from_the_future": 1}))
    with pytest.raises(MismatchError, match="written by a newer ccm: it sets 'from_the_future'"):
        Compressor.from_pretrained(tiny_model(), folder)


def test_what_may_be_changed_of_a_trained_adapter(folder):
    fewer = Compressor.from_pretrained(tiny_model(), folder, slots=1, window=8, sink=1, rule="mean")
    assert history(fewer, random_rows([[5, 6]])[0]).slots == 1
    with pytest.raises(
        UnknownNameError, match=r"'windw' .did you mean window.*: expected one of rule, rule_options"
    ):
        Compressor.from_pretrained(tiny_model(), folder, windw=3)
    with pytest.raises(UnknownNameError, match="'rank'"):
        Compressor.from_pretrained(tiny_model(), folder, rank=2)
    with pytest.raises(ConfigError, match="has 2 slots per segment, got slots=3"):
        Compressor.from_pretrained(tiny_model(), folder, slots=3)


def test_another_rule_leaves_the_options_of_the_first_behind(tmp_path):
    config = CompressorConfig(slots=2, rule="bounded", rule_options={"blocks": 3})
    Compressor(tiny_model(), config).save_pretrained(tmp_path)
    for changes, options in (
        ({}, {"blocks": 3}),
        ({"rule": "bounded"}, {"blocks": 3}),
        ({"rule": "concat"}, {}),
        ({"rule": "ema", "rule_options": {"weight": 0.2}}, {"weight": 0.2}),
    ):
        assert Compressor.from_pretrained(tiny_model(), tmp_path, **changes).config.rule_options == options


def test_an_empty_stack():
    with pytest.raises(CCMError):
        Memory.stack([])
