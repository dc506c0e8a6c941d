"""Several processes as one trainer, on accelerate's process group.

What is trained is small, so its gradients are summed in one all-reduce, with the losses and token counts of the
step beside them: the mean over tokens is exact whatever each process saw. The frozen model is copied ("ddp"), or its
layers are sharded and fetched when they run ("fsdp2"), which changes no number.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..core.devices import is_spread
from ..core.families import get_family
from ..errors import ConfigError, MissingPackageError
from .config import TrainConfig, flat


class Processes:
    """This process and the others of a run; alone, everything here does next to nothing.

    Args:
        config: the run.
        folder: where TensorBoard's files go.
        device: of this process; None takes an accelerator if there is one.

    Raises:
        ConfigError: ``torchrun`` started several processes that could not be joined.
        MissingPackageError: TensorBoard is asked for and not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device | None = None):
        if config.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise MissingPackageError(
                "tensorboard: true needs a package: pip install 'compressed-context-memory[train]'"
            )
        # without cpu=True accelerate starts no process group on machines without an accelerator
        self.accelerator = Accelerator(
            cpu=device.type == "cpu" if device else not torch.accelerator.is_available(),
            log_with="tensorboard" if config.tensorboard else None,
            project_dir=str(folder),
        )
        self.config = config
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.rank == 0
        self.device = device or self.accelerator.device
        if self.world != (wanted := int(os.environ.get("WORLD_SIZE", "1"))):
            raise ConfigError(
                f"{wanted} processes were started and {self.world} joined; start them with torchrun"
            )

    def main_first(self) -> AbstractContextManager[None]:
        """Inside, the first process of each machine goes through before the others."""
        return self.accelerator.local_main_process_first()

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, the same to the last bit in all of them."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def most(self, value: int) -> int:
        """The largest of a number over the processes."""
        if self.world == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place; a missing one counts as zero."""
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        joined = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(joined)
        for parameter, part in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def place(self, model: PreTrainedModel) -> None:
        """Put the model on this process's device, unless it was put where it belongs or will be sharded first."""
        if not (self.sharded or getattr(model, "is_quantized", False) or is_spread(model)):
            model.to(self.device)

    def shard(self, model: PreTrainedModel, trained: Sequence[nn.Parameter]) -> None:
        """Shard the decoder layers over the processes; what is trained, embeddings and head stay whole.

        Embeddings and head are called by themselves, outside the forward pass that gathers and frees shards.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        body = model.get_submodule(get_family(model).body)
        whole = {
            *trained,
            *model.get_input_embeddings().parameters(),
            *model.get_output_embeddings().parameters(),
        }
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        model.to(self.device)
        for parameter in trained:
            parameter.data = parameter.data.to(self.device)

    @property
    def sharded(self) -> bool:
        """Whether the frozen model is spread over the processes."""
        return self.config.parallel == "fsdp2" and self.world > 1

    # ------------------------------------------------------------------ curves

    def open_curves(self, step: int) -> None:
        """Begin or go on with TensorBoard's curves; points after ``step`` belong to a run that was killed."""
        if self.config.tensorboard:
            settings = {k: v for k, v in flat(self.config).items() if isinstance(v, int | float | str)}
            self.accelerator.init_trackers(
                "tensorboard", settings, init_kwargs={"tensorboard": {"purge_step": step + 1}}
            )

    def curve(self, report: dict[str, Any]) -> None:
        """Write a report to TensorBoard, if the run has it."""
        if self.config.tensorboard:
            self.accelerator.log(report, step=report["step"])

    def close(self) -> None:
        """Close the curves and leave the process group."""
        self.accelerator.end_training()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model of a supported family."""
    return [model.get_submodule(name.rsplit(".", 1)[0]) for name in get_family(model).attention]


def save_memory(model: PreTrainedModel) -> None:
    """Gradient checkpointing on; dropout stays off."""
    # older releases of transformers have the second name alone, at which newer ones warn
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in decoder_layers(model):
        layer.training = True  # of the layer alone: only this makes it checkpoint


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile norms and feed-forward blocks; attention takes a plan of Python objects and stays as it is."""
    for layer in decoder_layers(model):
        for child in layer.children():
            if not hasattr(child, "layer_idx"):
                child.compile(dynamic=True)
