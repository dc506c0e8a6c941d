"""Evicted entries that join one that stays, in place of being let go."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.memory import KV


def joined_to_nearest(held: KV, stay: Tensor, weight: Tensor, least: Tensor) -> KV:
    """The entries that stay, each the weighted mean of itself and of those that join it.

    Args:
        held: N entries, (L, H, N, D).
        stay: (L, H, n), sorted.
        weight: (L, H, N), positive, of an entry in such a mean.
        least: (L, H, 1, 1) or a number, cosine of the keys below which an evicted entry joins none.
    """
    similar = normalize(held.keys, dim=3) @ normalize(held.take(stay).keys, dim=3).mT  # (L, H, N, n)
    best = (similar * 2**8).round().div(2**8).max(3, keepdim=True)  # rounding must not say which is nearest
    share = torch.zeros_like(similar).scatter(3, best.indices, (best.values >= least).to(similar.dtype))
    own = (
        torch.nn.functional.one_hot(stay, held.length).to(similar.dtype).mT
    )  # an entry that stays is its own
    share = torch.where(own.sum(3, keepdim=True) > 0, own, share) * weight.unsqueeze(3)
    share = (share / share.sum(2, keepdim=True).clamp_min(1e-12)).mT
    return KV(share @ held.keys, share @ held.values)
