"""An adapter as a folder: PEFT's two files, the COMP embeddings (or a pooling), and ``ccm_config.json``.

A folder whose ``ccm_config.json`` names another adapter as its ``weights`` has settings of its own and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from .. import hub
from ..core.config import CompressorConfig
from ..errors import ConfigError, MismatchError, StorageError, UnknownNameError
from . import base_stage
from .atomic import write_atomically
from .fingerprint import base_name, model_fingerprint, shape_fingerprint, vocabulary_of

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent.parent / "adapters"
#: What may differ from the way an adapter was trained.
CHANGEABLE = ("slots", "rule", "rule_options", "sink", "window")
#: Settings of the past that adapters may name, at the one value that is left.
RETIRED = {"comp_positions": "after", "conditional": True}


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds.

    Attributes:
        config: settings.
        lora: weights by PEFT's names.
        slots: what makes slots beside the LoRA, by name: ``comp_embeddings`` (n, d), or ``pooling``.
        base: folder of a first stage, if there is one.
    """

    config: CompressorConfig
    lora: dict[str, Tensor]
    slots: dict[str, Tensor]
    base: Path | None


def save(
    folder: Path,
    model: PreTrainedModel,
    adapter: str,
    config: CompressorConfig,
    slots: dict[str, Tensor],
    *,
    tuned: bool,
    dtype: torch.dtype,
) -> None:
    """See :meth:`ccm.Compressor.save_pretrained`; ``tuned`` says whether there is a first stage."""
    lora = {name: weight.to(dtype) for name, weight in base_stage.weights(model, adapter).items()}
    base: dict[str, Any] = {"name": base_name(model), "fingerprint": model_fingerprint(model)}
    base["vocabulary"] = vocabulary_of(model)  # an adapter fits whatever tokens are added
    stages = {"base_adapter": True} if tuned else {}
    settings = json.dumps({"base_model": base, **stages, **asdict(config)}, indent=2) + "\n"
    peft_config = model.peft_config[adapter]
    peft_config.base_model_name_or_path = base_name(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tuned:
            base_stage.save(model, folder / base_stage.FOLDER)
        write_atomically(folder / "adapter_model.safetensors", to_bytes(lora, {"format": "pt"}))
        for name, weights in slots.items():
            write_atomically(folder / f"{name}.safetensors", to_bytes({name: weights}))
        peft_config.save_pretrained(folder)
        write_atomically(folder / "ccm_config.json", settings.encode())
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def read(
    name: str | os.PathLike[str],
    model: PreTrainedModel,
    changes: dict[str, Any],
    kind: str = "ccm",
    part: str = "comp_embeddings",
) -> AdapterFiles:
    """The files of an adapter of one kind for ``model``, with some settings changed; ``part`` is its own file.

    Raises:
        ConfigError: there is no such adapter, it is of another kind or damaged, or a change is not possible.
        MismatchError: it was trained for another model, or written by another version of this library.
    """
    folder = find(name)
    try:
        config, base, two_stages, weights = _settings(folder)
        if config.kind != kind:
            raise MismatchError(
                f"adapter {name} is of kind {config.kind!r}, expected {kind!r}; a baseline opens by the method of "
                "its kind, get_method(kind, adapter=name), an adapter of CCM by ccm-concat"
            )
        folder = find(weights) if weights else folder
        tuned = folder / base_stage.FOLDER if two_stages else None
        lora = load_file(folder / "adapter_model.safetensors")
        slots = {part: load_file(folder / f"{part}.safetensors")[part]}
        fingerprint, trained_on = base["fingerprint"], base["name"]
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"adapter {name}: {folder} is incomplete or damaged ({error})") from error
    if unknown := set(changes) - set(CHANGEABLE):
        raise UnknownNameError("setting of a trained adapter", unknown.pop(), list(CHANGEABLE))
    if changes.get("rule", config.rule) != config.rule:
        changes = {"rule_options": {}, **changes}  # those of the adapter's own rule mean nothing to another
    config = replace(config, **changes)
    width = model.get_input_embeddings().weight.shape[1]
    trained_width = width
    if (comp := slots.get("comp_embeddings")) is not None:
        if config.slots > len(comp):
            raise ConfigError(f"adapter {name} has {len(comp)} slots per segment, got slots={config.slots}")
        trained_width = comp.shape[1]
    shape = shape_fingerprint(model, base.get("vocabulary"))
    if trained_width != width or fingerprint.split(".")[0] != shape:
        what = "" if trained_width != width else ", and other layers, heads, tokens or another family"
        raise MismatchError(
            f"adapter {name} is for {trained_on} (hidden size {trained_width}), "
            f"got {base_name(model)} (hidden size {width}{what}); load that model, train an adapter for this one, "
            "or take a memory that needs no training"
        )
    if fingerprint != model_fingerprint(model):
        log.warning("adapter %s was trained on other weights of %s; quality may differ", name, trained_on)
    return AdapterFiles(config, lora, slots, tuned)


