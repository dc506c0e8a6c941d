"""Pooling over time: a text's keys and values as a few slots, by a learned convolution (compressive memories).

A text of T tokens is cut into n chunks, and a slot is a weighted mean over one of them. The weights are a softmax
over a learned curve of the place inside the chunk: one curve per layer, head, and keys or values, flat at the start,
which is the plain mean. Chunks are as long as the text asks for, so a curve is learned at ``TAPS`` places and linear
between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.memory import KV

#: Places inside a chunk at which the curve of weights is learned.
TAPS = 16


class Chunks(NamedTuple):
    """The tokens of each slot: how near each is to each tap, (..., S, T, TAPS), and whether it is in, (..., S, T)."""

    near: Tensor
    inside: Tensor


def bounds(length: int, n: int) -> list[tuple[int, int]]:
    """(start, stop) of n chunks that cover ``length`` tokens; they overlap by a token where it does not divide."""
    return [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]


def chunks(start: Tensor, stop: Tensor, width: int) -> Chunks:
    """The chunks from column start to stop - 1, both (..., S), of ``width`` columns."""
    start, stop = start.unsqueeze(-1), stop.unsqueeze(-1)
    order = torch.arange(width, device=start.device)
    place = ((order - start + 0.5) / (stop - start) * TAPS - 0.5).clamp(0, TAPS - 1)
    distance = (place.unsqueeze(-1) - torch.arange(TAPS, device=start.device)).abs()
    return Chunks((1 - distance).clamp(min=0), (order >= start) & (order < stop))


class Pooling(nn.Module):
    """The learned convolution.

    Attributes:
        curve: (L, 2, H, TAPS) logits for keys and values.
    """

    def __init__(self, layers: int, heads: int):
        super().__init__()
        self.curve = nn.Parameter(torch.zeros(layers, 2, heads, TAPS))

    def forward(
        self, layer: int | slice, parts: Chunks, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Slots from position-free keys and from values, both (..., H, T, D) -> (..., H, S, D) in fp32.

        Args:
            layer: index of the layer; or all of them at once, as the first dimension of keys and values.
            parts: the chunks, over the T tokens.
            keys, values: of the text.
        """
        pooled = []
        for part, states in enumerate((keys, values)):
            curve = self.curve[layer, part].to(parts.near.device)
            logits = torch.einsum("...hk,...stk->...hst", curve, parts.near)
            weights = logits.masked_fill(~parts.inside.unsqueeze(-3), -torch.inf).softmax(-1)
            pooled.append(weights @ states.float())
        return pooled[0], pooled[1]

    def block(self, text: KV, n: int) -> KV:
        """One segment's slots over all layers: (L, H, T, D) -> (L, H, n, D)."""
        start, stop = torch.tensor(bounds(text.length, n), device=text.keys.device).unbind(-1)
        return KV(*self(slice(None), chunks(start, stop, text.length), *text))
