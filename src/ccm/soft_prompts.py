"""Memory as soft prompts (AutoCompressors, Chevalier et al. 2023; Recurrent Memory Transformer, Bulatov et al. 2022).

    s(t)   = last hidden states of n summary tokens, read with the adapter after Mem(t-1) and c(t)
    h(t)   = keys and values of s(t), put in as embeddings behind Mem(t-1), by the base model
    Mem(t) = g_update(Mem(t-1), h(t)): concat accumulates summaries (AutoCompressors), replace keeps the last (RMT)

A summary is known only when the last layer of a pass has run, and goes in at the first of the next: the recursion
runs through the depth of the model as well as through time, and there is no parallel pass. Training is step by step;
every loss reaches all summaries that it reads, and through them at most two folds, as in the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import KV, Memory, Row
from .segments import Layout

if TYPE_CHECKING:
    from .compressor import Compressor

#: Folds that a gradient goes back through, at most; 0 is all.
TRUNCATE = 2


def blocks(compressor: Compressor, memory: Memory, ids: Tensor, mask: Tensor, n: int) -> list[KV]:
    """h(t) of each row, from left-padded text (B, T)."""
    behind = torch.cat([mask, mask.new_ones(len(ids), n)], dim=1)
    _, call = compressor.live(memory).ahead(behind, compressor.adapter, slice(0, None))
    words = compressor.model.get_input_embeddings()(ids)
    summary = compressor.comp_embeddings[:n].to(words.dtype).expand(len(ids), -1, -1)
    states = compressor.body(inputs_embeds=torch.cat([words, summary], dim=1), **call).last_hidden_state
    out = states[:, -n:].to(ids.device)
    # hidden states are many times as long as embeddings
    size = compressor.comp_embeddings.detach().square().mean().sqrt()
    prompts = out.float() / out.float().square().mean(-1, keepdim=True).sqrt() * size
    none = ids[:, :0]
    return [block for _, block in compressor._step(memory, none, none.bool(), prompts)]


def hidden(compressor: Compressor, layout: Layout) -> Tensor:
    """Last hidden states (B, Q, d) of the text of every row, segment by segment; 0 at COMP tokens and padding."""
    spans, n = layout.spans, layout.comp_index.shape[2]
    batch, width = layout.input_ids.shape
    empty = compressor.empty(batch)
    rows: list[Row] = list(empty.rows)
    out = torch.zeros(
        batch,
        width,
        compressor.comp_embeddings.shape[1],
        dtype=compressor.model.dtype,
        device=layout.sink.device,
    )
    for step in range(max(map(len, spans))):
        alive = [r for r in range(batch) if step < len(spans[r])]
        ids, mask = _left_padded([layout.input_ids[r, slice(*spans[r][step])] for r in alive])
        memory = Memory(tuple(rows[r] for r in alive), empty.fingerprint)
        _, call = compressor.live(memory).ahead(mask, compressor.adapter)
        states = compressor.body(input_ids=ids, **call).last_hidden_state
        states = states.to(out.device)
        for place, r in enumerate(alive):
            out[r, slice(*spans[r][step])] = states[place, mask[place]]
        more = [place for place, r in enumerate(alive) if step + 1 < len(spans[r])]
        if not more:
            continue
        held = Memory(tuple(_cut(rows[alive[place]], n) for place in more), empty.fingerprint)
        made = blocks(compressor, held, ids[more], mask[more], n)
        for place, block in zip(more, made, strict=True):
            r = alive[place]
            rows[r] = compressor._fold(replace(rows[r], segments=(int(mask[place].sum()),)), block, 0)
    return out


def _cut(row: Row, n: int) -> Row:
    """What the next fold reads: gradients go on to the newest block at most, at every second fold to none."""
    if not TRUNCATE:
        return row
    old = row.slots.length - (n if row.steps % TRUNCATE else 0)
    parts = (torch.cat([part[:, :, :old].detach(), part[:, :, old:]], dim=2) for part in row.slots)
    return replace(row, slots=KV(*parts))


def _left_padded(segments: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, segments))
    ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in segments])
    mask = torch.stack([torch.arange(width, device=ids.device) >= width - len(s) for s in segments])
    return ids, mask
