"""Models whose layers are on several devices: where their keys and values are, and how tensors follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError


def is_spread(model: PreTrainedModel) -> bool:
    """Whether its layers are on several devices, or on none until they run."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def layer_devices(model: PreTrainedModel, attention: Sequence[str]) -> list[torch.device]:
    """Where the keys and values of each layer are; empty if that is the same place for all.

    Raises:
        ConfigError: the embeddings are on no device.
    """
    if not is_spread(model):
        return []
    if model.device.type == "meta":
        raise ConfigError(
            "the device map keeps the embeddings on no device: give them one, such as 0 or 'cpu'"
        )
    held = [next(model.get_submodule(name.rsplit(".", 1)[0]).parameters()).device for name in attention]
    return [model.device if device.type == "meta" else device for device in held]  # those run on the first


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a structure of tensors, on another device."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
