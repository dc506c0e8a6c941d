"""What queries see of keys: the attention that the model itself would compute, for methods that choose by it.

Queries and keys come position-free. Keys stand at the ranks 0 to N-1, as a pass over a memory places them, and
queries at their end or where they are put. Scaling, soft-capping, sliding windows and learned sinks are the layer's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.attention import Asked
from ..core.reader import Reader
from ..core.rotary import rotate


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


def scoring(reader: Reader) -> tuple[Scoring, ...]:
    """How each layer makes scores, asked once and kept with the model."""
    known = reader.model.__dict__
    if "_ccm_scoring" not in known:
        seen: dict[int, Asked] = {}
        ids = torch.zeros(1, 1, dtype=torch.long, device=reader.model.device)
        with torch.no_grad():
            reader.step(reader.empty(), ids, ids == 0, None, asked=seen)
        known["_ccm_scoring"] = tuple(Scoring.of(seen[i]) for i in range(len(seen)))
    how: tuple[Scoring, ...] = known["_ccm_scoring"]
    return how


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
    for layer, how in zip(found, scoring(reader), strict=True):
        layer *= how.scaling
        if how.softcap is not None:
            layer.div_(how.softcap).tanh_().mul_(how.softcap)
        hidden = distance < 0
        if how.sliding is not None:
            hidden = hidden | (distance >= how.sliding) & (place >= memory)
        layer.masked_fill_(hidden, -torch.inf)
    return found


def weights(
    reader: Reader, queries: Tensor, keys: Tensor, *, memory: int = 0, start: int | None = None
) -> Tensor:
    """Attention weights, the softmax of :func:`scores`; a learned sink takes its part of them."""
    found = scores(reader, queries, keys, memory=memory, start=start)
    mass = found.logsumexp(-1, keepdim=True)
    for layer, how in zip(mass, scoring(reader), strict=True):
        if how.sinks is not None:
            sink = how.sinks.float().to(layer.device).view(len(layer), -1, 1, 1)
            torch.logaddexp(layer, sink, out=layer)
    return found.sub_(mass).exp_()
