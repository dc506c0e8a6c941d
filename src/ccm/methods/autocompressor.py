"""AutoCompressor (Chevalier et al., EMNLP 2023), a recurrent summary memory; see ``ccm.soft_prompts``.

The last hidden states of n summary tokens are soft prompts for all that comes later; what is kept and read are their
keys and values. Simplified: a LoRA on the summarizing pass is trained instead of all weights; the base model, which
reads the soft prompts, is untouched, hence they are scaled to the size of its embeddings; segments are not cut at
random lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import register
from .compressed import Trained


@register("autocompressor")
@dataclass(frozen=True)
class AutoCompressor(Trained):
    """n soft prompts for every segment."""

    kind: ClassVar[str] = "autocompressor"
