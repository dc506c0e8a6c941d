"""The bridge to kvpress: its presses score the entries of a memory; ours do as theirs (`make test-kvpress`)."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from method_cases import TOKENIZER, model

from ccm import get_method
from ccm.core.memory import KV, Row
from ccm.errors import ConfigError
from ccm.methods import Method

installed = pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress has an environment of its own")


def case(method: Method, held: int = 30, window: int = 40) -> tuple[Row, KV, torch.Tensor]:
    """A row without a sink, its entries, and queries of all of them."""
    torch.manual_seed(0)
    layers, heads, size = method.reader.kv_shape()
    keys, values = torch.randn(2, layers, heads, held + window, size)
    kv = KV(keys, values)
    queries = torch.randn(layers, 2 * heads, held + window, size)
    return Row(kv.slice(0, 0), kv.slice(0, 0), kv.slice(held)), kv.slice(0, held), queries


@installed
@pytest.mark.parametrize(
    ("ours", "press", "options", "queries", "end"),
    [
        ("snapkv", "SnapKVPress", {"window_size": 32}, 32, -2),  # theirs smooths over the window's edge
        ("tova", "TOVAPress", {}, 1, None),
        ("key-norm", "KnormPress", {}, 1, None),
    ],
)
def test_a_score_of_ours_is_that_of_the_press(ours, press, options, queries, end) -> None:
    of = model()
    method = get_method(ours).bind(of)
    bridge = get_method("kvpress", press=press, options=options).bind(of)
    row, held, asked = case(method)
    own = method.score(row, held, asked[:, :, -queries:])[:, :, :end]
    theirs = bridge.score(row, held, asked)[:, :, :end]
    assert torch.allclose(own, theirs, atol=1e-6)
    assert own.flatten().std() > 1e-4


@installed
@pytest.mark.parametrize("press", ["SnapKVPress", "KeyDiffPress", "ExpectedAttentionPress", "LagKVPress"])
def test_a_press_keeps_a_conversation(press: str) -> None:
    method = get_method("kvpress", press=press, sink=2, window=6, tokens=8).bind(model(), TOKENIZER)
    memory = method.empty()
    for length in (9, 3, 12, 1, 7):
        memory = method.fold(memory, [list(range(5, 5 + length))])
    assert memory.length == method.limit == 16


@installed
@pytest.mark.parametrize("press", ["QFilterPress", "ThinKPress", "DuoAttentionPress", "Press"])
def test_a_press_that_asks_for_more_is_refused(press: str) -> None:
    with pytest.raises(ConfigError, match="press"):
        get_method("kvpress", press=press).bind(model())


@installed
def test_an_option_that_no_press_has() -> None:
    with pytest.raises(ConfigError, match="windows"):
        get_method("kvpress", options={"windows": 3}).bind(model())


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ConfigError, match="make kvpress-env"):
        get_method("kvpress").bind(model())
