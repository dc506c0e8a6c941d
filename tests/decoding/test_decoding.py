"""The step of decoding against the model's own forward pass, and what it costs in operations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from service_fixtures import tokenizer  # noqa: F401
from tiny import history, pad, random_rows, tiny_compressor, tiny_model, two_sided_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ccm
from ccm import cli, decoding
from ccm.core.batch import Batch
from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.core.room import ROOM, roomy_cache
from ccm.decoding import install
from ccm.decoding.shape import LayerShape
from ccm.errors import ConfigError, UnknownNameError
from ccm.methods.default import open_method
from ccm.models import placement
from ccm.models.placement import can_pack
from ccm.serving.engine.padded import run

SEGMENTS = random_rows([[6, 9, 4], [5], [8, 3]], seed=3)
PROMPTS = random_rows([[5, 8, 3]], seed=4)[0]
NEW = 12
#: Families whose step is found, and some that take the ordinary way.
STEPS = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3"]
ORDINARY = ["gemma2", "gpt_neox", "olmo2"]
packs = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="torch has no packed products here")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(family: str = "llama", decode_in: str = "model", **config: Any) -> Compressor:
    compressor = tiny_compressor(family, "eager" if family == "gemma2" else "sdpa", **config)
    compressor.model.ccm_decode_in = decode_in
    return compressor


def installed(compressor: Compressor) -> Compressor:
    install(compressor.model)
    return compressor


def has_step(compressor: Compressor) -> bool:
    (step,) = compressor.model.__dict__["_ccm_decoder"]._steps.values()
    return step is not None


def remembered(compressor: Compressor) -> list[Memory]:
    return [history(compressor, segments, sink=2, window=8) for segments in SEGMENTS]


@pytest.mark.parametrize("family", [*STEPS, *ORDINARY])
def test_answers_are_those_of_the_forward_pass(family):
    compressor = made(family)
    memories = remembered(compressor)
    ids, mask = pad(PROMPTS, "left")

    def answers() -> list[Any]:
        torch.manual_seed(7)
        drawn = compressor.generate([PROMPTS[0]], memories[0], max_new_tokens=NEW, do_sample=True, top_k=0)
        greedy = {"max_new_tokens": NEW, "do_sample": False}
        batch = compressor.generate(ids, Memory.stack(memories), mask, **greedy)
        beams = compressor.generate([PROMPTS[1]], memories[0], num_beams=3, **greedy)
        alone = compressor.generate([PROMPTS[1]], **greedy)
        return [drawn, batch, beams, alone]

    right = answers()
    installed(compressor)
    for found, expected in zip(answers(), right, strict=True):
        assert torch.equal(found, expected)
    assert has_step(compressor) == (family in STEPS)


@pytest.mark.parametrize("family", STEPS)
def test_the_engine_gets_the_same_logits(family):
    compressor = made(family)
    memory = Memory.stack(remembered(compressor))
    ids, mask = pad(PROMPTS, "left")

    def logits() -> Tensor:
        batch, last = run(compressor, compressor.live(memory), ids, mask.bool())
        found = []
        for token in range(5, 5 + NEW):  # past the sliding window
            batch, last = run(compressor, batch, torch.tensor([[token], [token + 1], [token + 2]]))
            found.append(last)
        return torch.stack(found)

    right = logits()
    found = (installed(compressor), logits())[1]
    assert has_step(compressor)
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@packs
@pytest.mark.parametrize("decode_in", ["float16", "int8"])
@pytest.mark.parametrize("family", STEPS)
def test_layers_of_the_usual_shape_are_one_call_and_give_the_same(family, decode_in):
    compressor = installed(made(family, decode_in))
    memory = Memory.stack(remembered(compressor))
    ids, mask = pad(PROMPTS, "left")

    def logits() -> Tensor:
        batch, last = run(compressor, compressor.live(memory), ids, mask.bool())
        found = []
        for token in range(5, 5 + NEW):
            batch, last = run(compressor, batch, torch.tensor([[token], [token + 1], [token + 2]]))
            found.append(last)
        return torch.stack(found)

    logits()  # behind the first token the step is proved, and the prompt reads copies as well
    found = logits()
    (step,) = compressor.model.__dict__["_ccm_decoder"]._steps.values()
    assert (step.script is not None) == (
        family in ("llama", "qwen2", "phi3")
    )  # others: more norms, or windows
    step.script = None
    torch.testing.assert_close(found, logits(), atol=1e-5, rtol=1e-5)


@packs
def test_rows_that_lie_in_wider_tensors_are_found_there():
    compressor = installed(made(decode_in="float16"))

    def logits() -> Tensor:
        batch = Batch(run(compressor, compressor.live(remembered(compressor)[0]), torch.full((1, 9), 5))[0])
        for _ in range(2):
            batch.join(run(compressor, compressor.live(remembered(compressor)[1]), torch.full((1, 3), 6))[0])
        batch.leave([0])  # the longest: its first columns are no one's
        found = []
        for token in range(5, 5 + NEW):
            batch.reserve(1)
            batch.live, last = run(compressor, batch.live, torch.tensor([[token], [token + 1]]))
            found.append(last)
        values = batch.live.cache.layers[0].values
        assert values.storage_offset() and values.stride(0) > values[0].numel()
        return torch.stack(found)

    logits()
    found = logits()
    (step,) = compressor.model.__dict__["_ccm_decoder"]._steps.values()
    step.script = None
    torch.testing.assert_close(found, logits(), atol=1e-4, rtol=1e-4)


def test_keys_and_values_of_an_answer_are_the_same():
    compressor = made()
    memory = remembered(compressor)[0]
    right, read = compressor.write(PROMPTS[0], memory, max_new_tokens=NEW, do_sample=False)
    found, known = installed(compressor).write(PROMPTS[0], memory, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, right)
    torch.testing.assert_close(known.keys, read.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(known.values, read.values, atol=1e-4, rtol=1e-4)


@packs
@pytest.mark.parametrize("decode_in", ["float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_round_the_weights_and_little_else(decode_in, dtype):
    compressor = made(decode_in=decode_in)
    compressor.model.to(dtype)
    reader = ccm.core.reader.Reader(compressor.model)
    memory = reader.empty(2)

    def logits() -> Tensor:
        batch, _ = run(reader, reader.live(memory), torch.tensor([[5, 6, 7], [7, 8, 9]]))
        return run(reader, batch, torch.tensor([[3], [4]]))[1].float()

    right = logits()
    installed(compressor)
    error = float((logits() - right).abs().max() / right.std())
    assert has_step(compressor)
    most = {"float16": 0.01 if dtype == torch.float32 else 0.1, "int8": 0.5}[decode_in]
    assert (1e-6 if decode_in == "float16" else 1e-3) < error < most


def test_a_step_that_says_something_else_is_not_taken(monkeypatch, caplog):
    """A negative control: one number of a model's shape is read wrongly."""
    compressor = made()
    memory = remembered(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    of = LayerShape.of

    def wrong(layer: Any) -> LayerShape:
        shape = of(layer)
        object.__setattr__(shape, "scale", shape.scale * 1.1)
        return shape

    monkeypatch.setattr(LayerShape, "of", wrong)
    with caplog.at_level(logging.INFO):
        found = installed(compressor).generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, right) and not has_step(compressor)
    assert "misses its logits" in caplog.text


