"""Compressive Transformer (Rae et al., ICLR 2020): a segment's own keys and values, compressed by a convolution.

A segment is read with the adapter beside Mem(t-1), and its keys and values are pooled over time into n slots
(``ccm.pooling``). Simplified: the convolution is depthwise (one learned curve of weights per layer, head, and keys or
values, a softmax over time) and shared by all chunks; a segment gives n slots whatever its length; no uncompressed
recent memory stays beside them; it is trained by the objective of CCM instead of reconstructing attention. A LoRA
on the tokens that are compressed takes the place of training all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import register
from .compressed import Trained


@register("compressive")
@dataclass(frozen=True)
class Compressive(Trained):
    """n pooled keys and values for every segment."""

    kind: ClassVar[str] = "compressive"
