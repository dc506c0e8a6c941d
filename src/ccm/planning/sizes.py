"""What a conversation holds after some turns, from the model's shape alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..core.families import get_family
from ..core.twin import kv_shape, text_config
from ..decoding import SMALL
from ..decoding.products import copy_bytes
from ..errors import ConfigError
from ..files.adapter_folder import CHANGEABLE, read_config
from ..methods import Method
from ..methods.baselines import BASELINES
from ..methods.bits.packed import Packed
from ..methods.compressed import Trained
from ..methods.default import named, with_window
from ..methods.spec import Spec
from ..models.load import random_model
from ..models.placement import can_pack

#: Bits of a quantized weight: 4-bit ones share a float32 among 64, 8-bit ones one among a row.
BITS = {"4bit": 4.5, "8bit": 8}


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Attributes:
        layers, heads, size: of its keys and values; heads are KV heads.
        dtype: of the weights, of raw tokens and of the cache.
        parameters: their number.
        weight_bytes: of all of them.
        context: most positions.
        copy_bytes: of the copy of its weights that answers are decoded from on this device; 0 where none is made.
    """

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    parameters: int
    weight_bytes: int
    context: int
    copy_bytes: int = 0

    @classmethod
    def of(cls, config: Any, load_in: str | None = None, device: torch.device | None = None) -> Shape:
        """From a transformers config, its layers quantized if that is asked for.

        Raises:
            UnsupportedModelError: the model cannot carry a memory.
        """
        model = random_model(config, "meta")
        get_family(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        nbytes = count * model.dtype.itemsize
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        if load_in:
            head = model.get_output_embeddings()
            layers = (m for m in linear if m is not head)
            nbytes -= sum(m.weight.numel() * (8 * model.dtype.itemsize - BITS[load_in]) for m in layers) // 8
        copied = device is not None and not load_in and _is_copied(model, count, device)
        copy = sum(copy_bytes(*m.weight.shape) for m in linear) if copied else 0
        context = text_config(config).max_position_embeddings
        return cls(*kv_shape(config), model.dtype, count, int(nbytes), context, copy)

    def kv_bytes(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the keys and values of so many tokens or slots, in the model's type by default."""
        return 2 * self.layers * self.heads * self.size * (dtype or self.dtype).itemsize * tokens


def _is_copied(model: PreTrainedModel, count: int, device: torch.device) -> bool:
    """Whether answers are decoded from a copy of the weights, unless another way is asked for (``ccm.decoding``)."""
    small = count <= SMALL and model.dtype in (torch.float32, torch.bfloat16)
    return small and can_pack(device) and not model.config.is_encoder_decoder


@dataclass(frozen=True)
class Held:
    """What a memory holds.

    Attributes:
        sink, slots, window: their sizes.
        segments: token counts of the raw segments in the window, oldest first.
        folds: segments folded so far.
        tokens: seen so far.
        method: that made it.
    """

    sink: int
    slots: int
    window: int
    segments: tuple[int, ...]
    folds: int
    tokens: int
    method: Method

    @property
    def length(self) -> int:
        """Entries in all."""
        return self.sink + self.slots + self.window

    def nbytes(self, shape: Shape) -> int:
        """As ``Session.stats`` counts: slots are kept in fp32 or as codes, raw tokens in the model's type."""
        return self.slot_bytes(shape, torch.float32) + shape.kv_bytes(self.sink + self.window)

    def slot_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes of the slots in a type; of codes they are what they are."""
        width = self.method.width(shape.size)
        if width is None:
            return shape.kv_bytes(self.slots, dtype)
        return 2 * shape.layers * shape.heads * width * self.slots


def after(turns: int, tokens: int, method: Method) -> Held:
    """The memory after so many turns of so many tokens each, from the counts alone."""
    longest = method.longest
    lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)] * turns
    sink, slots, window = method.size(lengths)
    raw: list[int] = []
    while sum(raw) < window:
        raw.insert(0, min(lengths[-1 - len(raw)], window - sum(raw)))
    return Held(sink, slots, window, tuple(raw), len(lengths) - len(raw), sum(lengths), method)


def check_fits(held: Held, method: Method, shape: Shape) -> None:
    """Raises ConfigError unless the model's context has room for the memory, another segment and its COMP tokens."""
    if not held.length:
        raise ConfigError(
            f"method {method.name} keeps nothing, so there is nothing to plan: take another --memory"
        )
    needed = held.length + method.longest + method.behind
    if needed > shape.context:
        raise ConfigError(
            f"the memory would have {held.length} positions, with the next segment and its slots {needed}, and the "
            f"model's context is {shape.context}: plan fewer --turns, or a --memory that does not grow"
        )


def planned(spec: Spec, model: PreTrainedModel) -> Method:
    """A memory on a model, of which its sizes are wanted: an adapter may be one for another model.

    Raises:
        ConfigError: there is no such memory, or it keeps the whole history.
    """
    spec = named(spec, model)
    method = with_window(spec.method())
    if isinstance(method, Packed):
        inner = planned(Spec(method.of, method.of, method.options), model)
        return method.around(inner) if hasattr(inner, "reader") else method
    if not isinstance(method, Trained):  # its sizes are its own; a model without weights cannot be read
        return method if model.device.type == "meta" else method.bind(model)
    config = read_config(method.adapter or method.name)
    if config.kind in BASELINES and BASELINES[config.kind].whole:
        raise ConfigError(
            f"adapter {spec.name}: kind {config.kind!r} compresses a whole history at once, which no server can give "
            "it; plan another memory"
        )
    changes = {name: value for name in CHANGEABLE[:3] if (value := getattr(method, name, None))}
    made = method.made_by(model, replace(config, **changes))
    made.cautions.looked = True  # it has no weights, and is not read: nobody needs to hear of it
    return method.bind(made)
