"""How the numbers of a slot become bytes, and numbers again.

A code makes each vector of D channels into a fixed number of bytes, and needs nothing beside them. So entries can be
picked, copied and written to a file one by one. What was made of bytes becomes the same bytes again. So a slot that
stays in a memory is rounded once, however often the memory is made anew.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import UnknownNameError

#: Most channels that share a scale.
GROUP = 32
#: Bytes of a float16 number.
HALF = torch.float16.itemsize
_LARGEST = torch.finfo(torch.float16).max


class Code(ABC):
    """A way to write vectors as bytes."""

    @abstractmethod
    def width(self, channels: int) -> int:
        """Bytes of a vector of so many channels."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(..., D) in fp32 -> (..., width) in uint8."""

    @abstractmethod
    def decode(self, code: Tensor, channels: int) -> Tensor:
        """(..., width) in uint8 -> (..., D) in fp32; any bytes give numbers, if not always finite ones."""


@dataclass(frozen=True)
class Integers(Code):
    """Whole numbers of a few bits, and a float16 scale for every :data:`GROUP` channels.

    The channel that is furthest from zero is the lowest whole number, so all of them are used::

        scale = -x_furthest / 2^(bits-1),    q = round(x / scale),    x' = scale * q

    Attributes:
        bits: of a number, 8 or 4; two of 4 bits share a byte.
    """

    bits: int

    def width(self, channels: int) -> int:
        groups, size = _groups(channels)
        return math.ceil(groups * size * self.bits / 8) + groups * HALF

    def encode(self, x: Tensor) -> Tensor:
        groups, size = _groups(x.shape[-1])
        grouped = pad(x, (0, groups * size - x.shape[-1])).unflatten(-1, (groups, size))
        lowest = 2 ** (self.bits - 1)
        furthest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        scale = (furthest / -lowest).clamp(-_LARGEST, _LARGEST).to(torch.float16)
        divisor = torch.where(scale == 0, 1, scale).float()
        q = ((grouped / divisor).round().clamp(-lowest, lowest - 1) + lowest).to(torch.uint8).flatten(-2)
        if self.bits == 4:
            q = pad(q, (0, q.shape[-1] % 2))
            q = q[..., ::2] | q[..., 1::2] << 4
        return torch.cat([q, scale.squeeze(-1).contiguous().view(torch.uint8)], dim=-1)

    def decode(self, code: Tensor, channels: int) -> Tensor:
        groups, size = _groups(channels)
        q, scale = code[..., : -groups * HALF], _halves(code[..., -groups * HALF :])
        if self.bits == 4:
            q = torch.stack([q & 15, q >> 4], dim=-1).flatten(-2)[..., : groups * size]
        whole = q.float() - 2 ** (self.bits - 1)
        return (whole.unflatten(-1, (groups, size)) * scale.unsqueeze(-1)).flatten(-2)[..., :channels]


@dataclass(frozen=True)
class Sparse(Code):
    """The channels that are furthest from zero as float16, and a bit for every channel that says which they are.

    Attributes:
        share: of the channels, that stay.
    """

    share: float = 0.3

    def width(self, channels: int) -> int:
        return math.ceil(channels / 8) + self._stay(channels) * HALF

    def encode(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        places = x.abs().topk(self._stay(channels), dim=-1).indices.sort(-1).values
        bits = torch.zeros_like(x, dtype=torch.uint8).scatter(-1, places, 1)
        bits = pad(bits, (0, -channels % 8)).unflatten(-1, (-1, 8))
        bitmap = (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)
        values = x.gather(-1, places).clamp(-_LARGEST, _LARGEST).to(torch.float16)
        return torch.cat([bitmap, values.contiguous().view(torch.uint8)], dim=-1)

    def decode(self, code: Tensor, channels: int) -> Tensor:
        stay = self._stay(channels)
        bitmap, values = code[..., : -stay * HALF], _halves(code[..., -stay * HALF :])
        bits = bitmap.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=code.device) & 1
        bits = bits.flatten(-2)[..., :channels]
        which = (bits.cumsum(-1) - 1).clamp(0, stay - 1)  # of bytes from elsewhere the bits may be more
        return torch.where(bits == 1, values.gather(-1, which), 0.0)

    def _stay(self, channels: int) -> int:
        return max(1, round(self.share * channels))


CODES: dict[str, Code] = {"int8": Integers(8), "int4": Integers(4), "sparse": Sparse()}


def get_code(name: str) -> Code:
    """The code of that name.

    Raises:
        UnknownNameError: no such code.
    """
    if name not in CODES:
        raise UnknownNameError("code", name, list(CODES))
    return CODES[name]


def _groups(channels: int) -> tuple[int, int]:
    """How many groups the channels are in, and of how many each."""
    groups = math.ceil(channels / GROUP)
    return groups, math.ceil(channels / groups)


def _halves(code: Tensor) -> Tensor:
    """Bytes (..., 2 n) as n numbers."""
    return code.clone(memory_format=torch.contiguous_format).view(torch.float16).float()
