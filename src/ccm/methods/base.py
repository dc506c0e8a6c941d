"""What every context memory has in common, and the registry.

A *method* is a small dataclass of options. Opened on a model it gives a *run*, the life of one conversation::

    run = get_method("streaming-llm", sink=4, window=60).open(model)
    run.append(segment)              # a finished segment goes into whatever the method keeps
    logits = run.logits(segment)     # live tokens read what is kept; nothing changes
    run.kv_bytes                     # the keys and values that they attend to, measured

To add a method, put one file into this folder: a run that says what :meth:`Run.append` keeps, and a dataclass
with :func:`register`. It then has a name on the command line, in the demo and in the tests.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from ..memory import Memory
from ..reader import Reader

METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound="type[Method]")


class Run(ABC):
    """One conversation under one method. What is kept is a :class:`~ccm.Memory`, so copies are free.

    Attributes:
        reader: the model that reads.
        memory: what live tokens attend to.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.memory: Memory = reader.empty()

    @abstractmethod
    def append(self, ids: Sequence[int]) -> None:
        """Take in one finished segment of token ids.

        Raises:
            ConfigError: an empty segment, or one that does not fit the model's context beside what is kept.
        """

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (T, V) of live tokens that read what the run holds; the run does not change."""
        return self.reader.logits([list(ids)], self.memory)[0]

    def keep(self, **parts: Any) -> None:
        """Change parts of the memory's only row."""
        self.memory = replace(self.memory, rows=(replace(self.memory.rows[0], **parts),))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that live tokens attend to: those of the tensors held, in the model's type.

        ``memory.nbytes`` may be more: slots rest in float32, whatever the model's type is.
        """
        parts = (kv for row in self.memory.rows for kv in (row.sink, row.slots, row.window))
        numbers = sum(tensor.numel() for kv in parts for tensor in kv)
        return numbers * self.reader.model.dtype.itemsize

    def fork(self) -> Run:
        """An independent copy."""
        return copy.copy(self)


class Method(ABC):
    """Options of a context memory; subclasses are frozen dataclasses."""

    name = ""

    @abstractmethod
    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> Run:
        """Begin a conversation.

        Args:
            model: of a supported family; shared by any number of runs.
            tokenizer: of the model, for methods that look at text.

        Raises:
            UnsupportedModelError: the model's family cannot carry a memory.
            ConfigError: an option that does not fit the model.
        """


def register(*names: str) -> Callable[[_M], _M]:
    """Class decorator: make a method known under its name, and further names for the same thing."""

    def put(method: _M) -> _M:
        method.name = names[0]
        METHODS.update(dict.fromkeys(names, method))
        return method

    return put
