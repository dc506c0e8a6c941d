"""The compressor: a conditional LoRA and a few COMP tokens that fold segments into slots.

Two ways to run it, equal to within rounding (the contract of this library):

* parallel, ``compressor(segments=...)``: every fold of a row in one forward pass, for training and scoring;
* recurrent, ``compressor.compress(ids, memory)``: one segment after another, for living conversations.

    h(t)   = g_comp(Mem(t-1), c(t))      keys and values of the COMP tokens, read after c(t)
    Mem(t) = g_update(Mem(t-1), h(t))    a rule: concat, mean, ...
    O(t)   ~ p(. | Mem(t), I(t))         the base model, untouched                       (paper, equations 1-3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import attention, trial
from .config import CompressorConfig
from .folding import put
from .head import ParallelOutput, run_head
from .memory import KV, Memory
from .onward import Onward
from .reader import Ids
from .segments import Layout, lay_out
from .window import joined, overflow


class Compressor(Onward):
    """Folds segments of any causal language model's context into a small memory.

    It is made and loaded as :class:`~ccm.core.adapter.Adapted` says. Once made, it may be used by many threads at a
    time (``ccm.core.gate``). Several segments go behind a memory in one pass by :mod:`ccm.core.onward`.
    """

    def forward(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        *,
        slots: int | None = None,
        sink: int | None = None,
        window: int | None = None,
    ) -> ParallelOutput:
        """One parallel pass over rows of segments of token ids; every segment but the last is folded.

        Args:
            segments: B rows of segments of token ids.
            slots, sink, window: other sizes than the configured ones.

        Raises:
            ConfigError: an empty row or segment, or a row longer than the model's context.
        """
        layout = self.lay_out(segments, slots=slots, sink=sink, window=window)
        hidden = self.hidden(layout)
        return ParallelOutput(self.head(hidden), layout)

    def lay_out(self, segments: Sequence[Sequence[Sequence[int]]], **sizes: int | None) -> Layout:
        """The rows as a :class:`Layout` on the model's device."""
        chosen = {name: self.size(name, sizes.get(name)) for name in ("slots", "sink", "window")}
        layout = lay_out(segments, rule=self.rule, **chosen)
        self.check_length(int(layout.rope_position.max()) + 1)
        self.check_ids(layout.input_ids)
        return layout.to(self.model.device)

    def hidden(self, layout: Layout) -> Tensor:
        """Last hidden states (B, Q, d) of one parallel pass."""
        plan = attention.ParallelPlan.build(self.adapter, layout, self.rule, self.rotary, self.model.dtype)
        embeds = self.model.get_input_embeddings()(layout.input_ids)
        comp = self.comp_embeddings.to(embeds.dtype)[layout.comp.clamp(min=0)]
        embeds = torch.where((layout.comp >= 0).unsqueeze(-1), comp, embeds)
        return self.body(
            inputs_embeds=embeds,
            attention_mask=plan.mask,
            position_ids=layout.rope_position,
            use_cache=False,
            **{attention.PLAN: plan},
        ).last_hidden_state.to(self.model.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) from last hidden states (..., d), as the model's own forward pass makes them."""
        return run_head(self.model, hidden).to(hidden.device)

    @torch.no_grad()
    def compress(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        *,
        slots: int | None = None,
        sink: int | None = None,
        window: int | None = None,
    ) -> Memory:
        """Take in one segment per row: Mem(t) from Mem(t-1) and c(t).

        The segment joins the recent window; the oldest segments that no longer fit there are folded. With a
        window of 0 that is the segment itself, in one forward pass.

        Args:
            input_ids: (B, T) token ids.
            memory: of B conversations, None at the start.
            attention_mask: (B, T), 0 on padding at either side.
            slots, sink, window: other sizes than the configured ones.

        Raises:
            ConfigError: an empty segment, or one longer than the model's context.
            MismatchError: the memory was made by another model or adapter.
        """
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        self.cautions.untrained(self.lora_parameters)
        n = self.size("slots", slots)
        self.check_room(memory, ids.shape[1], n)
        sink, window = self.size("sink", sink), self.size("window", window)
        if not sink and self.kind == "ccm" and not self.two_sided:  # that was seen in decoders
            self.cautions.rootless(memory, ids, mask)
        return self.advance(memory, ids, mask, n, sink, window)

    def advance(self, memory: Memory, ids: Tensor, mask: Tensor, n: int, sink: int, window: int) -> Memory:
        """:meth:`compress` of left-padded text (B, T), unchecked, with gradients."""
        lengths = mask.sum(1).tolist()
        at_once = all(
            not row.segments and length > window for row, length in zip(memory.rows, lengths, strict=True)
        )
        # what is folded at once needs no raw keys, but for those that stay as the sink
        new = self.blocks(memory, ids, mask, n, sink) if at_once else self.step(memory, ids, mask, None)
        rows = [
            joined(row, raw, length) for row, (raw, _), length in zip(memory.rows, new, lengths, strict=True)
        ]
        if at_once:
            rows = [put(row, block, self.rule, sink) for row, (_, block) in zip(rows, new, strict=True)]
        while full := [r for r, row in enumerate(rows) if overflow(row.segments, window)]:
            oldest = [replace(rows[r], window=rows[r].window.slice(0, rows[r].segments[0])) for r in full]
            none = ids.new_empty(len(full), 0)
            new = self.blocks(replace(memory, rows=tuple(oldest)), none, none.bool(), n)
            for r, (_, block) in zip(full, new, strict=True):
                rows[r] = put(rows[r], block, self.rule, sink)
        return Memory(tuple(rows), self.fingerprint())

    def blocks(
        self, memory: Memory, ids: Tensor, mask: Tensor, n: int, keep: int | None = None
    ) -> list[tuple[KV, KV]]:
        """Per row the raw KV of its text, or of the first ``keep`` tokens, and h(t), its block of n slots."""
        return self.step(memory, ids, mask, self.comp_embeddings[:n], keep, gate=slice(ids.shape[1], None))


trial.make = lambda model: Compressor(model, CompressorConfig(slots=2))