@pytest.mark.parametrize(("missed", "tried", "taken"), [(2, 3, True), (99, 4, False)])
def test_a_miss_is_tried_again_and_no_step_is_taken_before_it_is_proved(
    monkeypatch, caplog, missed, tried, taken
):
    """At the first, second, fourth and eighth token."""
    compressor = made()
    memory = remembered(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    installed(compressor)
    errors: list[float] = []
    own = decoding.misses

    def misses(found: Tensor, expected: Tensor) -> float:
        errors.append(own(found, expected))
        return errors[-1] if len(errors) > missed else 0.5

    monkeypatch.setattr(decoding, "PASSES", 8)
    monkeypatch.setattr(decoding, "_tried", lambda model: 0.0)
    monkeypatch.setattr(decoding, "misses", misses)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(found, right)
    assert len(errors) == tried and max(errors) < 1e-3
    assert has_step(compressor) == taken
    assert caplog.text.count("misses its logits") == (not taken)


def test_weights_that_a_copy_cannot_hold_are_not_copied(caplog):
    compressor = made(decode_in="float16")
    weight = compressor.model.model.layers[0].mlp.down_proj
    weight = getattr(weight, "base_layer", weight).weight
    weight[0, :] = 1e6  # float16 ends at 65504
    memory = remembered(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    found = installed(compressor).generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, right)
    if can_pack(torch.device("cpu")):
        assert not has_step(compressor)
        assert "too large for float16" in caplog.text  # a warning: it was asked for


class Operations(TorchDispatchMode):
    """How often each operation runs, and the bytes that copies make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copied = 0
        self.asked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func).removesuffix(".default"))
        if "linear_dynamic" in str(func):
            self.asked |= torch._C._is_torch_function_enabled()
        if any(name in str(func) for name in ("aten.cat", "aten.copy_", "aten.clone", "index_select")):
            self.copied += out.nbytes
        return out


def counted(compressor: Compressor, held: int) -> Operations:
    """One step of the engine over so many entries."""
    batch, _ = run(compressor, compressor.live(compressor.empty()), torch.full((1, held), 5))
    for _ in range(2):  # there is room, and the step is proved
        batch, _ = run(compressor, batch, torch.tensor([[6]]))
    with Operations() as found:
        run(compressor, batch, torch.tensor([[6]]))
    return found


@pytest.mark.parametrize(("decode_in", "most"), [("model", 177), pytest.param("float16", 161, marks=packs)])
def test_a_token_costs_few_operations_and_copies_no_cache(decode_in, most):
    ordinary = counted(made(), 40)
    short, long = (counted(installed(made(decode_in=decode_in)), held) for held in (40, 160))
    assert len(short.names) == len(long.names) <= most < len(ordinary.names)
    # what grows with the memory are positions and masks of the row, no layer's keys (2 heads of 8 floats an entry)
    assert long.copied - short.copied < 120 * 2 * 8 * 4


@packs
def test_packed_weights_are_not_asked_for_overrides():
    """Each of these questions is an exception thrown and caught in C++, and costs as much as a small product."""
    found = counted(installed(made(decode_in="float16")), 40)
    assert sum("linear_dynamic" in name for name in found.names) == 13  # 4 in a layer, and the head
    assert not found.asked and torch._C._is_torch_function_enabled()


def test_norms_that_differ_are_not_taken_for_the_same():
    compressor = made()
    compressor.model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    memory = remembered(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    found = installed(compressor).generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, right) and not has_step(compressor)


def test_the_ordinary_way_copies_no_cache_either():
    short, long = (counted(made("gpt_neox"), held) for held in (40, 160))
    assert long.copied - short.copied < 120 * 2 * 4 * 8 * 4  # less than one layer's cache


def test_room_is_used_up_and_made_again():
    layer = roomy_cache()
    whole = torch.randn(2, 3, 4 * ROOM, 5)
    for at in range(0, 2 * ROOM + 9):
        keys, values = layer.update(whole[:, :, at : at + 1], -whole[:, :, at : at + 1], 0)
        assert torch.equal(keys, whole[:, :, : at + 1]) and torch.equal(values, -keys)
    before = keys
    layer.layers[0].reorder_cache(torch.tensor([1, 1]))  # as beams do
    keys, _ = layer.update(whole[:, :, :2], whole[:, :, :2], 0)
    assert torch.equal(keys[:, :, :-2], whole[[1, 1], :, : at + 1])
    assert torch.equal(before, whole[:, :, : at + 1])  # what was handed out stays
    layer.layers[0].back(2)
    assert layer.get_seq_length() == at + 1
    with torch.inference_mode():
        layer.update(whole[:, :, :70], whole[:, :, :70], 0)
    keys, _ = layer.update(
        whole[:, :, :1], whole[:, :, :1], 0
    )  # tensors of inference_mode cannot be written to
    assert keys.shape[2] == at + 72


def test_room_is_not_taken_where_gradients_flow():
    cache = roomy_cache()
    x = torch.randn(1, 1, 2, 4, requires_grad=True)
    with torch.enable_grad():
        cache.update(x, x, 0)
        keys, _ = cache.update(x * 2, x, 0)
        keys.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


def test_a_copy_of_the_model_has_a_step_of_its_own():
    compressor = installed(made())
    memory = remembered(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    twin = copy.deepcopy(compressor)
    for parameter in twin.model.parameters():
        parameter.zero_()
    assert torch.equal(compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False), right)
    assert not twin.logits([[5, 6]]).any()
    batch, _ = run(twin, twin.live(twin.empty()), torch.tensor([[5, 6]]))
    assert not run(twin, batch, torch.tensor([[6]]))[1].any()


def test_an_adapter_for_all_tokens_is_not_left_out():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    reader = ccm.core.reader.Reader(model)
    right = reader.generate([PROMPTS[0]], max_new_tokens=NEW, do_sample=False)
    install(model)
    assert torch.equal(reader.generate([PROMPTS[0]], max_new_tokens=NEW, do_sample=False), right)
    (step,) = model.__dict__["_ccm_decoder"]._steps.values()
    assert step is None


def test_training_and_other_passes_are_as_before():
    compressor = installed(made())
    with torch.enable_grad():
        out = compressor(SEGMENTS[:1])
        out.loss.backward()
    assert any(bool(p.grad.abs().sum()) for p in compressor.lora_parameters)
    plain = compressor.model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)
    assert len(plain.hidden_states) == 4


def test_methods_bring_it_and_encoder_decoders_are_left_alone(tokenizer):  # noqa: F811
    model = tiny_model()
    open_method("streaming-llm:window=16", model, tokenizer)
    assert "_ccm_decoder" in model.__dict__
    other = two_sided_model()
    install(other)
    assert "forward" not in other.__dict__


def test_options_are_checked(capsys, monkeypatch):
    with pytest.raises(UnknownNameError, match="int7"):
        ccm.load_model("default", decode_in="int7")
    monkeypatch.setattr(placement, "can_pack", lambda device: False)
    with pytest.raises(ConfigError, match="x86"):
        placement.place(None, "float32", "cpu", decode_in="int8")
    assert cli.main(["chat", "--decode-in", "int7"]) == 2
    assert "int7" in capsys.readouterr().err
