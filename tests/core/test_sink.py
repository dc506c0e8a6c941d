"""First raw tokens that stay: the default of new compressors, what saved ones mean, a word where there are none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny import history, random_rows, scramble, tiny_compressor, tiny_model, tiny_tokenizer

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import ConfigError
from ccm.files.adapter_folder import read_config, shipped_adapters
from ccm.methods.baselines import BASELINES
from ccm.session import Session

ROWS = random_rows([[2, 9, 5, 6], [7, 3, 1, 4]])


def test_new_compressors_have_a_sink_and_baselines_none():
    assert CompressorConfig().sink == CompressorConfig(slots=2, window=8).sink == 4
    assert CompressorConfig(sink=0).sink == 0 and CompressorConfig(sink=1).sink == 1
    assert {CompressorConfig(kind=kind, rule="replace").sink for kind in BASELINES} == {0}
    with pytest.raises(ConfigError, match="sink: got -1"):
        CompressorConfig(sink=-1)


@pytest.mark.parametrize("rule", ["concat", "mean"])
def test_the_default_takes_no_slots_and_both_ways_agree(rule):
    """Also where the first segment is shorter than the sink."""
    compressor = scramble(Compressor(tiny_model(), CompressorConfig(slots=3, rule=rule)))
    for row in ROWS:
        memory = history(compressor, row[:-1])
        assert memory.rows[0].sink.length == min(4, len(row[0]))
        assert memory.slots == (9 if rule == "concat" else 3)
        with torch.no_grad():
            parallel = compressor([row]).segment_logits(0, 3)
        torch.testing.assert_close(parallel, compressor.logits([row[-1]], memory)[0], rtol=0, atol=2e-4)


def test_saved_adapters_keep_what_they_mean(tmp_path: Path):
    compressor = tiny_compressor("llama", sink=3)
    compressor.save_pretrained(tmp_path)
    assert Compressor.from_pretrained(tiny_model(), tmp_path).config.sink == 3
    path = tmp_path / "ccm_config.json"
    settings = json.loads(path.read_text())
    del settings["sink"]  # as one that never heard of it
    path.write_text(json.dumps(settings))
    assert Compressor.from_pretrained(tiny_model(), tmp_path).config.sink == 0
    assert {name for name in shipped_adapters() if read_config(name).sink} == {"ccm-broad", "ccm-stream"}


def said(caplog: pytest.LogCaptureFixture) -> int:
    return sum("no first token to rest on" in record.message for record in caplog.records)


def test_text_without_a_sink_is_said_once(caplog: pytest.LogCaptureFixture):
    bare = tiny_compressor("llama", sink=0)
    with caplog.at_level(logging.WARNING):
        bare.compress([[1, 50, 51]])  # the beginning-of-sequence token
        bare.compress([[50, 51, 52]], bare.compress([[1, 50, 51]]))  # what follows may begin as it likes
        bare.compress([[50, 51, 52]], sink=2)
        assert said(caplog) == 0
        bare.compress(
            torch.tensor([[1, 50, 51], [0, 50, 51]]), attention_mask=torch.tensor([[1] * 3, [0, 1, 1]])
        )
        assert said(caplog) == 1
        bare.compress([[50, 51, 52]])
        assert said(caplog) == 1
        tiny_compressor("llama", kind="compressive").compress([[50, 51, 52]])
        Compressor(tiny_model(), CompressorConfig(slots=2)).compress([[50, 51, 52]])
        assert said(caplog) == 1


def test_a_session_knows_the_first_token_of_its_template(caplog: pytest.LogCaptureFixture):
    tokenizer = tiny_tokenizer()
    compressor = tiny_compressor("llama", model={"vocab_size": len(tokenizer), "bos_token_id": None}, sink=0)
    with caplog.at_level(logging.WARNING):
        Session(compressor, tokenizer).append("hello")
        assert said(caplog) == 0
        compressor.compress([tokenizer.encode("hello")])
        assert said(caplog) == 1
