"""What the trained baselines share: they run, and are trained, by the recursion alone."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.compressor import Compressor
from ...core.config import CompressorConfig
from ...core.folding import put
from ...core.memory import KV, Row
from ...core.segments import Layout, left_padded
from ...errors import ConfigError


class Baseline(Compressor):
    """A compressor whose blocks are made from something else; a subclass says from what (:meth:`blocks`).

    The parallel pass of the core knows CCM alone. Here one segment runs after another, with gradients: first the
    base model reads it, then it is compressed. Slots are all that is kept, so sink and window are 0.

    Attributes:
        kind: name of it, in recipes and adapters.
        rules: those that go with it; empty is any.
        whole: all of c(1..t) is compressed at once, rather than c(t).
        truncate: folds that a gradient goes back through, at most; 0 is all.
    """

    rules: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False
    truncate: ClassVar[int] = 0

    def __init__(
        self,
        model: PreTrainedModel,
        config: CompressorConfig,
        base_adapter: str | os.PathLike[str] | None = None,
    ):
        if config.sink or config.window:
            raise ConfigError(
                f"CompressorConfig: kind {self.kind!r} has slots only, got sink={config.sink}, "
                f"window={config.window}; leave them 0, or take kind 'ccm'"
            )
        if self.rules and config.rule not in self.rules:
            raise ConfigError(
                f"CompressorConfig.rule: got {config.rule!r}, expected {' or '.join(self.rules)} with kind "
                f"{self.kind!r}"
            )
        super().__init__(model, config, base_adapter)

    def size(self, name: str, value: int | None = None) -> int:
        value = super().size(name, value)
        if name != "slots" and value:
            raise ConfigError(f"{name}: got {value}, expected 0: kind {self.kind!r} has slots only")
        return value

    def hidden(self, layout: Layout) -> Tensor:
        """Last hidden states (B, Q, d) of the text of every row, segment by segment; 0 at COMP tokens and padding."""
        groups, n = layout.comp_index.shape[1:]
        texts = [
            [layout.input_ids[r, slice(*span)].tolist() for span in spans]
            for r, spans in enumerate(layout.spans)
        ]
        memory = self.empty(len(texts))
        rows: list[Row] = list(memory.rows)
        width = self.model.get_input_embeddings().weight.shape[1]
        shape = (*layout.input_ids.shape, width)
        out = torch.zeros(shape, dtype=self.model.dtype, device=layout.input_ids.device)
        for step in range(groups + 1):
            alive = [r for r, text in enumerate(texts) if step < len(text)]
            ids, mask = left_padded([texts[r][step] for r in alive], out.device)
            _, call = self.live(replace(memory, rows=tuple(rows[r] for r in alive))).ahead(mask)
            states = self.body(input_ids=ids, **call).last_hidden_state.to(out.device)
            for place, r in enumerate(alive):
                out[r, slice(*layout.spans[r][step])] = states[place, mask[place]]
            if folding := [r for r in alive if step + 1 < len(texts[r])]:
                first = 0 if self.whole else step
                ids, mask = left_padded(
                    [list(chain.from_iterable(texts[r][first : step + 1])) for r in folding], out.device
                )
                held = replace(memory, rows=tuple(self._cut(rows[r], n) for r in folding))
                for r, (_, block) in zip(folding, self.blocks(held, ids, mask, n), strict=True):
                    rows[r] = put(replace(rows[r], segments=(len(texts[r][step]),)), block, self.rule, 0)
        return out

    def _cut(self, row: Row, n: int) -> Row:
        """What the next fold reads: gradients go on to the newest block, at every ``truncate``-th fold to none."""
        if not self.truncate:
            return row
        old = row.slots.length - (n if row.steps % self.truncate else 0)
        parts = (torch.cat([part[:, :, :old].detach(), part[:, :, old:]], dim=2) for part in row.slots)
        return replace(row, slots=KV(*parts))
