"""The fingerprint and the rotary embedding of a model that lies in files, without loading it."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...core.families import get_family
from ...core.rotary import Rotary
from ...core.twin import text_config
from ...files.fingerprint import fingerprint_of
from ...models.load import random_model
from ..weights import Safetensors


class Checkpoint:
    """A model's shape and files.

    Args:
        name: folder or hub id; of a hub id what was downloaded before is used.
        config: its transformers config.

    Raises:
        UnsupportedModelError: the family cannot carry a memory.
    """

    def __init__(self, name: str, config: PretrainedConfig):
        self.name = name
        self.model: PreTrainedModel = random_model(config, "meta")
        self.family = get_family(self.model)

    def rotary(self, dtype: torch.dtype) -> Rotary:
        """Its rotary embedding on the CPU, as a model in ``dtype`` has it."""
        family = self.family
        rotary = Rotary(self.model, family.body, family.way, family.rotated)
        rotary.module = type(rotary.module)(config=text_config(self.model.config))
        rotary.dtype = dtype
        return rotary

    def fingerprint(self) -> str:
        """What :func:`ccm.core.reader.model_fingerprint` gives for the loaded model.

        Raises:
            UnsupportedModelError: its weights are not the plain safetensors of this model.
        """
        return fingerprint_of(
            self.model, (sample for _, sample in Safetensors(self.name, self.model).samples())
        )
