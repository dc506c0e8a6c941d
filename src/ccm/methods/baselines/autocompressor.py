"""AutoCompressor (Chevalier et al., EMNLP 2023; Recurrent Memory Transformer, Bulatov et al. 2022): soft prompts.

    s(t)   = last hidden states of n summary tokens, read with the adapter after Mem(t-1) and c(t)
    h(t)   = keys and values of s(t), put in as embeddings behind Mem(t-1), by the base model
    Mem(t) = g_update(Mem(t-1), h(t)): concat accumulates summaries (AutoCompressors), replace keeps the last (RMT)

A summary is known only when the last layer of a pass has run, and goes in at the first of the next: the recursion
runs through the depth of the model as well as through time. Every loss reaches all summaries that it reads, and
through them at most two folds, as in the paper. Simplified: a LoRA on the summarizing pass is trained instead of all
weights; the base model, which reads the soft prompts, is untouched, hence they are scaled to the size of its
embeddings; segments are not cut at random lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.memory import KV, Memory
from ..base import register
from ..compressed import Trained
from .recurrent import Baseline


class SoftPrompts(Baseline):
    """h(t) from a summary of Mem(t-1) and c(t)."""

    kind = "autocompressor"
    rules = ("concat", "replace")
    truncate = 2

    def blocks(
        self, memory: Memory, ids: Tensor, mask: Tensor, n: int, keep: int | None = None
    ) -> list[tuple[KV, KV]]:
        behind = torch.cat([mask, mask.new_ones(len(ids), n)], dim=1)
        _, call = self.live(memory).ahead(behind, self.adapter, slice(0, None))
        words = self.model.get_input_embeddings()(ids)
        summary = self.comp_embeddings[:n].to(words.dtype).expand(len(ids), -1, -1)
        states = self.body(inputs_embeds=torch.cat([words, summary], dim=1), **call).last_hidden_state
        out = states[:, -n:].to(ids.device).float()
        # hidden states are many times as long as embeddings
        size = self.comp_embeddings.detach().square().mean().sqrt()
        prompts = out / out.square().mean(-1, keepdim=True).sqrt() * size
        none = ids[:, :0]
        return self.step(memory, none, none.bool(), prompts)


@register("autocompressor")
@dataclass(frozen=True, kw_only=True)
class AutoCompressor(Trained):
    """n soft prompts for every segment (Chevalier et al., EMNLP 2023, arXiv 2305.14788)."""

    made_by: ClassVar[type[Baseline]] = SoftPrompts
