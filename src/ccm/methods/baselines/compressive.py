"""Compressive Transformer (Rae et al., ICLR 2020): a segment's own keys and values, compressed by a convolution.

A segment is read with the adapter beside Mem(t-1), and its keys and values are pooled over time into n slots
(``pooling``). Simplified: the convolution is depthwise (one learned curve of weights per layer, head, and keys or
values, a softmax over time) and shared by all chunks; a segment gives n slots whatever its length; no uncompressed
recent memory stays beside them; it is trained by the objective of CCM instead of reconstructing attention. A LoRA
on the tokens that are compressed takes the place of training all weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.config import CompressorConfig
from ...core.memory import KV, Memory
from ..base import register
from ..compressed import Trained
from .pooling import Pooling
from .recurrent import Baseline


class Pooled(Baseline):
    """h(t) from the keys and values of c(t) itself; there are no COMP tokens."""

    kind = "compressive"
    part = "pooling"

    def __init__(
        self,
        model: PreTrainedModel,
        config: CompressorConfig,
        base_adapter: str | os.PathLike[str] | None = None,
    ):
        super().__init__(model, config, base_adapter)
        del self.comp_embeddings
        self.pooling = Pooling(*self.kv_shape()[:2]).to(model.device)

    @property
    def slot_parameter(self) -> nn.Parameter:
        return self.pooling.curve

    def blocks(
        self, memory: Memory, ids: Tensor, mask: Tensor, n: int, keep: int | None = None
    ) -> list[tuple[KV, KV]]:
        texts = self.step(memory, ids, mask, None, gate=slice(0, None))
        return [(text.slice(0, keep), self.pooling.block(text, n)) for text, _ in texts]


@register("compressive")
@dataclass(frozen=True, kw_only=True)
class Compressive(Trained):
    """n pooled keys and values a segment (Rae et al., ICLR 2020, arXiv 1911.05507)."""

    made_by: ClassVar[type[Baseline]] = Pooled
