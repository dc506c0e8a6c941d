"""What benchmarks of others have in common, and the registry.

A *benchmark* is a task that is made from files of others. To add one, put one file into this folder: a frozen
dataclass under :func:`register_benchmark` that says which files there are, what they hold and how answers are
scored. It then has a name on the command line, ``ccm eval NAME --data FOLDER``, and a row in docs/benchmarks.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..tasks import EvalTask
from .judge import Judge

BENCHMARKS: dict[str, type[Benchmark]] = {}
_B = TypeVar("_B", bound="type[Benchmark]")


@dataclass(frozen=True, kw_only=True)
class Benchmark(EvalTask):
    """Items of a benchmark; its name is that of one of its parts.

    Attributes:
        name: the part, as it is called in results.
        data: the folder or file that holds the official files.
        judge: model that judges answers, where the paper has one.
        key: name on the command line.
        paper: authors, year and link.
        file: what is expected in the folder, for people.
        source: where that is to be had.
        hub: data set of the model hub that holds the files; "" where it is not there.
        downloaded: which of its files are wanted, as patterns.
        judged: whether the paper has answers judged by a model.
        generated: whether the items are made here, so that there are no files.
    """

    name: str
    data: Path | None = None
    judge: Judge | None = None

    key: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    file: ClassVar[str] = ""
    source: ClassVar[str] = ""
    hub: ClassVar[str] = ""
    downloaded: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[bool] = False
    generated: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("score",)
    cited: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        """The parts that a folder or file holds, each with its files; every part is a task of the suite.

        Raises:
            DataError: there is none of them.
        """

    @property
    def steps(self) -> tuple[int, ...]:
        return (1,)

    def paths(self) -> list[Path]:
        """The files of this part."""
        return self.files(self.data or Path())[self.name]

    @abstractmethod
    def items(self, tokenizer: Any, limit: int) -> Iterator[Any]:
        """See :meth:`ccm.evaluation.tasks.EvalTask.items`.

        Raises:
            DataError: a file is not as expected; the message names the record and the field.
        """


def register_benchmark(key: str) -> Callable[[_B], _B]:
    """Class decorator: make a benchmark known under a name."""

    def register(cls: _B) -> _B:
        cls.key = key
        BENCHMARKS[key] = cls
        return cls

    return register
