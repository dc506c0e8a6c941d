"""Which tasks and methods are measured together, and how methods are named.

A method is written as everywhere (``methods.spec``), or METHOD@OTHER: resized before each segment to as many keys and
values as OTHER then holds on the same item, a window of equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..data.hub import hub_files
from ..errors import ConfigError, UnknownNameError
from ..methods.default import DEFAULT, UNTRAINED, named
from ..methods.spec import Spec, parse
from .benchmarks import BENCHMARKS
from .benchmarks.judge import Judge
from .benchmarks.layout import digest
from .own_data import own_task
from .tasks import EvalTask, get_task


@dataclass(frozen=True)
class MethodSpec(Spec):
    """A method as it is written.

    Attributes:
        same_as: text of the method whose number of keys it gets; "" gives it its own sizes.
    """

    same_as: str = ""


def parse_method(text: str) -> MethodSpec:
    """Read a method as it is written on the command line; its name is not looked up yet.

    Raises:
        ConfigError: it is not NAME[:option=value,…][@OTHER].
    """
    own, at, same_as = text.strip().partition("@")
    if bool(at) != bool(same_as.strip()):
        raise ConfigError(f"method {text!r}: expected NAME, NAME:option=value or NAME@OTHER")
    spec = parse(own)
    return MethodSpec(text.strip(), spec.name, spec.options, same_as.strip())


def in_order(texts: Iterable[str]) -> list[MethodSpec]:
    """Methods as written, each once; one whose sizes another gets comes before it, and is added if missing."""
    specs: dict[str, MethodSpec] = {}

    def put(text: str) -> None:
        spec = parse_method(text)
        if spec.text not in specs:
            if spec.same_as:
                put(spec.same_as)
            specs[spec.text] = spec

    for text in texts:
        put(text)
    return list(specs.values())


def meant(text: str, model: PreTrainedModel) -> str:
    """The same method; "default", alone or behind @, gives way to the name of the best memory for a model."""
    return "@".join(named(parse(part), model).text for part in text.split("@", 1))


@dataclass(frozen=True)
class Plan:
    """One task of a suite.

    Attributes:
        task: what is asked, with its options.
        options: those that were set, for the record.
        limit: at most so many items.
        methods: as written.
    """

    task: EvalTask
    options: Mapping[str, Any]
    limit: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """Tasks and methods under a name.

    Attributes:
        name: of the results' file.
        tasks: (name, options, limit, methods) of each task.
        make: (name, options) -> task.
        first_stage: adapter whose first stage tunes the model, for every method; "" leaves it as it is.
    """

    name: str
    tasks: tuple[tuple[str, Mapping[str, Any], int, tuple[str, ...]], ...]
    make: Callable[[str, Mapping[str, Any]], EvalTask] = lambda name, options: get_task(name, **options)
    first_stage: str = ""

    def plans(
        self,
        only: Sequence[str] = (),
        methods: Sequence[str] = (),
        limit: int | None = None,
        more: Sequence[str] = (),
    ) -> list[Plan]:
        """The tasks, ready to be run.

        Args:
            only: names of some of the tasks; by default all.
            methods: other methods than the suite's.
            limit: other number of items than the suite's.
            more: methods beside them.

        Raises:
            UnknownNameError: the suite has no such task.
        """
        known = [name for name, *_ in self.tasks]
        for name in only:
            if name not in known:
                raise UnknownNameError(f"task of suite {self.name}", name, known)
        return [
            Plan(self.make(name, options), options, limit or own, (*(methods or theirs), *more))
            for name, options, own, theirs in self.tasks
            if not only or name in only
        ]


#: What needs no adapter beyond those that are meant for use.
USED = (
    "none",
    "full",
    "ccm-concat",
    "ccm-merge",
    "ccm-broad",
    "streaming-llm@ccm-concat",
    "streaming-llm@ccm-merge",
    "mean-pool",
)
#: For a user's own data, on a model of their own: and the best that needs no training.
OWN = (*USED, UNTRAINED, f"streaming-llm@{UNTRAINED}")
#: For benchmarks of others: the best memory for the model, between both ends.
CITED = ("none", "full", DEFAULT, f"streaming-llm@{DEFAULT}")
#: And the trained baselines beside CCM of the same short training (recipes/baselines).
MAIN = (*USED, "ccm-concat-short", "ccm-merge-short", "gisting-online", "compressive")
#: And old words beside the slots, where what was told is asked for.
ASKED = (*MAIN, "slots-and-words", "streaming-llm@slots-and-words")
#: As MAIN and variants: another rule, the chat setting, a window without sink, one more trained baseline.
MORE = (
    *MAIN,
    "ccm-merge:rule=ema",
    "ccm-merge:sink=4,window=64",
    "streaming-llm:sink=0@ccm-concat",
    "autocompressor",
)
#: And those that read the whole history again at every step, or write.
ALL = (*MORE, "gisting", "summary")
#: Of bounded size, for texts without end: the adapter that was trained for them, and windows of as many keys.
STREAMS = ("ccm-stream", "streaming-llm@ccm-stream", "streaming-llm:sink=0@ccm-stream")
#: And other adapters of the same size, for shorter ones.
MORE_STREAMS = (*STREAMS, "ccm-broad:sink=4,window=128,rule=bounded", "ccm-merge:sink=4,window=128")


def _tuned(window: int) -> tuple[str, ...]:
    """On a model that a first stage has taught to learn from its context. The window is the largest power of two with
    which sink, slots and window stay below a fifth of the full context after sixteen segments."""
    with_window = f"ccm-tasks:sink=4,window={window}"
    windows = ("streaming-llm@ccm-tasks", f"streaming-llm@{with_window}")
    return ("none", "full", "ccm-tasks", with_window, *windows, "mean-pool")


#: For the embedded model in float32 on two cores of 57 GFLOP/s each: quick takes a quarter of an hour, paper four
#: hours, tuned two and a quarter, streams one and a half. The paper's own data are in hub, which needs a model hub.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            (
                ("conversation", {"steps": (0, 1, 4, 8)}, 5, MAIN),
                ("icl", {"steps": (0, 8), "inputs": 1}, 5, MAIN),
                ("personalization", {"steps": (0, 8), "films": 2}, 3, MAIN),
                ("squad", {"distances": (0, 3), "asked": (1,)}, 2, MAIN),
                ("coqa", {"questions": 2}, 2, MAIN),
                ("needles", {"steps": (2, 8), "facts": 1}, 2, MAIN),
                ("updates", {"steps": (2, 8)}, 2, MAIN),
                ("stream", {"tokens": 4096}, 1, MORE_STREAMS),
            ),
        ),
        Suite(
            "paper",
            (
                ("conversation", {}, 16, ALL),
                ("icl", {}, 16, MORE),
                ("personalization", {}, 12, MORE),
                ("topical-chat", {}, 12, MAIN),
                ("squad", {}, 6, ASKED),
                ("coqa", {}, 8, ASKED),
                ("needles", {}, 12, ASKED),
                ("updates", {}, 12, ASKED),
                ("stream", {"tokens": 32_768}, 1, MORE_STREAMS),
            ),
        ),
        Suite(
            "tuned",
            (
                ("icl", {"steps": (0, 4, 16)}, 96, _tuned(64)),
                # all with so long a history
                ("personalization", {"steps": (0, 4, 16), "films": 16}, 44, _tuned(128)),
            ),
            first_stage="ccm-tasks",
        ),
        Suite("streams", (("stream", {"tokens": 204_800}, 1, STREAMS),)),
        Suite(
            "hub",
            (
                ("daily-dialog", {"steps": (0, 1, 2, 4, 8)}, 32, MAIN),
                ("soda", {"steps": (0, 1, 2, 4, 8)}, 16, MAIN),
                ("lamp", {}, 24, MAIN),
                ("stream", {"source": "pg19", "tokens": 32_768}, 3, MORE_STREAMS),
            ),
        ),
    )
}


def own_suite(path: Path, strict: bool = False) -> Suite:
    """A user's file as a suite of one task; all its lines, unless a limit is given.

    Raises:
        DataError: it is not there, cannot be read, or has nothing to use; if ``strict``, something is left out.
    """
    task = own_task(path, strict)
    content = path.read_bytes()
    sha = hashlib.sha256(content).hexdigest()[:16]  # a changed file is another task
    options = {"file": path.name, "sha256": sha}
    return Suite(path.stem, ((task.name, options, task.tally.read, OWN),), lambda name, options: task)


#: Stands for the model hub where a folder is expected.
HUB = "hub"
#: Items of a generated task; of files all are taken.
_GENERATED, _EVERY = 20, 1_000_000


def benchmark_suite(
    name: str, data: str | None = None, judge: Judge | None = None, lengths: Sequence[int] = ()
) -> Suite:
    """A benchmark of others as a suite, a task for every part that its files have.

    Args:
        name: of the benchmark.
        data: the folder or file that holds its official files, or "hub".
        judge: model that judges answers.
        lengths: tokens of a context, where the texts are made here.

    Raises:
        ConfigError: data, a judge or lengths that it needs or has no use for.
        DataError: its files are not there.
    """
    cls = BENCHMARKS[name]
    if judge and not cls.judged:
        raise ConfigError(f"{name} is scored without a judge: leave --judge out")
    if lengths and not cls.generated:
        raise ConfigError(f"{name} has texts of its own: leave --lengths out")
    if cls.generated:
        if data is not None:
            raise ConfigError(f"{name} is made here, there is nothing to be read: leave --data out")
        made: dict[str, Any] = {"lengths": tuple(lengths)} if lengths else {}
        generated = tuple((part, made, _GENERATED, CITED) for part in cls.files(Path()))
        return Suite(name, generated, lambda part, options: cls(name=part, **options))
    if data is None:
        raise ConfigError(
            f"{name} is read from its official files: give --data FOLDER with {cls.file} ({cls.source})"
        )
    if data == HUB and not cls.hub:
        raise ConfigError(
            f"{name} is not on the model hub: give --data FOLDER with {cls.file} ({cls.source})"
        )
    folder = hub_files(cls.hub, cls.downloaded) if data == HUB else Path(data).expanduser()
    asked = {"judge": judge.model, "judge_url": judge.url} if judge else {}
    parts = tuple(
        (part, {"sha256": digest(paths), **asked}, _EVERY, CITED) for part, paths in cls.files(folder).items()
    )
    return Suite(name, parts, lambda part, options: cls(name=part, data=folder, judge=judge))


def get_suite(name: str) -> Suite:
    """The suite of a name.

    Raises:
        UnknownNameError: no such suite.
    """
    if name not in SUITES:
        raise UnknownNameError("suite", name, [*SUITES, "a .jsonl file of your own"])
    return SUITES[name]
