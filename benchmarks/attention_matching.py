"""Attention Matching (arXiv 2602.16284): a few entries that attend as many did, without any training.

Of each layer and key head, the entries that leave become m others, so that for reference queries q

    sum_j w_j exp(q k_j)          ~  the mass of what left         w_j = exp(bias_j) >= 0, by least squares
    sum_j w_j exp(q k_j) c_j      ~  its share of the output       c_j by ridge least squares

Keys are some of those that were there, picked one by one so that each takes away most of what is left of both errors.
Everything is weighted as the queries weigh it: beside the sink and all else that stays. Keys keep their places.

Two ways to keep a conversation, both with the sink raw and the bytes of k slots a segment, those of biases counted:

* ``online``: a segment that leaves is compacted together with the entries that there are, one segment after another;
* ``again``: before every segment all that was said is compacted anew, from the raw entries, which a memory of that
  size does not have: what no online method can reach.

Reference queries are those of the last tokens said, as if they came next. They are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccm.core import attention
from ccm.core.reader import Reader
from ccm.core.rotary import rotate, unrotate
from ccm.training.targets import Row

SINK = 4
#: Tokens whose queries are reference.
QUERIES = 256


class Entries(NamedTuple):
    """Keys at their places and values (L, H, N, D), and what is added to the scores of each key (L, H, N)."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def part(self, start: int, stop: int | None = None) -> Entries:
        return Entries(*(t[:, :, start:stop] for t in self))

    @staticmethod
    def cat(parts: Sequence[Entries]) -> Entries:
        return Entries(*(torch.cat(t, dim=2) for t in zip(*parts, strict=True)))


@dataclass
class Watched(attention.Plan):
    """A pass over entries that are given, with a mask; it keeps the queries, keys and values of every layer.

    Attributes:
        mask: (B, 1, T, T) additive, of the live tokens among themselves.
        keys, values: (L, B, H, m, D) in front of them.
        bias: (L, B, H, m), added to their scores.
        seen: per layer the queries (B, Hq, T, D), and keys and values (B, H, T, D), of the live tokens.
    """

    mask: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        self.seen.append((query, key, value))
        if self.keys is None:
            return query, key, value, self.mask
        layer, groups = int(module.layer_idx), query.shape[1] // key.shape[1]
        before = self.bias[layer].repeat_interleave(groups, 1).unsqueeze(2).expand(-1, -1, query.shape[2], -1)
        live = self.mask.expand(-1, query.shape[1], -1, -1)
        mask = torch.cat([before, live], dim=3)
        key = torch.cat([self.keys[layer], key], dim=2)
        return query, key, torch.cat([self.values[layer], value], dim=2), mask


class Seen(NamedTuple):
    """One row of a pass: last hidden states (T, d), queries (L, Hq, T, D), and the entries of its tokens."""

    hidden: Tensor
    queries: Tensor
    entries: Entries


def run(
    reader: Reader,
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    memories: Sequence[Entries] = (),
    visible: Sequence[Tensor] = (),
) -> list[Seen]:
    """Texts from the positions ``starts`` on, each over a memory of its own.

    Args:
        visible: (T, T) what each token sees of the text; all before it and itself, if it is not given.
    """
    device, width = reader.model.device, max(map(len, ids))
    grid = torch.zeros(len(ids), width, dtype=torch.long, device=device)
    allowed = torch.eye(width, dtype=torch.bool, device=device).repeat(len(ids), 1, 1)
    for r, row in enumerate(ids):
        grid[r, : len(row)] = torch.tensor(row, device=device)
        seen = visible[r] if visible else torch.ones(len(row), len(row)).tril().bool()
        allowed[r, : len(row), : len(row)] |= seen.to(device)
    position = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(width, device=device)
    plan = Watched("", None, attention.additive(allowed.unsqueeze(1), reader.model.dtype))
    if memories:
        most = max(memory.length for memory in memories)
        low = torch.finfo(reader.model.dtype).min

        def padded(parts: Sequence[Tensor], pad: Sequence[int], value: float = 0.0) -> Tensor:
            size = [(*pad, most - part.shape[2]) for part in parts]
            return torch.stack(
                [nn.functional.pad(p, s, value=value) for p, s in zip(parts, size, strict=True)], dim=1
            ).to(reader.model.dtype)

        plan.keys = padded([m.keys for m in memories], (0, 0, 0))
        plan.values = padded([m.values for m in memories], (0, 0, 0))
        plan.bias = padded([m.bias for m in memories], (0,), low)
    hidden = reader.body(
        inputs_embeds=reader.model.get_input_embeddings()(grid),
        attention_mask=plan.mask,
        position_ids=position,
        use_cache=False,
        **{attention.PLAN: plan},
    ).last_hidden_state
    # each (B, L, H, T, D)
    queries, keys, values = (torch.stack(parts, 1) for parts in zip(*plan.seen, strict=True))
    return [
        Seen(
            hidden[r, : len(row)],
            queries[r, :, :, : len(row)],
            Entries(k := keys[r, :, :, : len(row)], values[r, :, :, : len(row)], k.new_zeros(k.shape[:3])),
        )
        for r, row in enumerate(ids)
    ]


