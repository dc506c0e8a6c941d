"""Quantized weights: the same contract over them as over plain ones (``make test-quant``)."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from tiny import pad, random_rows, saved_folder, scramble

import ccm
from ccm import cli
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import MismatchError
from ccm.models import placement
from ccm.planning.plan import Load, plan

QUANTIZED = [
    pytest.param(
        load_in, marks=pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")
    )
    for load_in, package in placement.LOAD_IN.items()
]


def held(model: Any) -> int:
    """Bytes of the weights; those of torchao say that they are floats."""
    total = 0
    for name, weight in model.named_parameters():
        parts = [weight]
        if hasattr(weight, "__tensor_flatten__"):
            parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]]
        if (state := getattr(weight, "quant_state", None)) is not None:
            parts += [state.absmax]
        total += 0 if "lora_" in name else sum(part.nbytes for part in parts)
    return total


@pytest.mark.parametrize("load_in", QUANTIZED)
def test_a_quantized_model_folds_trains_and_is_another_model(tmp_path, load_in):
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    folder = saved_folder(tmp_path / "model", **wide)
    rows = random_rows([[7, 5, 6], [9, 4, 8]])

    def used(model):
        compressor = scramble(Compressor(model, CompressorConfig(slots=2)))
        memory = None
        for segment in zip(*(row[:-1] for row in rows), strict=True):
            ids, mask = pad(segment)
            memory = compressor.compress(ids, memory, mask, sink=2, window=6)
        ids, mask = pad([row[-1] for row in rows])
        recurrent = compressor.logits(ids, memory, mask)
        out = compressor(rows, sink=2, window=6)
        for r, row in enumerate(rows):
            torch.testing.assert_close(
                recurrent[r, : len(row[-1])], out.segment_logits(r, 2), atol=1e-4, rtol=1e-4
            )
        out.loss.backward()
        return compressor, memory, recurrent

    plain, known, right = used(ccm.load_model(folder)[0])
    compressor, memory, found = used(ccm.load_model(folder, load_in=load_in)[0])
    # as many gradients as in the plain model: also after passes without any
    for mine, other in zip(compressor.trainable_parameters(), plain.trainable_parameters(), strict=True):
        assert bool(mine.grad.abs().sum()) == bool(other.grad.abs().sum())
    assert held(compressor.model) < 0.6 * held(plain.model)
    assert compressor.kv_bytes_per_token() == plain.kv_bytes_per_token()
    both = torch.stack([found.flatten(), right.flatten()])
    assert 0.5 < float(torch.corrcoef(both)[0, 1]) < 0.99999
    with pytest.raises(MismatchError):
        plain.logits([[5]], memory[0])
    with pytest.raises(MismatchError):
        compressor.logits([[5]], known[0])
    compressor.save_pretrained(tmp_path / "adapter", dtype=torch.float32)
    again = Compressor.from_pretrained(ccm.load_model(folder, load_in=load_in)[0], tmp_path / "adapter")
    ids, mask = pad([row[-1] for row in rows])
    assert torch.equal(again.logits(ids, memory, mask), found)
    made = plan(Load(1, 4, 8), model=folder, load_in=load_in, measured=False)
    assert made["weight_bytes"] == pytest.approx(
        held(ccm.load_model(folder, load_in=load_in)[0]), rel=0.05
    )  # scales beside them


@pytest.mark.parametrize("load_in", QUANTIZED)
def test_a_quantized_model_is_trained_by_a_recipe(tmp_path, load_in):
    folder = saved_folder(tmp_path / "model", max_position_embeddings=1024)
    talks = [
        {
            "messages": [
                {"role": "user" if i % 2 == 0 else "assistant", "content": f"{n} {i}"} for i in range(8)
            ]
        }
        for n in range(60)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    recipe = {
        "model": folder,
        "compressor": {"slots": 1, "rank": 2},
        "data": {"jsonl": {"path": str(tmp_path / "talks.jsonl"), "turns": [4, 6]}},
        "steps": 2,
        "eval_rows": 2,
        "eval_every": 1,
        "bf16": False,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--load-in", load_in]
    assert cli.main(command) == 0
    model, _ = ccm.load_model(folder, load_in=load_in)
    trained = Compressor.from_pretrained(model, tmp_path / "run" / "adapter")
    assert any(bool(weight.abs().sum()) for weight in trained.lora_parameters[1::2])  # B begins at 0
