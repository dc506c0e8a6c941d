"""From last hidden states to logits, by the model's own forward pass: some families scale or cap them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from .segments import Layout


class _Given(nn.Module):
    """Stands in for everything before the head: the hidden states are given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return _Output((inputs_embeds,))


class _Output(tuple[Tensor]):
    """What a decoder returns when it returns last hidden states and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """A shallow copy of a model that is given last hidden states; other threads find the model itself whole."""
    headed = copy.copy(model)
    before = dict.fromkeys((model.base_model_prefix, "encoder", "decoder"), _Given())
    headed.__dict__["_modules"] = {**model._modules, **before}
    return headed


def run_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) from last hidden states (..., d)."""
    headed = head_of(model)
    rows = hidden.unsqueeze(0) if hidden.ndim == 2 else hidden
    given = {"decoder_inputs_embeds": rows} if model.config.is_encoder_decoder else {}
    logits: Tensor = type(model).forward(headed, inputs_embeds=rows, use_cache=False, **given).logits
    return logits.squeeze(0) if hidden.ndim == 2 else logits


@dataclass(frozen=True)
class ParallelOutput:
    """What one parallel pass gives.

    Attributes:
        logits: (B, Q, V) on the grid of ``layout``.
        layout: where each token of each segment is.
    """

    logits: Tensor
    layout: Layout

    def segment_logits(self, row: int, index: int) -> Tensor:
        """(T_segment, V), equal to the recurrent logits of that segment."""
        start, stop = self.layout.spans[row][index]
        return self.logits[row, start:stop]

    @property
    def loss(self) -> Tensor:
        """Mean next-token cross-entropy, nats, inside every segment but the first of each row."""
        logits, targets = [], []
        for row, spans in enumerate(self.layout.spans):
            for index, (start, stop) in enumerate(spans):
                if index or len(spans) == 1:
                    logits.append(self.segment_logits(row, index)[:-1])
                    targets.append(self.layout.input_ids[row, start + 1 : stop])
        if not sum(map(len, targets)):
            raise ConfigError("no loss: every scored segment has one token; give segments of two or more")
        return nn.functional.cross_entropy(torch.cat(logits).float(), torch.cat(targets))
