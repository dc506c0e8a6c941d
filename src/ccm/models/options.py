"""Which model, where it runs and in which type: one set of options for every command and for ``load_model``.

A command takes the options below by these very annotations and makes a :class:`Loading` of them, which is plain
values and can travel to another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from .placement import AUTO, OWN, Placement, check_names, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder or hub id of a causal language model, or a .gguf file.",
        show_default="embedded",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="Where it runs: auto, cpu, cuda, cuda:1, mps; auto takes a GPU.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Of its weights: auto, float32, bfloat16, float16; auto takes bfloat16 on a GPU.",
    ),
]
LoadIn = Annotated[
    str | None,
    typer.Option("--load-in", metavar="4bit or 8bit", help="Quantize its weights.", show_default="no"),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="WAY",
        help="Spread its layers over several GPUs: auto, balanced, sequential.",
        show_default="no",
    ),
]
DecodeIn = Annotated[
    str,
    typer.Option(
        "--decode-in",
        metavar="TYPE",
        help="Write answers from its weights (model), from a copy in float16 or int8, or by a CUDA graph (graph); "
        "auto takes float16 for small models on an x86 processor.",
    ),
]


@dataclass(frozen=True)
class Loading:
    """A model as it was asked for.

    Attributes:
        model: folder, GGUF file or hub id; None is the embedded one.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        dtype: of the weights, one of :data:`~ccm.models.placement.DTYPES`.
        load_in: None, "4bit" or "8bit".
        device_map: None, or one of :data:`~ccm.models.placement.DEVICE_MAPS`.
        decode_in: one of :data:`~ccm.models.placement.DECODE_IN`.
    """

    model: str | None = None
    device: str = AUTO
    dtype: str = AUTO
    load_in: str | None = None
    device_map: str | None = None
    decode_in: str = OWN

    def check_names(self) -> None:
        """Raises what can be told at once, before torch is imported (see ``placement.check_names``)."""
        check_names(self.model, self.dtype, self.device, self.load_in, self.device_map, self.decode_in)

    def check(self) -> Placement:
        """Where this would go; nothing is loaded. Raises as ``place``."""
        return place(self.model, self.dtype, self.device, self.load_in, self.device_map, self.decode_in)

    def load(self, spinner: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, in eval mode and without gradients, and its tokenizer. Raises as ``load_model``."""
        from .load import load_model

        return load_model(
            self.model,
            self.dtype,
            self.device,
            load_in=self.load_in,
            device_map=self.device_map,
            decode_in=self.decode_in,
            spinner=spinner,
        )
