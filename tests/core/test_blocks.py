"""Attention in blocks of queries is attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny_compressor
from torch import Tensor, nn

from ccm.core import blocks
from ccm.core.attention import additive
from ccm.core.blocks import grouped


def whole(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / 4) v written out, (B, Q, H, D)."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) / 4).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("queries", [65, 128, 700])
def test_blocks_give_the_same_and_the_same_gradient(queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double().requires_grad_()

    query, key, value = (
        random(2, 4, queries, 16),
        random(2, 2, queries + 9, 16),
        random(2, 2, queries + 9, 16),
    )
    visible = torch.rand(2, 1, queries, queries + 9, generator=generator) < 0.05
    visible[..., :3] = True
    visible[:, :, : queries // 2, queries // 2 :] = False  # blocks see different numbers of keys
    cut = blocks.cut(additive(visible, torch.float64))
    assert sum(part.queries for part in cut) == queries
    assert len({len(part.columns) for part in cut}) > 1 or queries <= blocks.BLOCK * blocks.TOGETHER
    own = blocks.attend(grouped, nn.Module(), query, key, value, cut, scaling=0.25)
    expected = whole(query, key, value, visible)
    torch.testing.assert_close(own, expected)
    upstream = torch.randn(expected.shape, generator=generator).double()
    for a, b in zip(
        torch.autograd.grad(own, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_few_queries_are_not_cut() -> None:
    assert blocks.cut(torch.zeros(1, 1, blocks.BLOCK, 99)) == []


def test_long_rows_are_cut_and_a_wrong_column_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = tiny_compressor("llama")
    row = [[5 + (7 * k + i) % 90 for i in range(20)] for k in range(8)]

    def logits(cut: Callable[[Tensor, int], list[blocks.Blocks]]) -> Tensor:
        monkeypatch.setattr("ccm.core.attention.cut", cut)
        with torch.no_grad():
            return compressor([row]).segment_logits(0, 7)

    uncut = logits(lambda mask, together: [])
    torch.testing.assert_close(logits(blocks.cut), uncut, rtol=1e-4, atol=1e-4)
    shifted = logits(lambda *args: [b._replace(columns=b.columns.roll(1, 1)) for b in blocks.cut(*args)])
    assert (shifted - uncut).abs().max() > 1e-2
