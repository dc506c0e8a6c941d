"""The model in transformers beside llama.cpp: its weights stay in their files until something asks for them."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.memory import KV
from ...core.reader import Reader
from ...errors import ConfigError, UnsupportedModelError
from ...files.fingerprint import remember
from ...models.header import read_once
from ...models.hollow import is_hollow, own_parameters
from ...models.load import gguf_file, load_hollow
from ...models.placement import is_default
from ..weights import Weights, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...models.options import Loading

log = logging.getLogger(__name__)

#: Keys, values and weights of another model differ from the expected ones by more than all of their size, those of
#: the same model in 2 bits by less than this share of it.
SAME = 0.5
#: Norms and biases are not quantized: in bfloat16 and float16 they differ by less than this share.
ROUNDED = 0.02


def load(loading: Loading, spinner: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without its weights, and its tokenizer; with them where they lie in another way than is known here.

    Raises: as :meth:`ccm.models.options.Loading.load`.
    """
    if loading.load_in is None and loading.device_map is None:
        try:
            with read_once():
                model, tokenizer, files = load_hollow(
                    loading.model, loading.dtype, loading.device, spinner=spinner
                )
                weights = weights_of(files, model)
            remember(model, (sample for _, sample in weights.samples()))
            model.ccm_files, model.ccm_weights = files, weights
            return model, tokenizer
        except UnsupportedModelError as error:
            log.info("the whole model is loaded beside llama.cpp: %s", error)
    return loading.load(spinner)


def read(reader: Reader, path: str, ids: Sequence[int]) -> KV:
    """What a model makes of a text, to be compared with what llama.cpp makes of it.

    Args:
        reader: with or without weights.
        path: the file that llama.cpp has.
        ids: of the text, T tokens.

    Returns:
        position-free keys and values (l, H, T, D): of a model without weights, whose first layers come for this,
        of so many layers as show all ways in which its keys turn; else of all layers.

    Raises:
        ConfigError: the weights in the file are another model's.
    """
    model = reader.model
    if is_hollow(model):
        try:
            # opened once: the header of a GGUF file takes a second to read
            files = model.__dict__.pop("ccm_weights", None) or weights_of(model.ccm_files, model)
            name = model.config._name_or_path
            # those of the embedded model were made from its GGUF file
            if not os.path.samefile(gguf_file(name) if is_default(name) else model.ccm_files, path):
                _check_alike(path, files, weights_of(path, model))
            first = _first_layers(reader)
            with model.ccm_hollow.partly(_needed(first, files, ids)):
                (text,) = first.read([list(ids)])
            return text
        except UnsupportedModelError as error:
            log.info("the whole model is loaded to be compared with %s: %s", path, error)
            model.ccm_hollow.fill()
    (text,) = reader.read([list(ids)])
    return text


def _check_alike(path: str, ours: Weights, theirs: Weights) -> None:
    """Raises ConfigError unless the weights are the same in every layer but for their rounding."""
    layers: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}
    for most, own_parts, other_parts in (
        (SAME, ours.samples(), theirs.samples()),
        (ROUNDED, ours.vectors(), theirs.vectors()),
    ):
        for (name, own), (_, other) in zip(own_parts, other_parts, strict=True):
            layer = re.match(r".*?\.\d+(?=\.)", name)
            layers.setdefault((layer[0] if layer else name, most), []).append((own.float(), other.float()))
    for (where, most), pairs in layers.items():
        expected, got = (torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True))
        size, error = float(expected.norm()), float((got - expected).norm())
        if not error <= most * size:
            raise ConfigError(
                f"--llama {path}: it is not the model that the memory is for (weights of {where} differ by "
                f"{error:.2g}, and are of size {size:.2g}): give the GGUF file of that model"
            )


def _first_layers(reader: Reader) -> Reader:
    """A reader whose passes end at the keys and values of the last layer that shows something new."""
    kinds = reader.rotary.layer_types
    count = max(kinds.index(kind) for kind in set(kinds)) + 1
    first, first.rotary = copy.copy(reader), copy.copy(reader.rotary)
    first.rotary.layer_types = kinds[:count]
    first.family = replace(reader.family, attention=reader.family.attention[:count])
    return first


def _needed(first: Reader, files: Weights, ids: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The weights that such a pass reads: of its layers, and the embeddings of its tokens."""
    *before, last = first.family.attention
    whole = tuple(name.rsplit(".", 1)[0] + "." for name in before)
    table = first.model.get_input_embeddings().weight
    for name, parameter in own_parameters(first.model).items():
        # of the last layer attention alone, and norms
        if parameter is table:
            rows = torch.empty(table.shape)  # what is not written takes no memory
            rows[list(ids)] = files.rows(name, ids).float()
            yield name, rows
        elif name.startswith((*whole, last + ".")) or (
            name.startswith(last.rsplit(".", 1)[0] + ".") and parameter.ndim == 1
        ):
            yield name, files.tensor(name)
