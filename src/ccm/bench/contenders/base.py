"""What a contender is, and what several of them count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...models.placement import AUTO
from ..machine import CPU, clock_of


@dataclass(frozen=True)
class Setting:
    """What all contenders of a run are given.

    Attributes:
        model: folder, GGUF file or hub id; None is the embedded one.
        llama: GGUF file of the same model.
        threads: of the CPU.
        device, dtype: where torch runs the model, and in which type; "auto" as in the other commands.
        decode_in: from what the memories of this library write answers.
    """

    model: str | None = None
    llama: str = "default"
    threads: int = 1
    device: str = AUTO
    dtype: str = AUTO
    decode_in: str = AUTO


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn.

    Attributes:
        first: to the first token.
        between: between two tokens, the median.
        total: until the next question may come.
    """

    first: float
    between: float
    total: float

    @classmethod
    def of(cls, began: float, tokens: Sequence[float], ended: float) -> Turn:
        """From the times at which it began, each token came, and it ended."""
        gaps = sorted(b - a for a, b in pairwise(tokens))
        return cls(tokens[0] - began, gaps[len(gaps) // 2], ended - began)


class Contender(ABC):
    """One way to keep a conversation."""

    name: ClassVar[str]
    #: Longest history that it is measured at.
    reach: ClassVar[int] = 4_000
    #: Most conversations at once that it is measured with.
    crowd: ClassVar[int] = 32
    #: Packages that do its work, where they are installed.
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    #: Whether it reads a history to be behind it; else keys and values are put in place.
    reads: ClassVar[bool] = False
    #: Whether it has a memory, with ``fold`` and ``restore``.
    folds: ClassVar[bool] = False

    #: Of the model, without a table of embeddings that is only looked up.
    parameters: int
    #: Token ids that the model has.
    vocabulary: int

    #: Whether torch runs it where it is told; else its own build decides.
    in_torch: ClassVar[bool] = True

    #: Where torch runs it, and in which type.
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def __init__(self, setting: Setting):
        self.setting, self.threads = setting, setting.threads
        self.clock = clock_of(self.threads)
        torch.set_num_threads(self.threads)

    def _runs(self, model: Any) -> None:
        """This model of torch, where it lies."""
        self.device, self.dtype = model.device, model.dtype
        self.clock = clock_of(self.threads, self.device)
        self.parameters, self.vocabulary = parameters_of(model), vocabulary_of(model)

    @property
    def device_name(self) -> str:
        """Device and type, for people."""
        kind = str(self.dtype).removeprefix("torch.")
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {kind}"
        return f"{self.device}, {kind}"

    @abstractmethod
    def take(self, ids: list[int]) -> None:
        """Be as behind this history."""

    @abstractmethod
    def turn(self, ids: list[int], head: list[int]) -> Turn:
        """Play a turn, and go back."""

    @abstractmethod
    def prefill(self, ids: list[int]) -> float:
        """Seconds in which these tokens are read behind nothing."""

    @abstractmethod
    def answer(self, count: int, ids: list[int], head: list[int]) -> float:
        """Seconds of a turn of so many conversations at once, all with the history of this one."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Of the keys and values that the next token attends to."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Of the weights that every token reads."""


def history(length: int, vocabulary: int) -> list[int]:
    """Token ids of the one history that all have; what they say makes no difference to the time."""
    generator = torch.Generator().manual_seed(0)
    most = min(10_000, vocabulary)
    return torch.randint(min(100, most // 2), most, (length,), generator=generator).tolist()


def vocabulary_of(model: Any) -> int:
    """Token ids that a model has."""
    return int(model.get_input_embeddings().num_embeddings)


def parameters_of(model: Any) -> int:
    """A head that is tied to the embeddings counts, a table that is only looked up does not."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    return total if head is table else total - table.numel()


def file_bytes(path: str) -> int:
    """The size of a file."""
    return Path(path).stat().st_size
