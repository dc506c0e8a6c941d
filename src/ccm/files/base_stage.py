"""The paper's first stage as a PEFT folder: a LoRA that tunes the base model on all tokens."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.devices import is_spread
from ..errors import ConfigError, MismatchError, StorageError
from .atomic import write_atomically
from .fingerprint import model_fingerprint

#: Where an adapter folder keeps it, and its name among the model's adapters.
FOLDER, NAME = "base", "base"

#: Attributes of a model that say which first stage it has, and that it is in the model's own weights.
_PRESENT, _MERGED = "_ccm_base_stage", "_ccm_base_stage_merged"


def attach(model: PreTrainedModel, name: str | os.PathLike[str]) -> list[nn.Parameter]:
    """Load a first stage into the model, active on all tokens; returns its parameters.

    A model that has this one already keeps it, so several compressors can share it.

    Raises:
        ConfigError: there is no such folder or hub id, or it is damaged.
        MismatchError: it does not fit the model, or the model has other adapters.
    """
    folder = _find(name)
    try:
        digest = _digest(load_file(folder / "adapter_model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"base adapter {name}: {folder} is incomplete or damaged ({error})") from error
    if present(model) != digest:
        if getattr(model, "peft_config", None):
            raise MismatchError(
                f"base adapter {name}: the model has adapters already; load it again without any"
            )
        try:
            PeftModel.from_pretrained(model, str(folder), adapter_name=NAME)
        except (ValueError, TypeError, OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise MismatchError(
                f"base adapter {name} does not fit {type(model).__name__} ({str(error).splitlines()[0]}); "
                "load the model that it was trained for"
            ) from error
        model.__dict__[_PRESENT] = digest
    return [p for n, p in model.named_parameters() if "lora_" in n and f".{NAME}." in n]


def merge(model: PreTrainedModel) -> None:
    """Add the first stage to the model's own weights: half the work of a pass, rounded as their dtype is.

    Its matrices stay where they are, closed, so that it can still be saved and other adapters can still be loaded
    (PEFT's own merging is undone, with rounding, by the next adapter). Weights that are quantized or spread
    over devices stay as they are, beside it.
    """
    if model.__dict__.get(_MERGED) or getattr(model, "is_quantized", False) or is_spread(model):
        return
    model_fingerprint(model)  # of the weights as they were; the model keeps it
    for module in model.modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            module.get_base_layer().weight.data += module.get_delta_weight(NAME)
            module.set_adapter([])
            for parameter in trained:
                parameter.requires_grad_(True)
    model.__dict__[_MERGED] = True


def present(model: PreTrainedModel) -> str | None:
    """A hash of the first stage that the model has, if it has one."""
    return model.__dict__.get(_PRESENT)


def save(model: PreTrainedModel, folder: Path, adapter: str = NAME) -> None:
    """Write a model's first stage as a PEFT folder, in the dtype that it has.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / "adapter_model.safetensors", to_bytes(weights(model, adapter), {"format": "pt"})
        )
        model.peft_config[adapter].save_pretrained(folder)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


@torch.no_grad()
def weights(model: PreTrainedModel, adapter: str) -> dict[str, Tensor]:
    """An adapter's LoRA weights by the names that PEFT gives them in files."""
    prefix = "base_model.model."
    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {
        name if name.startswith(prefix) else prefix + name: weight.contiguous().cpu()
        for name, weight in found.items()
    }


def _digest(lora: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(lora):
        sha.update(name.encode() + lora[name].float().numpy().tobytes())
    return sha.hexdigest()


def _find(name: str | os.PathLike[str]) -> Path:
    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub client raises many kinds
        raise ConfigError(
            f"no base adapter {str(name)!r}: not a folder with adapter_config.json, and not on the hub"
        ) from error
