"""The contender of ``ccm bench`` that runs kvpress (`make test-kvpress`)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tiny import saved_folder

from ccm.bench.contenders import Setting, named
from ccm.bench.sizes import ENTRIES
from ccm.bench.worker import Commands


@torch.inference_mode()
@pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress has an environment of its own")
def test_a_press_leaves_as_many_entries_as_a_memory_has(tmp_path):
    commands = Commands(named("kvpress")(Setting(saved_folder(tmp_path, max_position_embeddings=2048))))
    for tokens, kept in ((100, 100), (500, ENTRIES)):
        found = commands.take(tokens)
        assert found["kv_bytes"] == kept * 2 * 3 * 2 * 8 * 4 and found["read"] > 0
        assert commands.turn()["total"] > 0 and commands.contender.kv_bytes == found["kv_bytes"]
    assert commands.answer(2)["tokens_per_second"] > 0
    assert commands.about()["packages"].keys() == {"torch", "transformers", "kvpress"}
