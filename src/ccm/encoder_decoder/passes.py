"""The two passes of an encoder: over a memory, and over whole rows, with every state of the memory in one pass.

A slot is what the rest of the model reads of a COMP token: its keys and values in every layer of the encoder, and in
every layer in which the decoder reads the encoder. A token sees the memory, and its own segment in both directions;
text does not see the COMP tokens behind it. For two segments of two tokens, one slot each::

    concat         M1 | a a' A b b'
    a, a'           . | x x  . . .
    A = COMP        . | x x  x . .
    b, b'           x | . .  . x x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.attention import Plan
from ..core.live import Live
from ..core.rule import Rule
from ..core.segments import Layout
from ..core.visibility import parallel_mask

#: Keys and values (B, H, N, D) of a layer.
States = tuple[Tensor, Tensor]


@dataclass
class EncoderPlan(Plan):
    """One pass of the encoder.

    Attributes:
        visible: (B, 1, Q, K) which keys a token sees.
        distance: (B, Q, K) from a token to a key.
        tables: per layer the score of a distance, (H, 2 W + 1) for distances up to W, or None.
        front: layer, keys and values of the pass -> all keys and values, what is kept in front.
        made: filled with keys and values of the pass, layer by layer.
    """

    visible: Tensor
    distance: Tensor
    tables: Sequence[Tensor | None]
    front: Callable[[int, States], States]
    made: list[States]

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        layer = int(module.layer_idx)
        self.made.append((key, value))
        table = self.tables[layer]
        scores = (
            query.new_zeros(1)
            if table is None
            else table[:, self.distance + table.shape[1] // 2].transpose(0, 1).to(query.dtype)
        )
        mask = torch.where(self.visible, scores, torch.finfo(query.dtype).min)
        return query, *self.front(layer, (key, value)), mask


def over(live: Live, mask: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """What new tokens see behind memories, and how far it is: (B, 1, Q, m + Q) and (B, Q, m + Q).

    Args:
        live: the memories, which have read nothing yet.
        mask: (B, Q), false on padding, which is at the left; COMP tokens come after the text.
        text: columns of text.
    """
    order = torch.arange(mask.shape[1], device=mask.device)
    # text is seen by all behind the memory, a COMP token by itself and later ones
    new = (order < text) | (order <= order.unsqueeze(1))
    new = new & mask.unsqueeze(1) | torch.eye(len(order), dtype=torch.bool, device=mask.device)
    past = live.valid.unsqueeze(1).expand(-1, len(order), -1)
    position = live.valid.sum(1, keepdim=True) + (mask.long().cumsum(1) - 1).clamp(min=0)
    keys = torch.cat([live.position, position], dim=1)
    return torch.cat([past, new], dim=2).unsqueeze(1), keys.unsqueeze(1) - position.unsqueeze(2)


class Rows:
    """Rows of segments, and where the states of their memories are: columns [sink | states | text and COMP].

    Args:
        layout: of the rows.
        rule: of the memory.
    """

    def __init__(self, layout: Layout, rule: Rule):
        self.layout, self.rule = layout, rule
        self.groups, self.slots = layout.comp_index.shape[1:]
        self.held = int(layout.sink.max()) if self.groups else 0
        device = layout.segment.device
        place = rule.placed(self.groups, self.slots).place if self.groups else torch.empty(0).long()
        sink = torch.arange(self.held, device=device).expand(len(layout.sink), -1)
        #: (B, s + S) canonical positions of what is in front.
        self.front = torch.cat([sink, layout.sink.unsqueeze(1) + place.to(device)], dim=1)
        same = layout.segment.unsqueeze(-1) == layout.segment.unsqueeze(1)
        own = same & ((layout.comp < 0) & (layout.segment >= 0)).unsqueeze(1)
        self.visible = parallel_mask(layout, rule)
        self.visible[..., self.front.shape[1] :] |= own.unsqueeze(1)

    def distance(self) -> Tensor:
        """(B, Q, K): to sink and slots in the canonical frame, to text in that of the text."""
        text = self.layout.text_position
        return torch.cat(
            [
                self.front.unsqueeze(1) - self.layout.position.unsqueeze(2),
                text.unsqueeze(1) - text.unsqueeze(2),
            ],
            dim=2,
        )

    def raw_position(self) -> Tensor:
        """(B, Q) behind the raw text that a token sees; COMP tokens have places of their own."""
        text = self.layout.text_position
        starts = [
            own[torch.tensor([start for start, _ in spans], device=own.device)]
            for own, spans in zip(text, self.layout.spans, strict=True)
        ]
        before = pad_sequence(starts, batch_first=True).gather(1, self.layout.folded)
        return torch.where(self.layout.comp >= 0, self.layout.comp, text - before).clamp(min=0)

    def columns(self, layer: int, states: States) -> States:
        """Keys and values (B, H, K, D) of one layer, states of the memory in front."""
        if not self.groups:
            return states
        return tuple(torch.cat([*self._front(part), part], dim=2) for part in states)  # type: ignore[return-value]

    def _front(self, states: Tensor) -> list[Tensor]:
        index = self.layout.comp_index.flatten(1)[:, None, :, None].expand(
            -1, states.shape[1], -1, states.shape[3]
        )
        blocks = states.gather(2, index).float().unflatten(2, (self.groups, self.slots))
        return [states[:, :, : self.held], self.rule.columns(blocks).to(states.dtype)]

    def before(self, rows: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which columns some segments see beside their own text.

        Args:
            rows, segments: (N,) which.

        Returns:
            columns (N, m), in the order sink, slots, raw text, left-padded; which of them count; (N,) raw tokens.
        """
        layout = self.layout
        first = torch.tensor(
            [layout.spans[r][j][0] for r, j in zip(rows.tolist(), segments.tolist(), strict=True)],
            device=rows.device,
        )
        seen = self.visible[rows, 0, first].clone()
        width = self.front.shape[1]
        seen[:, width:] &= layout.segment[rows] != segments.unsqueeze(1)
        order = (
            torch.arange(seen.shape[1] - width, device=rows.device)
            + int(self.front.max() if width else 0)
            + 1
        )
        rank = torch.cat([self.front, order.expand(len(self.front), -1)], dim=1)[rows].masked_fill(~seen, -1)
        most = int(seen.sum(1).max())
        columns = rank.argsort(dim=1, stable=True)[:, seen.shape[1] - most :]
        return columns, seen.gather(1, columns), seen[:, width:].sum(1)
