"""The contenders of ``ccm bench`` that run in llama.cpp."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPE
from engine_contract import CONTEXT
from tiny import saved_folder

from ccm.bench.contenders import Setting, named
from ccm.bench.contenders.memories import InMemory
from ccm.bench.worker import Commands

pytestmark = pytest.mark.usefixtures("runs")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["ccm in llama.cpp", "llama.cpp"])
def test_a_turn_goes_back_to_where_it_began(name, gguf, tmp_path, monkeypatch):
    monkeypatch.setattr("ccm.bench.worker.PREFILL", 100)
    monkeypatch.setattr("ccm.bench.worker.FOLD", 40)
    monkeypatch.setattr(InMemory, "memory", "streaming-llm:window=32,sink=4")
    folder = saved_folder(tmp_path / "model", max_position_embeddings=CONTEXT, **SHAPE)
    commands = Commands(named(name)(Setting(folder, str(gguf))))
    for tokens in (60, 100):
        before = commands.take(tokens)["kv_bytes"]
        for _ in range(2):
            turn = commands.turn()
            assert 0 < turn["first"] <= turn["total"] and commands.contender.kv_bytes == before
    assert commands.prefill()["prefill"] > 0 and commands.answer(2)["tokens_per_second"] > 0
    if commands.about()["folds"]:
        assert before == 36 * 2 * 3 * 2 * 32 * 2  # entries, K and V, layers, heads, size, bytes
        assert commands.fold()["fold"] > 0 and commands.restore()["restore"] > 0
    else:
        assert before > 100 * 2 * 3 * 2 * 32 * 2
