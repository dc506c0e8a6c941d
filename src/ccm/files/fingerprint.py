"""What a model is, in short: name, shape and a sample of its weights; and who made a memory, in words.

A memory's fingerprint is MODEL-MAKER, and the maker an adapter's hash or a method's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..core.twin import text_config
from ..errors import MismatchError

#: Columns of a weight matrix that are hashed.
COLUMNS = 16


def base_name(model: PreTrainedModel) -> str:
    """The model's name without any folder of this machine."""
    return Path(model.config._name_or_path).name or type(model).__name__


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Tokens of the model, as its config says."""
    size: int | None = getattr(text_config(model.config), "vocab_size", None)
    return size


def shape_fingerprint(model: PreTrainedModel, vocabulary: int | None = None) -> str:
    """A short hash of the model's shape; with another ``vocabulary``, of what it is without tokens added since."""
    config = text_config(model.config)
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    shape = [getattr(config, name, None) for name in names]
    shape.append(vocabulary_of(model) if vocabulary is None else vocabulary)
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:8]


def model_fingerprint(model: PreTrainedModel) -> str:
    """Shape and a sample of the weights, hashed once; the same in fp32 and bf16."""
    known = model.__dict__.get("_ccm_fingerprint")
    if known is None:
        with torch.no_grad():
            samples = (
                _plain(model, name)[sampled_rows(len(parameter)), :COLUMNS]
                for name, parameter in model.named_parameters()
                if "lora_" not in name and parameter.ndim == 2
            )
            known = remember(model, samples)
    return known


def remember(model: PreTrainedModel, samples: Iterable[Tensor]) -> str:
    """Let a model know its fingerprint, from samples of its matrices in its order."""
    known = model.__dict__["_ccm_fingerprint"] = fingerprint_of(model, samples)
    return known


def _plain(model: nn.Module, name: str) -> Tensor:
    """A parameter of which rows can be taken: torchao's quantized ones as floats, those on no device from where they
    are kept."""
    module = model.get_submodule(name.rpartition(".")[0])
    with align_module_device(module):
        parameter = module.get_parameter(name.rpartition(".")[2])
        return parameter.dequantize() if is_traceable_wrapper_subclass(parameter) else parameter.data


def sampled_rows(rows: int) -> slice:
    """The rows of a weight matrix whose first :data:`COLUMNS` columns are hashed."""
    return slice(None, None, max(1, rows // 4))


def fingerprint_of(model: PreTrainedModel, samples: Iterable[Tensor]) -> str:
    """The fingerprint of a model of this shape with these samples of its matrices, in its order."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return f"{shape_fingerprint(model)}.{sha.hexdigest()[:16]}"


def made_by(fingerprint: str) -> str:
    """A fingerprint in words; of a model alone, if there is no maker in it."""
    model, _, maker = fingerprint.partition("-")
    return f"model {model} and {_words(maker)}" if maker else f"model {model}"


def mismatch(got: str, expected: str) -> MismatchError:
    """The error for a memory that another model, adapter or method made.

    Args:
        got: fingerprint of the memory.
        expected: fingerprint of what was to read it.
    """
    (model, _, maker), (own_model, _, own) = got.partition("-"), expected.partition("-")
    if model != own_model:
        reader, advice = made_by(expected), "load the model that made it"
    else:
        reader, advice = f"the same model and {_words(own)}", f"open it with {_words(maker)} (--memory)"
    return MismatchError(
        f"the memory was made by {made_by(got)}, this is {reader}; {advice}, or start a new memory"
    )


def _words(maker: str) -> str:
    """Of a packed memory the code is behind a hyphen."""
    return f"{'adapter' if re.fullmatch('[0-9a-f]{16}(-[a-z0-9]+)?', maker) else 'method'} {maker}"
