"""What every evaluation task has in common, and the registry.

A *task* is a frozen dataclass of options that turns held-out data into items::

    task = get_task("conversation", steps=(0, 1, 2, 4))
    for item in task.items(tokenizer, limit=20): ...

To add a task, put one file into this folder: a dataclass with :func:`register_task` that says how its items are
made. It then has a name on the command line, in suites and in the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from ...data.logs import Tally
from ..items import Item

TASKS: dict[str, type[EvalTask]] = {}
_T = TypeVar("_T", bound="type[EvalTask]")


class EvalTask(ABC):
    """Items to be measured, all of them of held-out users, tasks, books or stories.

    Subclasses are frozen dataclasses of options, each of which has a default.

    Attributes:
        name: on the command line and in results.
        title: what it is, in a few words.
        metrics: what its queries give: "nll", "accuracy", "group_accuracy", "em", "f1", "rouge_l", "score".
        licence: of the data; ``upstream, …`` where the package that carries them prints none.
        origin: package and version, hub name, or how the items are made.
        cited: a benchmark of others: full context is cut to what the model reads instead of being left out.
    """

    name: str = ""
    title: ClassVar[str] = ""
    metrics: ClassVar[tuple[str, ...]] = ()
    licence: ClassVar[str] = ""
    origin: ClassVar[str] = ""
    cited: ClassVar[bool] = False

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The time steps at which an item that is long enough asks its queries; () is every step."""

    @property
    def tally(self) -> Tally | None:
        """What was read of a user's own file; None for all other data."""
        return None

    @property
    def scored(self) -> str:
        """How answers are scored, where that is not said by the name of the metric."""
        return ""

    @abstractmethod
    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        """The first ``limit`` items, or as many as there are; lazily, and always the same ones.

        Raises:
            DataError, MissingPackageError, StorageError: the data cannot be fetched, or are not as expected.
        """


def register_task(task: _T) -> _T:
    """Class decorator: make a task known under its ``name``."""
    TASKS[task.name] = task
    return task