def is_for(name: str, model: PreTrainedModel) -> bool:
    """Whether an adapter was trained on this very model; of one on no device, on one of its shape."""
    own = shape_fingerprint(model) if model.device.type == "meta" else model_fingerprint(model)
    return str(_settings(find(name))[1]["fingerprint"]).startswith(own)


def read_config(name: str | os.PathLike[str]) -> CompressorConfig:
    """The settings of an adapter, whatever model it is for.

    Raises:
        ConfigError: there is no such adapter, or it is damaged.
        MismatchError: another version of this library wrote it.
    """
    folder = find(name)
    try:
        return _settings(folder)[0]
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"adapter {name}: {folder} is incomplete or damaged ({error})") from error


def _settings(folder: Path) -> tuple[CompressorConfig, dict[str, Any], bool, str | None]:
    """Settings, what is known of the base model, whether there is a first stage, and whose weights it has."""
    settings = json.loads((folder / "ccm_config.json").read_text())
    base, two_stages = settings.pop("base_model"), settings.pop("base_adapter", False)
    weights = settings.pop("weights", None)
    for name, left in RETIRED.items():
        if (value := settings.pop(name, left)) != left:
            raise MismatchError(
                f"{folder}: {name} is {value!r}, only {left!r} is left; train the adapter anew"
            )
    if unknown := sorted(set(settings) - {field.name for field in fields(CompressorConfig)}):
        raise MismatchError(
            f"{folder} was written by a newer ccm: it sets {', '.join(unknown)!r}; read it with that version"
        )
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = tuple(settings["target_modules"])
    return CompressorConfig(**{"sink": 0, **settings}), base, two_stages, weights


def has_first_stage(name: str | os.PathLike[str]) -> bool:
    """Whether an adapter tunes the model itself before it folds; raises as :func:`read_config`."""
    return _settings(find(name))[2]


def first_stage(name: str | os.PathLike[str]) -> Path:
    """The folder of an adapter's first stage.

    Raises:
        ConfigError: there is no such adapter, or it has none.
    """
    folder = find(name) / base_stage.FOLDER
    if not folder.is_dir():
        raise ConfigError(f"adapter {name} has no first stage: it is for the plain model")
    return folder


def shipped_adapters() -> list[str]:
    """Names of the adapters inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/ccm_config.json"))


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of an adapter: a folder, a shipped name, or a hub id (downloaded).

    Raises:
        ConfigError: it is none of the three.
    """
    for folder in (Path(name), SHIPPED / str(name)):
        if (folder / "ccm_config.json").is_file():
            return folder
    text = str(name)
    if "/" not in text and not Path(text).expanduser().exists():
        raise ConfigError(
            f"no adapter {text!r}: not a folder here, and none of the shipped {', '.join(shipped_adapters())}; "
            "one of the hub is written ORGANISATION/NAME"
        )
    if hub.is_folder(text, "adapter", "ccm_config.json"):
        return Path(text).expanduser()
    online = hub.is_online(text, "adapter", "ccm_config.json")
    try:
        return Path(snapshot_download(text, local_files_only=not online))
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"no adapter {text!r}: no such folder here, and the hub has none ({reason})"
        ) from error
