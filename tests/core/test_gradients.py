"""Gradients: the same with gradient checkpointing, in the adapter only, and never silently zero."""

from __future__ import annotations

import pytest
import torch
from tiny import random_rows, tiny_compressor

ROWS = random_rows([[5, 4, 7, 3], [4, 6, 3]])
FAMILIES = ["llama", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox"]


def gradients(
    family: str, rule: str, sizes: dict[str, int], reentrant: bool | None
) -> dict[str, torch.Tensor]:
    compressor = tiny_compressor(family, "eager" if family == "gemma2" else "sdpa", rule=rule)
    model = compressor.model
    runs = []
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
    projection = next(m for m in layer.modules() if hasattr(m, "lora_A"))
    projection.register_forward_hook(lambda *_: runs.append(1))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    compressor(ROWS, **sizes).loss.backward()
    assert len(runs) == (1 if reentrant is None else 2)  # checkpointing did run it again
    adapter = {id(p) for p in compressor.trainable_parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in adapter)
    assert all(p.grad is not None for p in compressor.trainable_parameters())
    names = {id(p): name for name, p in compressor.named_parameters()}
    return {names[id(p)]: p.grad for p in compressor.trainable_parameters()}


@pytest.mark.parametrize("sizes", [{}, {"sink": 2, "window": 12}], ids=["plain", "window"])
@pytest.mark.parametrize("rule", ["concat", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_equal_those_without(family, rule, sizes):
    expected = gradients(family, rule, sizes, None)
    assert {"comp_embeddings"} < set(expected)
    for name, gradient in expected.items():
        # in the last layer nothing reads what COMP tokens put out, only their keys and values
        unread = "layers.2." in name and any(part in name for part in ("q_proj", "o_proj", "attention.dense"))
        assert (gradient.abs().max() > 1e-6) != unread, name
    for reentrant in (False, True):
        got = gradients(family, rule, sizes, reentrant)
        for name, gradient in expected.items():
            assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_the_gradient_is_the_slope_of_the_loss():
    """Against a finite difference, through folds of folds."""
    compressor = tiny_compressor("llama", rule="mean")
    parameter = compressor.comp_embeddings
    compressor(ROWS).loss.backward()
    step = torch.zeros_like(parameter)
    step[1, 3] = 1e-3
    with torch.no_grad():
        parameter += step
        above = compressor(ROWS).loss
        parameter -= 2 * step
        below = compressor(ROWS).loss
    slope = (above - below) / 2e-3
    torch.testing.assert_close(parameter.grad[1, 3].double(), slope.double(), rtol=0.02, atol=1e-4)
