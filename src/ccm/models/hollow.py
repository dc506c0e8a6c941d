"""A model without its weights: all else is there, and they come when a pass asks for them.

Where another engine runs the model, the one in transformers says what it is: its config, its sizes, its positions.
Its parameters have shape, type and device, and no memory: each is one number, NaN, seen again and again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def hollow(
    make: Callable[[], PreTrainedModel], device: torch.device, load: Callable[[], PreTrainedModel]
) -> Any:
    """A model without weights.

    Args:
        make: makes it with any weights.
        device: where they would be.
        load: makes it with its own, for the first pass through it.
    """
    with init_empty_weights():
        model = make()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(nothing.expand(parameter.shape), False)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        model.get_buffer(name).data = buffer.to(device)
    model.ccm_hollow = Filler(model, load)
    return model.eval()


def is_hollow(model: PreTrainedModel) -> bool:
    """Whether a model is without its weights now."""
    filler = getattr(model, "ccm_hollow", None)
    return filler is not None and not filler.filled


class Filler:
    """Brings the weights at the first pass.

    Attributes:
        filled: whether they are there.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedModel]):
        self.filled = False
        self._model, self._load, self._lock = model, load, threading.RLock()
        # a pass begins at one of these: embeddings, the whole, the decoder alone, or the head alone
        entries = {model, model.base_model, model.get_input_embeddings(), model.get_output_embeddings()}
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._first) for module in entries if module is not None
        ]

    def _first(self, module: nn.Module, args: Any) -> None:
        with self._lock:
            if not self.filled:
                self.fill()

    def fill(self) -> None:
        """Load the weights now."""
        parameters = own_parameters(self._model)
        size = sum(parameter.numel() * parameter.itemsize for parameter in parameters.values())
        log.warning("the model's weights are asked for in torch, and loaded now: %.1f GB", size / 1e9)
        with torch.inference_mode(False):
            whole = own_parameters(self._load())
        for name, parameter in parameters.items():
            parameter.data = whole[name].data
        for hook in self._hooks:
            hook.remove()
        self.filled = True

    @contextmanager
    def partly(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Run a block with these weights alone; what else it reads is NaN."""
        parameters = own_parameters(self._model)
        before = {}
        with self._lock:
            self.filled = True
            try:
                for name, weight in weights:
                    parameter = parameters[name]
                    before[name] = parameter.data
                    parameter.data = weight.to(parameter.device, parameter.dtype)
                yield
            finally:
                for name, data in before.items():
                    parameters[name].data = data
                self.filled = False


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the model itself, by the names that they have without adapters."""
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
