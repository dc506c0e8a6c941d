"""Gisting, online (Mu et al., NeurIPS 2023; the baseline of CCM's authors): every segment becomes slots by itself.

The same COMP tokens and conditional LoRA as CCM-concat, but c(t) is compressed without sight of Mem(t-1), and the
blocks are put side by side. Simplified: the original tunes all weights; here a LoRA is trained, with the data,
objective and steps of CCM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import register
from .compressed import Trained


@register("gisting-online")
@dataclass(frozen=True)
class GistingOnline(Trained):
    """n slots for every segment, each compressed alone."""

    kind: ClassVar[str] = "gisting-online"
