"""An evaluation: every method on every item of every task, into records, and their summary."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..errors import ConfigError, MismatchError
from ..methods import Method
from ..reader import base_name, model_fingerprint
from ..storage import base_stage
from ..storage.atomic import write_atomically
from . import summary
from .items import Generation, Item, Likelihood
from .protocol import State, run_item
from .records import Key, Records
from .suites import MethodSpec, Plan, in_order

FORMAT, SCHEMA, SEED = "ccm-eval/1", 1, 0
#: What a forward pass costs beside its tokens, in tokens; for the progress bar.
_PASS = 24


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
        needed = {spec.text for spec in in_order(required)}
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
        except (ConfigError, MismatchError) as error:
            if needed:
                raise
            missing = str(error).startswith("no adapter")
            self.skipped[spec.text] = "adapter not found" if missing else str(error)
            return
        if spec.same_as and not hasattr(run, "resize"):
            raise ConfigError(
                f"method {spec.text}: {spec.name} cannot be given the size of another method: expected one with a "
                "window, such as streaming-llm"
            )
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
        self, folder: Path, on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> dict[str, Any]:
        """Measure what is not measured yet; returns the summary, which is in ``FOLDER.json`` too.

        An interrupt saves the item in hand and is raised again.

        Raises:
            ConfigError: the folder holds results of other settings, or is in use.
            StorageError: it cannot be written.
        """
        with Records(folder, self.settings()) as records:
            try:
                self._measure(records, on_progress)
            except BaseException:
                records.save()
                raise
            result = self.summary(records)
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            write_atomically(folder.with_name(folder.name + ".json"), text.encode())
            return result

    def _measure(self, records: Records, on_progress: Callable[[Progress], None]) -> None:
        total = sum(len(specs) * sum(map(_cost, items)) for _, specs, items in self.work)
        done = 0
        for plan, specs, items in self.work:
            for item in items:  # all methods of an item: what is stopped early still compares them
                for spec in specs:
                    key = plan.task.name, spec.text, item.name
                    on_progress(Progress(*key, done, total))
                    if records.get(key) is None:
                        self._item(
                            records,
                            key,
                            spec,
                            item,
                            lambda now: on_progress(Progress(*key, done + now, total)),  # noqa: B023
                        )
                    done += _cost(item)
                    on_progress(Progress(*key, done, total))

    def _item(
        self, records: Records, key: Key, spec: MethodSpec, item: Item, on_work: Callable[[int], None]
    ) -> None:
        entries: Sequence[int] = ()
        if spec.same_as:
            reference = records.get((key[0], spec.same_as, key[2])) or {}
            if "error" in reference:
                records.add(key, {"item": item.name, "error": f"{spec.same_as}: {reference['error']}"})
                return
            entries = reference["entries"]
        opened = self.methods[spec.text].open(self.model, self.tokenizer)

        def on_step(state: State) -> None:
            records.hold(key, state, opened)
            on_work(_cost(item, state.step))

        try:
            measured = run_item(
                opened,
                item,
                self.tokenizer,
                entries=entries,
                resume=records.held(key, opened),
                on_step=on_step,
            )
        except ConfigError as error:  # a segment that does not fit beside what is kept
            measured = {"item": item.name, "error": str(error)}
        records.add(key, measured)

    # ------------------------------------------------------------------ the result

    def summary(self, records: Records) -> dict[str, Any]:
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
            "model": settings["model"],
            "adapters": {k: v for k, v in settings["methods"].items() if not v.endswith("-none")},
            "seeds": {"bootstrap": settings["seed"]},
            "versions": settings["versions"],
            "revision": _revision(),
            "settings": settings["tasks"],
            "machine": {
                "system": f"{platform.system()} {platform.machine()}",
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": str(self.model.device),
            },
        }


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


def _revision() -> str:
    """The commit of this library, if it runs from a checkout; "+" says that files of it differ from that."""

    def git(*command: str) -> str:
        folder = str(Path(__file__).parent.parent)
        done = subprocess.run(
            ["git", "-C", folder, *command], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "cli.py")  # not merely some repository around it
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
