"""What a press of NVIDIA's kvpress leaves of a history, in transformers."""

from __future__ import annotations

from typing import ClassVar

import torch
from transformers import DynamicCache

from ...core.room import CACHE
from ..sizes import ENTRIES
from .transformers import Full


class Pressed(Full):
    """SnapKV to as many entries as the memory has, and a cache of everything behind them.

    The keys are turned to where they stand among the entries, so that what follows counts on from there.
    """

    name = "kvpress"
    packages: ClassVar[tuple[str, ...]] = (*Full.packages, "kvpress")
    reads = True

    def take(self, ids: list[int]) -> None:
        from kvpress import KeyRerotationPress, SnapKVPress

        self.cache = DynamicCache()
        press = KeyRerotationPress(SnapKVPress(compression_ratio=max(0.0, 1 - ENTRIES / len(ids))))
        text = torch.tensor([ids], device=self.device)
        place = torch.arange(
            len(ids), device=self.device
        )  # transformers no longer says it, a press asks for it
        with press(self.model):
            self.model(text, cache_position=place, logits_to_keep=1, **{CACHE: self.cache})
