"""The weights of a model where they lie, in files: some of their rows, or one tensor, without loading the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..files.fingerprint import COLUMNS, sampled_rows
from ..models.placement import is_gguf


class Weights(ABC):
    """Of a model, by the names of its parameters.

    Args:
        name: the file, or the folder or hub id, which are named in errors.
        model: of this shape, wherever its own weights are.

    Raises:
        UnsupportedModelError: the files hold them in another way than is known here.
    """

    def __init__(self, name: str, model: PreTrainedModel):
        self.name = name
        self.shapes = {
            n.replace(".base_layer", ""): p.shape for n, p in model.named_parameters() if "lora_" not in n
        }

    @abstractmethod
    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Rows (R, d) of a matrix."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A whole parameter."""

    def samples(self) -> Iterator[tuple[str, Tensor]]:
        """What fingerprints are made of: name and sample of every matrix, in the order of the model."""
        for name, shape in self.shapes.items():
            if len(shape) == 2:
                yield name, self.rows(name, range(*sampled_rows(shape[0]).indices(shape[0])))[:, :COLUMNS]

    def vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every vector, norms above all, in the order of the model."""
        return ((name, self.tensor(name)) for name, shape in self.shapes.items() if len(shape) == 1)

    def missing(self, name: str) -> UnsupportedModelError:
        """The error for a parameter that is not there as the model has it."""
        return UnsupportedModelError(
            f"{self.name} has no {name} among its weights: memories belong to the plain model; take that one, not a "
            "quantized or converted copy"
        )


class Safetensors(Weights):
    """Of a folder, or of a hub id that was downloaded before."""

    def __init__(self, name: str, model: PreTrainedModel):
        super().__init__(name, model)
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(snapshot_download(name, local_files_only=True))
        self._slices: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._slices |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        found = self._find(name)
        return torch.cat([found[row : row + 1] for row in rows])

    def tensor(self, name: str) -> Tensor:
        whole: Tensor = self._find(name)[:]
        return whole

    def _find(self, name: str) -> Any:
        """Under its name, or the only one of its shape that has another name, as transformers writes some."""
        if name in self._slices:
            return self._slices[name]
        shape = list(self.shapes[name])
        others = [part for key, part in self._slices.items() if key not in self.shapes]
        fitting = [part for part in others if part.get_shape() == shape]
        if len(fitting) != 1:
            raise self.missing(name)
        return fitting[0]


class Gguf(Weights):
    """Of a GGUF file, as transformers would load them: by its names, and its order of rows."""

    def __init__(self, name: str, model: PreTrainedModel):
        super().__init__(name, model)
        try:  # how transformers reads such files is not its public interface
            import gguf
            from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

            reader = gguf.GGUFReader(name)
            architecture = str(reader.fields["general.architecture"].contents())
            known = next(arch for arch, each in gguf.MODEL_ARCH_NAMES.items() if each == architecture)
            config = model.config.to_dict()
            self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
            names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
        except (ImportError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"{name}: its weights are stored in another way ({error})") from error
        self._dequantize = gguf.quants.dequantize
        parts = {part.name: part for part in reader.tensors}
        stored = {each: names.get_name(each, try_suffixes=(".weight", ".bias")) for each in self.shapes}
        self._parts = {each: parts[found] for each, found in stored.items() if found in parts}
        mapping = {part.name: each for each, part in self._parts.items()}
        self._given = {"tensor_key_mapping": mapping, "parsed_parameters": {"config": config, "tensors": {}}}

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        part = self._find(name)
        order = self._processed(name, np.arange(self.shapes[name][0], dtype=np.float64)[:, None])[:, 0]
        if len(order) != len(part.data) or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise self.missing(name)
        stored = part.data[order[list(rows)].astype(np.int64)]
        return torch.from_numpy(np.array(self._dequantize(stored, part.tensor_type)))

    def tensor(self, name: str) -> Tensor:
        part = self._find(name)
        whole = self._processed(name, self._dequantize(part.data, part.tensor_type))
        if whole.shape != tuple(self.shapes[name]):
            raise self.missing(name)
        return torch.from_numpy(np.array(whole))

    def _processed(self, name: str, weights: NDArray[Any]) -> NDArray[Any]:
        """As transformers turns what is stored under this name into the parameter."""
        part = self._find(name)
        done = self._processor.process(weights=weights, name=part.name, **self._given)
        if done.name != part.name or np.ndim(done.weights) != np.ndim(weights):
            raise self.missing(name)
        made: NDArray[Any] = done.weights
        return made

    def _find(self, name: str) -> Any:
        if name not in self._parts:
            raise self.missing(name)
        return self._parts[name]


def weights_of(name: str, model: PreTrainedModel) -> Weights:
    """The files of a model; raises UnsupportedModelError if they hold it in another way than is known here."""
    return (Gguf if is_gguf(name) else Safetensors)(name, model)
