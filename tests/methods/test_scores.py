"""Scores of keys are the attention of the pass itself, in families that differ in it."""

from __future__ import annotations

import pytest
import torch
from family_models import family_model
from tiny import random_rows

from ccm import get_method
from ccm.core.memory import KV
from ccm.methods.scores import scores, weights

SEGMENTS = random_rows([[9, 12, 10, 7]])[0]
FAMILIES = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "vaultgemma",
    "gpt_neox",
    "gpt_oss",
    "olmo3",
    "cohere2",
    "granite",
    "stablelm",
    "qwen3",
    "persimmon",
]


def seen(family):
    """A memory and a text behind it: the weights of every layer (L, H, G, T, N), and what scores are made of."""
    method = get_method("mean-pool", slots=2, sink=3, window=14).bind(family_model(family, "eager"))
    memory = method.empty()
    for segment in SEGMENTS[:3]:
        memory = method.fold(memory, [segment])
    row = memory.rows[0]
    assert (
        row.sink.length and row.slots.length and row.window.length > 6
    )  # more than a layer that slides sees
    reader, found = method.reader, []
    modules = [reader.model.get_submodule(name) for name in reader.family.attention]
    hooks = [module.register_forward_hook(lambda m, i, out: found.append(out[1][0])) for module in modules]
    reader.logits([SEGMENTS[3]], memory)
    for hook in hooks:
        hook.remove()
    ((text, queries),) = reader.watch([SEGMENTS[3]], memory)
    keys = KV.cat((row.sink, row.slots, row.window, text)).keys
    heads = keys.shape[1]
    return (
        reader,
        torch.stack(found).unflatten(1, (heads, -1)),
        queries,
        keys,
        row.sink.length + row.slots.length,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_pass(family):
    reader, expected, queries, keys, memory = seen(family)
    got = weights(reader, queries, keys, memory=memory)
    assert torch.allclose(got, expected, atol=1e-5)
    if family == "gpt_oss":
        assert expected.sum(-1).min() < 0.9, "learned sinks take no part"
    newest = weights(reader, queries[:, :, -4:], keys, memory=memory)
    assert torch.allclose(newest, expected[..., -4:, :], atol=1e-5)


def test_each_part_of_a_score_counts():
    """Negative controls: without the window, or somewhere else, weights are others."""
    reader, expected, queries, keys, memory = seen("gemma3_text")
    width, w = keys.shape[2], queries.shape[2]
    for exempt, start in ((width, None), (0, None), (memory, width - w + 2)):
        got = weights(reader, queries, keys, memory=exempt, start=start)
        assert not torch.allclose(got, expected, atol=1e-3)


def test_hidden_keys_have_no_score():
    reader, expected, queries, keys, memory = seen("mistral")
    found = scores(reader, queries, keys, memory=memory)
    assert torch.equal(found.isinf(), expected == 0)
    behind = scores(reader, queries, keys[:, :, :memory], memory=memory, start=memory)
    assert behind.isfinite().all()
