"""The fingerprint and the rotary embedding of a model that lies in files, without loading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...core.families import get_family
from ...core.rotary import Rotary
from ...core.twin import text_config
from ...errors import UnsupportedModelError
from ...files.fingerprint import fingerprint_of, sampled_rows
from ...models.load import random_model


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
        return fingerprint_of(self.model, self._samples())

    def _samples(self) -> Iterator[Tensor]:
        """A few rows of every matrix, in the order of the model."""
        with ExitStack() as stack:
            matrices: dict[str, Any] = {}
            for path in sorted(self._folder().glob("*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="pt"))
                matrices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            parameters = {name: p for name, p in self.model.named_parameters() if p.ndim == 2}
            others = {name: matrix for name, matrix in matrices.items() if name not in parameters}
            for name, parameter in parameters.items():
                matrix = matrices.get(name) or self._renamed(name, parameter, others)
                rows = range(*sampled_rows(len(parameter)).indices(len(parameter)))
                yield torch.cat([matrix[row : row + 1, :16] for row in rows])

    def _renamed(self, name: str, parameter: Tensor, others: dict[str, Any]) -> Any:
        """The matrix that has another name in the files, as transformers writes some of them."""
        fitting = [matrix for matrix in others.values() if matrix.get_shape() == list(parameter.shape)]
        if len(fitting) != 1:
            raise UnsupportedModelError(
                f"{self.name} has no {name} among its safetensors: memories belong to the plain model; serve that "
                "one, not a quantized or converted copy"
            )
        return fitting[0]

    def _folder(self) -> Path:
        folder = Path(self.name)
        return folder if folder.is_dir() else Path(snapshot_download(self.name, local_files_only=True))
