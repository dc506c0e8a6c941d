"""From last hidden states to logits, by the model's own forward pass: some families scale or cap its logits."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


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


def run_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) from last hidden states (..., d)."""
    # a shallow copy, so that other threads find the model whole
    headed = copy.copy(model)
    headed.__dict__["_modules"] = {**model._modules, model.base_model_prefix: _Given()}
    rows = hidden.unsqueeze(0) if hidden.ndim == 2 else hidden
    logits: Tensor = type(model).forward(headed, inputs_embeds=rows, use_cache=False).logits
    return logits.squeeze(0) if hidden.ndim == 2 else logits