@dataclass(frozen=True)
class Fit:
    """How entries are compacted.

    Attributes:
        ridge: of the values, a share of the largest weight of a key.
        steps: of the projected gradient for the masses.
        least: smallest mass of an entry.
        biased: whether entries have a mass other than one.
    """

    ridge: float = 1e-3
    steps: int = 100
    least: float = 0.05
    biased: bool = True

    def __call__(self, queries: Tensor, gone: Entries, stay: Entries, m: int, scaling: float) -> Entries:
        """m entries in place of those that are gone, beside those that stay, for queries (L, H, n, D)."""
        if not m or gone.length <= m:
            return gone.part(0, m)
        scores = queries @ torch.cat([stay.keys, gone.keys], dim=2).transpose(2, 3) * scaling
        weights = (scores + torch.cat([stay.bias, gone.bias], dim=2).unsqueeze(2)).softmax(-1)
        others, a = weights.split([stay.length, gone.length], dim=3)  # (L, H, n, N)
        rest, wanted, mass = others @ stay.values, a @ gone.values, a.sum(-1, keepdim=True)
        size = gone.values.square().mean((2, 3), keepdim=True).sqrt()
        target = torch.cat([wanted / size, mass * wanted.shape[3] ** 0.5], dim=3)
        best = pick(a, target, m, self.ridge).sort(dim=2).values
        keys, values = (t.take_along_dim(best.unsqueeze(3), dim=2) for t in (gone.keys, gone.values))
        bias = gone.bias.take_along_dim(best, dim=2)
        a = a.take_along_dim(best.unsqueeze(2), dim=3)
        if self.biased:
            w = masses(a, mass, self.steps, self.least)
            bias = bias + w.log()
            a = a * w.unsqueeze(2)
        total = 1 - mass + a.sum(-1, keepdim=True)
        a = a / total
        gram = a.transpose(2, 3) @ a
        error = a.transpose(2, 3) @ (rest + wanted - rest / total - a @ values)
        return Entries(keys, values + torch.linalg.solve(gram + lifted(gram, self.ridge), error), bias)


def pick(a: Tensor, target: Tensor, m: int, ridge: float) -> Tensor:
    """m columns of a (L, H, n, N) that together explain most of a target (L, H, n, E), one by one: (L, H, m)."""
    gram, side = a.transpose(2, 3) @ a, a.transpose(2, 3) @ target
    gram = gram + lifted(gram, ridge)
    free = torch.ones_like(gram[..., 0], dtype=torch.bool)
    chosen = []
    for _ in range(m):
        own = gram.diagonal(dim1=2, dim2=3).clamp(min=1e-12)
        j = (side.square().sum(-1) / own).masked_fill(~free, -1).argmax(2, keepdim=True)
        chosen.append(j)
        free.scatter_(2, j, False)
        root = own.take_along_dim(j, dim=2).sqrt()
        g = gram.take_along_dim(j.unsqueeze(2), dim=3).squeeze(3) / root
        s = side.take_along_dim(j.unsqueeze(3), dim=2).squeeze(2) / root
        gram = gram - g.unsqueeze(3) * g.unsqueeze(2)
        side = side - g.unsqueeze(3) * s.unsqueeze(2)
    return torch.cat(chosen, dim=2)


def lifted(gram: Tensor, ridge: float) -> Tensor:
    """What keeps matrices (L, H, N, N) regular: a share of the largest number on the diagonal of each."""
    most = gram.diagonal(dim1=2, dim2=3).amax(-1)[..., None, None]
    return torch.eye(gram.shape[3], device=gram.device) * ridge * most


def masses(a: Tensor, mass: Tensor, steps: int, least: float) -> Tensor:
    """w (L, H, m), none below ``least``, for which a w is nearest to a mass (L, H, n, 1).

    By accelerated gradient steps, each brought back above the bound.
    """
    gram, side = a.transpose(2, 3) @ a, (a.transpose(2, 3) @ mass).squeeze(3)
    rate = 1 / gram.sum(3).amax(2, keepdim=True).clamp(min=1e-12)  # nothing is negative: a bound of its norm
    w = ahead = torch.ones_like(side)
    for step in range(steps):
        new = (ahead - rate * ((gram @ ahead.unsqueeze(3)).squeeze(3) - side)).clamp(min=least)
        ahead = new + step / (step + 3) * (new - w)
        w = new
    return w


