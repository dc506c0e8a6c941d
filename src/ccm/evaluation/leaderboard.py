"""Every memory at equal bytes: which methods, of which sizes, on which tasks, and what was measured as a table.

The budget of a task is a number of entries that a question may read: by default 4 for every segment before the last
question. A memory gets the options with which it stays within that on every item; one that cannot be given a size is
measured as it is. All tasks score how well right answers or next turns are foreseen, so quality is the recovered
share of what full context is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from ..errors import CCMError, ConfigError
from ..files.adapter_folder import has_first_stage, shipped_adapters
from ..methods import Method
from ..methods.base import METHODS
from ..methods.catalogue import catalogue
from ..methods.catalogue import entry as entry_of
from ..methods.compressed import Trained
from ..methods.spec import is_file, parse
from . import summary
from .metrics import frontier
from .suites import Plan
from .tasks import get_task

#: Task, its options, and how many items are lived through unless another number is asked for.
TASKS: dict[str, tuple[dict[str, Any], int]] = {
    "conversation": ({"steps": (4, 5, 6, 7, 8, 9)}, 5),
    "facts": ({}, 5),
    "questions": ({}, 5),
}
#: The ends of the scale.
ENDS = ("none", "full")
#: Entries for every segment before the last question.
A_SEGMENT = 4
#: A window of fewer tokens is not worth an option.
LEAST = 16
#: The sink that stands in front of a window where an adapter has neither.
SINK = 4


def default_methods() -> tuple[list[str], dict[str, str]]:
    """What is compared unless somebody names methods: all that are registered, and the shipped adapters.

    Returns:
        the memories as they are written, and the reason of those that are left out.
    """
    entries, left_out = catalogue()
    adapters = {name: has_first_stage(name) for name in shipped_adapters()}
    left_out |= {
        n: "its first stage tunes the model: ccm eval tuned" for n, tuned in adapters.items() if tuned
    }
    names = [*ENDS, *(name for name, tuned in adapters.items() if not tuned)]
    for entry in entries:
        if entry.name in names or entry.name in left_out:
            continue
        package = METHODS[entry.name].package
        if package and find_spec(package) is None:
            left_out[entry.name] = f"it needs the package {package}, which is not installed here"
        elif "writing" in entry.asks:
            left_out[entry.name] = "the model writes for it, which takes minutes: name it with --methods"
        elif "gradient" in entry.asks:
            left_out[entry.name] = "every fold trains, which takes minutes: name it with --methods"
        else:
            names.append(entry.name)
    return names, left_out


@dataclass(frozen=True)
class Board:
    """What is measured.

    Attributes:
        plans: tasks, and the memories of each with their sizes.
        budgets: task -> entries.
        families: memory as a plan has it -> title of its family.
        left_out: memory -> why it is not measured.
    """

    plans: tuple[Plan, ...]
    budgets: Mapping[str, int]
    families: Mapping[str, str]
    left_out: Mapping[str, str]


def board(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
    entries: int | None = None,
    limit: int | None = None,
) -> Board:
    """Choose the sizes.

    Args:
        model: that reads; adapters of another one are left out.
        tokenizer: of the model.
        methods: as they are written; one with options of its own keeps them. By default all.
        tasks: some of :data:`TASKS`; by default all.
        entries: that a question may read; by default :data:`A_SEGMENT` for each segment before it.
        limit: items of each task.

    Raises:
        CCMError: a method that was named cannot be used, or a task's data.
    """
    names, left_out = (list(dict.fromkeys([*ENDS, *methods])), {}) if methods else default_methods()
    bound: dict[str, Method] = {}
    for name in names:
        try:
            bound[name] = parse(name).method().bind(model, tokenizer)
        except CCMError as error:
            if methods:
                raise
            left_out[name] = str(error)
    plans: list[Plan] = []
    budgets: dict[str, int] = {}
    families: dict[str, str] = {}
    for name in tasks or TASKS:
        options, count = TASKS[name]
        task = get_task(name, **options)
        items = list(task.items(tokenizer, limit or count))
        budgets[name] = entries or A_SEGMENT * max(max(item.queries) for item in items)
        lengths = [[len(segment) for segment in item.segments[: max(item.queries)]] for item in items]
        texts = [sized(text, method, budgets[name], lengths) for text, method in bound.items()]
        families |= {
            text: entry_of(type(of)).family.title for text, of in zip(texts, bound.values(), strict=True)
        }
        plans.append(Plan(task, options, limit or count, tuple(dict.fromkeys(texts))))
    return Board(tuple(plans), budgets, families, left_out)


# ---------------------------------------------------------------------- sizes


def sized(text: str, bound: Method, entries: int, lengths: Sequence[Sequence[int]]) -> str:
    """A memory with the options of which a question reads at most so many entries, as it is written.

    Of a memory that grows with the text it is the largest number of slots a segment; what is left of the budget is a
    window, where an adapter can have one. As it is, if it has options already, or none are known.

    Args:
        text: as it is written.
        bound: the same on a model.
        entries: the budget.
        lengths: tokens of each segment before the last question, of each item.
    """
    spec = parse(text)
    if text in ENDS or spec.options:
        return text
    found = _fitted(bound, entries, lengths)
    names = [each.name for each in fields(bound) if each.init]
    changes = {n: getattr(found, n) for n in names if getattr(found, n) != getattr(bound, n)}
    method = replace(spec.method(), **changes)
    # a file's method has its name only where the file was run
    return spec.name + method.text.removeprefix(method.name) if is_file(spec.name) else method.text


def _fitted(method: Method, entries: int, lengths: Sequence[Sequence[int]]) -> Method:
    try:
        return method.resized(**method.sized(entries))
    except ConfigError:  # it grows
        found = next(_within(_fewer(method), entries, lengths), method)
    if not isinstance(method, Trained) or method.made_by.kind != "ccm":
        return found
    sink = max(found.sink, SINK)
    windows = (found.resized(sink=sink, window=n) for n in range(entries - sink, LEAST - 1, -1))
    return next(_within(windows, entries, lengths), found)


def _fewer(method: Method) -> Iterator[Method]:
    """The method with its own number of slots and with fewer, an adapter without a window."""
    fixed = {"window": 0} if isinstance(method, Trained) and method.window else {}
    for name in ("slots", "tokens", "fitted"):
        for count in range(getattr(method, name, 0) or 0, 0, -1):
            yield method.resized(**fixed, **{name: count})


def _within(methods: Iterable[Method], entries: int, lengths: Sequence[Sequence[int]]) -> Iterator[Method]:
    for method in methods:
        try:
            if all(sum(method.size(own)) <= entries for own in lengths):
                yield method
        except ConfigError:  # it does not say its size
            return


# ---------------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Row:
    """A memory on a task.

    Attributes:
        method: as it is written, with its options.
        family: see :mod:`ccm.methods.catalogue`.
        gain: nats a scored token over no memory.
        share, low, high: recovered share and its 95 % interval; None where there is nothing to keep.
        n: items behind it.
        kv_bytes: of the keys and values read at the last question, mean over items.
        within: whether these are at most those of the budget.
        fold_seconds: to take in a segment.
        first_token: time to the first token, over that of full context in the same run.
        best: whether nothing with as few bytes is as good.
        command: measures the row.
        model, commit: what it was measured with; several commits if the run was continued.
    """

    method: str
    family: str
    gain: float
    share: float | None
    low: float | None
    high: float | None
    n: int
    kv_bytes: int
    within: bool
    fold_seconds: float
    first_token: float
    best: bool
    command: str
    model: str
    commit: str


@dataclass(frozen=True)
class Table:
    """A task, its rows by falling quality: the ends, memories within the budget, those beyond it.

    Attributes:
        task, title: names.
        entries: the budget.
        kv_bytes: the same in bytes of the model's type.
        n, queries: items, and what each is asked.
        worth, low, high: what full context gains over none, in nats a scored token, and its 95 % interval.
        rows: of the memories.
    """

    task: str
    title: str
    entries: int
    kv_bytes: int
    n: int
    queries: int
    worth: float
    low: float
    high: float
    rows: tuple[Row, ...]

    @property
    def kept(self) -> bool:
        """Whether there is something to keep: the whole interval of the gain is above 0."""
        return self.low > 0


def table(
    made: Board,
    plan: Plan,
    per_entry: int,
    records: Iterable[Mapping[str, Any]],
    *,
    model: str,
    more: str = "",
) -> Table:
    """The rows of a task.

    Args:
        made: what was measured.
        plan: of the task.
        per_entry: bytes of an entry, in the model's type.
        records: of the task and its memories.
        model: that they were measured with.
        more: options that belong to the command of a row.

    Raises:
        ConfigError: no context or full context has no records.
    """
    entries = made.budgets[plan.task.name]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "error" not in record:
            by_method.setdefault(record["method"], []).append(pooled(record))
    if missing := [name for name in ENDS if name not in by_method]:
        raise ConfigError(
            f"task {plan.task.name}: {', '.join(missing)} could take no item, so nothing is compared"
        )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method, own in by_method.items():
        ends = [record for end in ENDS if end != method for record in by_method[end]]
        own_rows = summary.rows([*ends, *own])
        found[method] = {row["metric"]: row for row in own_rows if row["method"] == method and not row["tag"]}
    full, worth = found["full"]["perplexity"], found["full"]["perplexity" + summary.WORTH]
    low, high = (worth["value"] if worth[end] is None else worth[end] for end in ("ci_low", "ci_high"))
    nats = {method: _nats(by_method["none"], own) for method, own in by_method.items()}
    best = frontier({method: (of["perplexity"]["kv_bytes"], nats[method]) for method, of in found.items()})
    rows = []
    for method, of in found.items():
        main, share = of["perplexity"], of.get("recovered_share", {}) if low > 0 else {}
        rows.append(
            Row(
                method=method,
                family=made.families[method],
                gain=round(nats[method], 4),
                share=_rounded(share.get("value")),
                low=_rounded(share.get("ci_low")),
                high=_rounded(share.get("ci_high")),
                n=main["n"],
                kv_bytes=round(main["kv_bytes"]),
                within=main["kv_bytes"] <= entries * per_entry,
                fold_seconds=round(main["fold_seconds"], 4),
                first_token=round(main["ttft_seconds"] / full["ttft_seconds"], 3),
                best=method in best,
                command=f"ccm leaderboard --tasks {plan.task.name} --methods {method}{more}",
                model=model,
                commit=", ".join(sorted({record.get("commit", "") for record in by_method[method]})),
            )
        )
    return Table(
        task=plan.task.name,
        title=plan.task.title,
        entries=entries,
        kv_bytes=entries * per_entry,
        n=worth["n"],
        queries=len(by_method["none"][0]["queries"]),
        worth=round(worth["value"], 4),
        low=round(low, 4),
        high=round(high, 4),
        rows=tuple(sorted(rows, key=_place)),
    )


def _place(row: Row) -> tuple[int, float, str]:
    """The ends first, then what is within the budget, then the rest, each by what it gains."""
    if row.method in ENDS:
        return ENDS.index(row.method) - len(ENDS), 0.0, ""
    return int(not row.within), -row.gain, row.method


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def pooled(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose questions count as those of its last step: bytes are those there, times the mean over steps."""
    steps = record["steps"]
    last = dict(max(steps, key=lambda step: step["step"]))
    for name in ("fold_seconds", "ttft_seconds"):
        last[name] = sum(step[name] for step in steps) / len(steps)
    queries = [{**query, "step": last["step"]} for query in record["queries"]]
    return {**record, "queries": queries, "steps": [last]}


def _nats(none: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> float:
    """What a memory gains over none, in nats a scored token, on the items that both have."""
    items = {record["item"] for record in none} & {record["item"] for record in own}
    sums = []
    for records in (none, own):
        queries = [query for record in records if record["item"] in items for query in record["queries"]]
        sums.append(sum(q["nll"] for q in queries) / max(1, sum(q["tokens"] for q in queries)))
    return float(sums[0] - sums[1])


def as_json(tables: Sequence[Table], about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``leaderboard.json`` holds."""
    return {"schema": 1, "suite": summary.LEADERBOARD, "tables": [asdict(each) for each in tables], **about}


def from_json(stored: Mapping[str, Any]) -> list[Table]:
    """The tables of :func:`as_json`."""
    return [Table(**{**each, "rows": tuple(Row(**row) for row in each["rows"])}) for each in stored["tables"]]
