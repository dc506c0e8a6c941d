"""What queries see of keys: the attention that the model itself would compute, for methods that choose by it.

Queries and keys come position-free. Keys stand at the ranks 0 to N-1, as a pass over a memory places them, and
queries at their end or where they are put. Scaling, soft-capping, sliding windows and learned sinks are the layer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .rotary import rotate

if TYPE_CHECKING:
    from .reader import Reader


class Asked(NamedTuple):
    """What a layer asks of its keys in a pass.

    Attributes:
        queries: (B, Hq, Q, D), rotated.
        options: how it makes scores, by the names of transformers.
    """

    queries: Tensor
    options: dict[str, Any]


class Scoring(NamedTuple):
    """How a layer makes scores of queries and keys.

    Attributes:
        scaling: of every product.
        softcap: no score is larger; None: they are as they are.
        sliding: a raw token sees so many, itself included; None: all.
        sinks: (Hq,) learned scores that stand beside those of the keys.
    """

    scaling: float
    softcap: float | None
    sliding: int | None
    sinks: Tensor | None

    @classmethod
    def of(cls, asked: Asked) -> Scoring:
        """As a layer has handed it to its attention function."""
        scaling, softcap, sliding, sinks = map(
            asked.options.get, ("scaling", "softcap", "sliding_window", "s_aux")
        )
        sinks = None if sinks is None else sinks.detach()
        return cls(scaling or asked.queries.shape[-1] ** -0.5, softcap, sliding, sinks)


def scores(
    reader: Reader, queries: Tensor, keys: Tensor, *, memory: int = 0, start: int | None = None
) -> Tensor:
    """Scores of keys, before the softmax; -inf where a key is not seen.

    Args:
        reader: the model.
        queries: (L, Hq, w, D).
        keys: (L, H, N, D).
        memory: the first keys are sink and slots, which no sliding window drops.
        start: position of the first query. By default the queries are those of the last keys; at N, all keys stand
            before them.

    Returns:
        (L, H, G, w, N) in fp32, for the G query heads of each key head.
    """
    w, n = queries.shape[2], keys.shape[2]
    place = torch.arange(n, device=keys.device)
    asked = (n - w if start is None else start) + torch.arange(w, device=keys.device)
    turned = rotate(queries.float(), *reader.rotary.stacked(asked)).unflatten(1, (keys.shape[1], -1))
    found = turned @ rotate(keys.float(), *reader.rotary.stacked(place)).unsqueeze(2).mT
    distance = asked.unsqueeze(1) - place
    for layer, scoring in zip(found, reader.scoring, strict=True):
        layer *= scoring.scaling
        if scoring.softcap is not None:
            layer.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        hidden = distance < 0
        if scoring.sliding is not None:
            hidden = hidden | (distance >= scoring.sliding) & (place >= memory)
        layer.masked_fill_(hidden, -torch.inf)
    return found


def weights(
    reader: Reader, queries: Tensor, keys: Tensor, *, memory: int = 0, start: int | None = None
) -> Tensor:
    """Attention weights, the softmax of :func:`scores`; a learned sink takes its part of them."""
    found = scores(reader, queries, keys, memory=memory, start=start)
    mass = found.logsumexp(-1, keepdim=True)
    for layer, scoring in zip(mass, reader.scoring, strict=True):
        if scoring.sinks is not None:
            sink = scoring.sinks.float().to(layer.device).view(len(layer), -1, 1, 1)
            torch.logaddexp(layer, sink, out=layer)
    return found.sub_(mass).exp_()