def room(entries: int, size: int) -> int:
    """Entries with a bias that take no more bytes than so many without; of a head of this size."""
    return entries * 2 * size // (2 * size + 1)


#: Summed nats and number of scored tokens of a row.
Score = tuple[float, int]


def nats(reader: Any, hidden: Tensor, ids: Sequence[int], roles: Sequence[int]) -> Score:
    """Of the scored tokens of one text (T,) with last hidden states (T, d)."""
    scored = [t for t, role in enumerate(roles) if role]
    if not scored:
        return 0.0, 0
    logits = reader.head(hidden[[t - 1 for t in scored]]).float()
    targets = torch.tensor([ids[t] for t in scored], device=logits.device)
    return float(nn.functional.cross_entropy(logits, targets, reduction="sum")), len(scored)


def added(first: Score, second: Score) -> Score:
    return first[0] + second[0], first[1] + second[1]


@torch.no_grad()
def online(reader: Any, rows: Sequence[Row], k: int, fit: Fit, batch: int = 8) -> list[Score]:
    """Rows segment by segment; each that leaves is compacted with the entries before it, to k more slots' bytes."""
    result: list[Score] = []
    for at in range(0, len(rows), batch):
        result += _online(reader, rows[at : at + batch], k, fit)
    return result


def _online(reader: Any, rows: Sequence[Row], k: int, fit: Fit) -> list[Score]:
    memories, starts = [nothing(reader)] * len(rows), [0] * len(rows)
    asked: list[list[Tensor]] = [[] for _ in rows]  # position-free queries
    scores: list[Score] = [(0.0, 0)] * len(rows)
    for t in range(max(len(row.segments) for row in rows)):
        live = [r for r, row in enumerate(rows) if t < len(row.segments)]
        ids = [rows[r].segments[t] for r in live]
        seen = run(reader, ids, [starts[r] for r in live], [memories[r] for r in live])
        for r, one in zip(live, seen, strict=True):
            row = rows[r]
            scores[r] = added(scores[r], nats(reader, one.hidden, row.segments[t], row.roles[t]))
            if t + 1 < len(row.segments):
                asked[r].append(placed(reader, one.queries, starts[r], unrotate))
                starts[r] += len(row.segments[t])
                held = Entries.cat([memories[r], one.entries])
                memories[r] = compacted(reader, torch.cat(asked[r], dim=2), held, (t + 1) * k, starts[r], fit)
    return scores


@torch.no_grad()
def again(reader: Any, rows: Sequence[Row], k: int, fit: Fit, batch: int = 8) -> list[Score]:
    """Rows of which, before each scored segment, all raw entries are compacted anew to k slots' bytes a segment."""
    scores = []
    for row in rows:
        (seen,) = run(reader, [sum(row.segments, ())], [0])
        queries = placed(reader, seen.queries, 0, unrotate)
        starts = [sum(map(len, row.segments[:t])) for t in range(len(row.segments))]
        places = [t for t, roles in enumerate(row.roles) if any(roles)]
        score: Score = (0.0, 0)
        for at in range(0, len(places), batch):
            part = places[at : at + batch]
            memories = [
                compacted(
                    reader, queries[:, :, : starts[t]], seen.entries.part(0, starts[t]), t * k, starts[t], fit
                )
                for t in part
            ]
            live = run(reader, [row.segments[t] for t in part], [starts[t] for t in part], memories)
            for t, one in zip(part, live, strict=True):
                score = added(score, nats(reader, one.hidden, row.segments[t], row.roles[t]))
        scores.append(score)
    return scores


def compacted(reader: Any, queries: Tensor, held: Entries, slots: int, stop: int, fit: Fit) -> Entries:
    """The sink as it is, and the rest of the entries in the bytes of so many slots.

    Args:
        queries: (L, Hq, T, D) position-free, of what was said; the last of them are asked as if they came next.
        stop: position of what comes next.
    """
    heads, size = held.keys.shape[1], held.keys.shape[3]
    asked = placed(reader, queries[:, :, -QUERIES:], stop, rotate).unflatten(1, (heads, -1)).flatten(2, 3)
    sink, rest = held.part(0, SINK), held.part(SINK)
    return Entries.cat([sink, fit(asked, rest, sink, room(slots, size), scaling(reader))])


def placed(reader: Any, vectors: Tensor, start: int, how: Any) -> Tensor:
    """Vectors (L, H, T, D) put at the positions ``start``.., or taken off them."""
    order = torch.arange(vectors.shape[2], device=vectors.device)
    return how(vectors, *reader.rotary.stacked(order + start))


def nothing(reader: Any) -> Entries:
    raw = reader.empty().rows[0].window
    return Entries(raw.keys, raw.values, raw.keys[..., 0])


def scaling(reader: Any) -> float:
    return reader.model.get_submodule(reader.family.attention[0]).scaling
