"""An evaluation: every method on every item of every task, into records, and their summary."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..errors import ConfigError, MismatchError, UnsupportedModelError
from ..files import base_stage
from ..files.atomic import write_atomically
from ..files.fingerprint import base_name, model_fingerprint
from ..methods import Method
from . import summary
from .items import Generation, Item, Likelihood
from .protocol import State, run_item
from .records import TAKEN, Key, Records
from .suites import MethodSpec, Plan, in_order, meant

FORMAT, SCHEMA, SEED = "ccm-eval/1", 1, 0
#: What a forward pass costs beside its tokens, in tokens; for the progress bar.
_PASS = 24
#: Seconds between two looks at what other processes are doing.
_PATIENCE = 0.5
#: Where a checkout of this library has its own records; nothing is written there unless ``--out`` says so.
SHIPPED = Path(__file__).parents[3] / "results" / "eval"


@dataclass(frozen=True)
class Progress:
    """Where an evaluation is.

    Attributes:
        task, method, item: in hand.
        done, total: work in tokens, what older runs have done included.
    """

    task: str
    method: str
    item: str
    done: int
    total: int


@dataclass(frozen=True)
class Before:
    """What is measured before a run begins, in records.

    Attributes:
        shipped: taken over from the records of this library.
        earlier: of earlier runs in the same folder.
        wanted: all that the run is about.
    """

    shipped: int
    earlier: int
    wanted: int


@dataclass(frozen=True)
class Job:
    """One method on one item of a task.

    Attributes:
        cost: work in tokens.
    """

    task: str
    spec: MethodSpec
    item: Item
    cost: int

    @property
    def key(self) -> Key:
        """Of its record."""
        return self.task, self.spec.text, self.item.name

    def waits_for(self) -> Key | None:
        """Of the record that gives the method its sizes."""
        return (self.task, self.spec.same_as, self.item.name) if self.spec.same_as else None


class Evaluation:
    """Plans that are ready to be run: methods open, items made.

    Args:
        model: read by every method.
        tokenizer: of the model.
        suite: name of the results.
        plans: tasks, and the methods of each.
        required: methods that must be there. Others that do not fit the model, or whose adapter is missing, are left
            out, and named in the summary.

    Raises:
        CCMError: a required method or a task's data is not usable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        suite: str,
        plans: Sequence[Plan],
        required: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.suite = model, tokenizer, suite
        self.skipped: dict[str, str] = {}
        self.methods: dict[str, Method] = {}
        self.prints: dict[str, str] = {}
        self.commit = revision()
        plans = [replace(plan, methods=tuple(meant(text, model) for text in plan.methods)) for plan in plans]
        needed = {spec.text for spec in in_order(meant(text, model) for text in required)}
        for spec in in_order(text for plan in plans for text in plan.methods):
            self._open(spec, spec.text in needed)
        self.work: list[tuple[Plan, list[MethodSpec], list[Item]]] = []
        for plan in plans:
            specs = [spec for spec in in_order(plan.methods) if spec.text in self.methods]
            items = list(plan.task.items(tokenizer, plan.limit))
            if len({item.name for item in items}) < len(items):
                raise ConfigError(f"task {plan.task.name} has items of the same name; give each its own")
            self.work.append((plan, specs, items))

    def _open(self, spec: MethodSpec, needed: bool) -> None:
        """Open a method once, so that what is wrong with it shows before anything is measured."""
        method = spec.method()
        if spec.same_as in self.skipped:
            self.skipped[spec.text] = f"{spec.same_as} is left out"
            return
        try:
            run = method.open(self.model, self.tokenizer)
        except (ConfigError, MismatchError, UnsupportedModelError) as error:
            if needed:
                raise
            missing = str(error).startswith("no adapter")
            self.skipped[spec.text] = "adapter not found" if missing else str(error)
            return
        if spec.same_as:
            run.method.of_entries(0)  # says so if it has no size that could be set
        self.methods[spec.text] = method
        self.prints[spec.text] = run.reader.fingerprint()

    # ------------------------------------------------------------------ running

    def settings(self) -> dict[str, Any]:
        """All that the numbers depend on, as plain JSON."""
        model = {
            "name": base_name(self.model),
            "fingerprint": model_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        if (stage := base_stage.present(self.model)) is not None:
            model["first_stage"] = stage[:16]
        tasks = {plan.task.name: {"options": dict(plan.options)} for plan, _, _ in self.work}
        return {
            "format": FORMAT,
            "suite": self.suite,
            "model": model,
            "seed": SEED,
            "versions": _versions(),
            "tasks": tasks,
            "methods": self.prints,
        }

    def run(
        self,
        folder: Path,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        processes: int = 1,
        on_record: Callable[[str, list[dict[str, Any]], bool], None] = lambda task, records, complete: None,
    ) -> dict[str, Any]:
        """Measure what is not measured yet; returns the summary, which is in ``FOLDER.json`` too.

        Other processes may do so in the same folder at the same time (:meth:`measure`); it returns when all is there.
        An interrupt saves the item in hand and is raised again.

        Args:
            folder: of the records.
            on_progress: called before and after every item, and at every step of one.
            processes: how many are at it, for the record.
            on_record: called when there is one more record of a task, with the task, all its records so far, and
                whether that is all of them.

        Raises:
            ConfigError: the folder holds results of other settings.
            StorageError: it cannot be written.
        """
        records = self.measure(folder, on_progress, on_record)
        result = self.summary(records, processes)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder.with_name(folder.name + ".json"), text.encode())
        return result

    def left(self, folder: Path) -> int:
        """Work that is not done yet, in tokens; raises as :meth:`run`."""
        return _left(Records(folder, self.settings()), self._jobs())

    def take_over(self, folder: Path, shipped: Path | None = None) -> Before:
        """Count what is measured already, and copy what the records of this library have of the rest.

        Args:
            folder: of the records.
            shipped: folder of this library's records; None takes nothing over.

        Raises:
            ConfigError, DataError, StorageError: as :meth:`run`.
        """
        records, keys = Records(folder, self.settings()), [job.key for job in self._jobs()]
        if shipped is not None:
            records.take_over(shipped, keys)
        found = [record for key in keys if (record := records.get(key)) is not None]
        taken = sum(TAKEN in record for record in found)
        return Before(taken, len(found) - taken, len(keys))

    def _jobs(self) -> list[Job]:
        return [
            Job(plan.task.name, spec, item, _cost(item))
            for plan, specs, items in self.work
            for item in items  # all methods of an item: what is stopped early still compares them
            for spec in specs
        ]

    def measure(
        self,
        folder: Path,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_record: Callable[[str, list[dict[str, Any]], bool], None] = lambda task, records, complete: None,
    ) -> Records:
        """Measure what neither this process nor another has measured; returns when all of it is there."""
        records, jobs = Records(folder, self.settings()), self._jobs()
        total = sum(job.cost for job in jobs)
        of_task: dict[str, list[Key]] = {}
        for job in jobs:
            of_task.setdefault(job.task, []).append(job.key)

        def measured(job: Job, jobs: Sequence[Job]) -> bool:
            if not self._measure(records, job, jobs, total, on_progress):
                return False
            keys = of_task[job.task]
            found = [record for key in keys if (record := records.get(key)) is not None]
            on_record(job.task, found, len(found) == len(keys))
            return True

        try:
            while jobs:
                left = [job for job in jobs if not measured(job, jobs)]
                if len(left) == len(jobs):  # other processes are at what is left
                    time.sleep(_PATIENCE)
                    records.refresh()
                jobs = left
        except BaseException:
            records.save()
            raise
        return records

    def _measure(
        self,
        records: Records,
        job: Job,
        jobs: Sequence[Job],
        total: int,
        on_progress: Callable[[Progress], None],
    ) -> bool:
        """Do a job unless it is done; False if another process is at it, or at what it waits for."""

        def report(now: int = 0) -> None:
            on_progress(Progress(*job.key, total - _left(records, jobs) + now, total))

        if records.get(job.key) is None:
            if (first := job.waits_for()) and records.get(first) is None:
                return False
            with records.claim(job.key) as ours:
                if not ours:
                    return False
                report()
                if records.get(job.key) is None:
                    self._item(records, job, report)
        report()
        return True

    def _item(self, records: Records, job: Job, on_work: Callable[[int], None]) -> None:
        entries: Sequence[int] = ()
        if first := job.waits_for():
            reference = records.get(first) or {}
            if "error" in reference:
                error = f"{job.spec.same_as}: {reference['error']}"
                records.add(job.key, {"item": job.item.name, "error": error})
                return
            entries = reference["entries"]
        opened = self.methods[job.spec.text].open(self.model, self.tokenizer)

        def on_step(state: State) -> None:
            records.hold(job.key, state)
            on_work(_cost(job.item, state.step))

        try:
            measured = run_item(
                opened,
                job.item,
                self.tokenizer,
                entries=entries,
                resume=records.held(job.key, opened),
                on_step=on_step,
            )
        except (
            ConfigError,
            UnsupportedModelError,
        ) as error:  # such as a segment that does not fit beside what is kept
            measured = {"item": job.item.name, "error": str(error)}
        records.add(job.key, {**measured, "commit": self.commit})

    # ------------------------------------------------------------------ the result

    def answered(self, folder: Path, count: int) -> Iterator[tuple[str, Item, dict[str, dict[str, Any]]]]:
        """Task, item, and the records of the item by method, for the first items of each task."""
        records = Records(folder, self.settings())
        for plan, specs, items in self.work:
            for item in items[:count]:
                of_method = {spec.text: records.get((plan.task.name, spec.text, item.name)) for spec in specs}
                yield plan.task.name, item, {name: found for name, found in of_method.items() if found}

    def summary(self, records: Records, processes: int = 1) -> dict[str, Any]:
        """The results of all records of a folder, in the schema of ``results/eval``."""
        tasks, methods = list(records.settings["tasks"]), list(records.settings["methods"])
        # the order of the plans, whatever the order in which they were measured
        found = sorted(
            records.all(), key=lambda r: (tasks.index(r["task"]), methods.index(r["method"]), r["item"])
        )
        settings = records.settings
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "rows": summary.rows(found),
            "skipped": self.skipped,
            "warnings": summary.warnings(found),
            "read": {plan.task.name: plan.task.tally.counts() for plan, _, _ in self.work if plan.task.tally},
            "model": settings["model"],
            "adapters": {k: v for k, v in settings["methods"].items() if not v.endswith("-none")},
            "seeds": {"bootstrap": settings["seed"]},
            "versions": settings["versions"],
            "revision": revision(),
            "settings": settings["tasks"],
            **({"taken_over": taken} if (taken := sum(TAKEN in record for record in found)) else {}),
            "seconds": round(sum(record.get("seconds", 0.0) for record in found), 1),  # of one process
            "machine": machine(self.model, processes),
        }


def _left(records: Records, jobs: Sequence[Job]) -> int:
    """Work of the jobs that have no record, in tokens."""
    return sum(job.cost for job in jobs if records.get(job.key) is None)


def _cost(item: Item, until: int | None = None) -> int:
    """Work of the first steps of an item, in tokens."""
    last = max(item.queries, default=0) if until is None else until
    cost = sum(len(segment) + _PASS for segment in item.segments[:last])
    for step, queries in item.queries.items():
        for query in queries if step <= last else ():
            cost += _PASS + len(query.ids if isinstance(query, Likelihood) else query.prompt)
            cost += _PASS * query.max_tokens if isinstance(query, Generation) else 0
    return cost


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"ccm": __version__, "python": platform.python_version(), **packages}


def machine(model: PreTrainedModel, processes: int) -> dict[str, Any]:
    """Where something is measured, for the record."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
    }


def revision() -> str:
    """The commit of this library, if it runs from a checkout; "+" says that files of it differ from that."""

    def git(*command: str) -> str:
        folder = str(Path(__file__).parent.parent)
        done = subprocess.run(
            ["git", "-C", folder, *command], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "session.py")  # not merely some repository around it
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
