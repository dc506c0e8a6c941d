"""Records -> rows, one measured number each. Pure functions: the same records give the same rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from .metrics import Array, bootstrap, recovered_share

Record = Mapping[str, Any]
#: item -> (what is summed, how many); by item, as items are what is resampled
Sums = dict[str, tuple[float, float]]

#: the metrics of a kind of query: name -> (what is summed over an item's queries, what counts them)
_OF_KIND: dict[str, dict[str, tuple[str, str]]] = {
    "likelihood": {"perplexity": ("nll", "tokens")},
    "choice": {"accuracy": ("correct", ""), "group_accuracy": ("group_correct", "")},
    "generation": {name: (name, "") for name in ("score", "em", "f1", "rouge_l")},
}

#: What two methods are compared by, item by item.
_COMPARED = {"perplexity": "recovered_share", "score": "score", "accuracy": "accuracy", "f1": "f1"}
#: What a recovered share is of: the part that a method keeps of what full context gains over none.
_SHARED = ("perplexity", "score")
#: After the name of a metric: what full context is better by than none, in nats per token for perplexities. Where its
#: interval holds 0, a memory has nothing to keep.
WORTH = " gain over none"
#: The suite of what ``ccm leaderboard`` stores; its tables and its page are its own.
LEADERBOARD = "leaderboard"


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Rows of the schema: tasks and methods in the order of the records, then step, tag ("" is all) and metric.

    ``kv_bytes``, ``fold_seconds`` and ``ttft_seconds`` are means over the items at that step, ``peak_kv_bytes`` and
    ``seconds`` over the whole items. Intervals are 95 % bootstrap intervals over items, paired where two methods
    are compared; they are None for a single item, and where resampling gives no finite number.
    """
    by_task: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        of_method = by_task[record["task"]][record["method"]]
        if "error" not in record:
            of_method.append(record)
    return [row for task, methods in by_task.items() for row in _task_rows(task, methods)]


def warnings(records: Iterable[Record]) -> list[str]:
    """What a reader of the rows must know: methods without effect, items that did not fit."""
    records = list(records)
    found = [
        f"{row['task']}: {row['method']} changed nothing: its scores are those without any context"
        for row in rows(records)
        if row["metric"] == "no_effect"
    ]
    cut: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "cut" in record:
            cut[record["task"], record["method"]].append(record)
    for (task, method), some in cut.items():
        read = sum(max(step["tokens"] for step in record["steps"]) for record in some)
        found.append(
            f"{task}: {method} reads the newest {read:,} of {read + sum(r['cut'] for r in some):,} tokens of "
            f"{len(some)} items: the model reads no more at once"
        )
    failed: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if "error" in record:
            failed[record["task"], record["method"]].append(record["error"])
    return found + [
        f"{task}: {method} could not take {len(errors)} items, which are left out ({errors[0]})"
        for (task, method), errors in failed.items()
    ]


def _task_rows(task: str, methods: Mapping[str, list[Record]]) -> Iterator[dict[str, Any]]:
    sums = {method: _sums(records) for method, records in methods.items()}
    tags = {tag for of_method in sums.values() for _, tag, _ in of_method if tag}
    for method, records in methods.items():
        for step, tag, metric in sorted(sums[method]):
            if tag and len(tags) == 1:  # the same as all
                continue
            own, none, full = (
                sums.get(name, {}).get((step, tag, metric), {}) for name in (method, "none", "full")
            )
            cost = _cost(records, step, set(own))
            for name, n, value, (low, high) in _measures(metric, own, none, full):
                if name == "accuracy_gap" and method == "full":
                    continue
                head = {"task": task, "method": method, "step": step, "tag": tag, "metric": name}
                ends = {"ci_low": _finite(low), "ci_high": _finite(high)}
                yield head | {"value": value} | ends | {"n": n} | cost
        for step, name, items, value, (low, high) in chain(_gains(method, sums), _growth(method, sums)):
            head = {"task": task, "method": method, "step": step, "tag": "", "metric": name}
            ends = {"ci_low": _finite(low), "ci_high": _finite(high)}
            yield head | {"value": value} | ends | {"n": len(items)} | _cost(records, step, items)
        known = [record["changed"] for record in records if record["changed"] is not None]
        if method != "none" and known and not any(known):
            step = max(step for step, _, _ in sums[method])
            head = {"task": task, "method": method, "step": step, "tag": "", "metric": "no_effect"}
            result = {"value": 1.0, "ci_low": None, "ci_high": None, "n": len(known)}
            yield head | result | _cost(records, step, {record["item"] for record in records})


def _gains(
    method: str, sums: Mapping[str, Mapping[tuple[int, str, str], Sums]]
) -> Iterator[tuple[int, str, Set[str], float, tuple[float, float]]]:
    """What a method gains over each method after it at the last step of a task, paired item by item.

    Yields step, metric ("accuracy over ccm-merge"), items, value and interval; in place of perplexities, recovered
    shares are compared.
    """
    later = list(sums)[list(sums).index(method) + 1 :]
    last = {metric: step for step, tag, metric in sorted(sums[method]) if not tag}
    for metric in filter(last.__contains__, _COMPARED):
        key = last[metric], "", metric
        named = (
            [sums.get(name, {}).get(key, {}) for name in ("none", "full")] if metric == "perplexity" else []
        )
        for other in later:
            parts = [*named, sums[method][key], sums[other].get(key, {})]
            if not (items := set.intersection(*(set(part) for part in parts))):
                continue
            value, interval = _measure(_share_gap if named else _gap, *(_only(part, items) for part in parts))
            if math.isfinite(value):
                yield key[0], f"{_COMPARED[metric]} over {other}", items, value, interval


def _growth(
    method: str, sums: Mapping[str, Mapping[tuple[int, str, str], Sums]]
) -> Iterator[tuple[int, str, Set[str], float, tuple[float, float]]]:
    """How much better a method is at the last step of a task than at the first, paired item by item; step 0 is the
    first if there are only two. No context does not grow.

    Yields step, metric ("accuracy since 1"), items, value and interval. Perplexities at two steps are of other words,
    so there it is the gain over no context, in nats per token.
    """
    for metric in _COMPARED:
        steps = sorted(step for step, tag, name in sums[method] if (tag, name) == ("", metric))
        if len(steps) < 2 or method == "none":
            continue
        first, last = steps[1 if steps[0] == 0 and len(steps) > 2 else 0], steps[-1]
        named = ("none", method) if metric == "perplexity" else (method,)
        parts = [sums.get(name, {}).get((step, "", metric), {}) for step in (last, first) for name in named]
        if not (items := set.intersection(*(set(part) for part in parts))):
            continue
        statistic = _gain_growth if metric == "perplexity" else _gap
        value, interval = _measure(statistic, *(_only(part, items) for part in parts))
        yield last, f"{metric} since {first}", items, value, interval


def _measures(
    metric: str, own: Sums, none: Sums, full: Sums
) -> Iterator[tuple[str, int, float, tuple[float, float]]]:
    """A metric and those that compare it with no and with full context: name, items, value, interval."""
    yield metric, len(own), *_measure(_ratio(metric), own)
    if metric in _SHARED and (items := own.keys() & none.keys() & full.keys()):
        value, interval = _measure(_share, *(_only(sums, items) for sums in (none, full, own)))
        if math.isfinite(value):
            yield "recovered_share", len(items), value, interval
    if own is full and metric in _COMPARED and (items := own.keys() & none.keys()):
        better, worse = (none, own) if metric == "perplexity" else (own, none)
        yield metric + WORTH, len(items), *_measure(_gap, _only(better, items), _only(worse, items))
    if metric == "accuracy" and (items := own.keys() & full.keys()):
        yield "accuracy_gap", len(items), *_measure(_gap, _only(own, items), _only(full, items))


def _only(sums: Sums, items: Set[str]) -> Sums:
    return {item: sums[item] for item in items}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _sums(records: Iterable[Record]) -> dict[tuple[int, str, str], Sums]:
    """(step, tag, metric) -> the sums of every item that was asked."""
    sums: dict[tuple[int, str, str], Sums] = defaultdict(dict)
    for record in records:
        item = record["item"]
        for query in record["queries"]:
            for metric, (what, count) in _OF_KIND[query["kind"]].items():
                if what not in query:
                    continue
                for tag in {"", query["tag"]}:
                    of_items = sums[query["step"], tag, metric]
                    total, number = of_items.get(item, (0.0, 0.0))
                    of_items[item] = total + query[what], number + (query[count] if count else 1)
    return sums


def _cost(records: Iterable[Record], step: int, items: Set[str]) -> dict[str, float]:
    """Means over some items of what the step took and of what they took as a whole."""
    whole = [record for record in records if record["item"] in items]
    at = [entry for record in whole for entry in record["steps"] if entry["step"] == step]
    return {
        "kv_bytes": fmean(entry["kv_bytes"] for entry in at),
        "peak_kv_bytes": fmean(record["peak_kv_bytes"] for record in whole),
        "fold_seconds": fmean(entry["fold_seconds"] for entry in at),
        "ttft_seconds": fmean(entry["ttft_seconds"] for entry in at),
        "seconds": fmean(record["seconds"] for record in whole),
    }


# ---------------------------------------------------------------------- statistics of sums


def _measure(statistic: Callable[..., Array], *methods: Sums) -> tuple[float, tuple[float, float]]:
    """A statistic of the sums of one or more methods on the same items, and its interval."""
    items = sorted(methods[0])  # one order, so that the same items are drawn for every method
    columns = [np.array([sums[item][k] for item in items]) for sums in methods for k in (0, 1)]
    with np.errstate(all="ignore"):
        value = float(statistic(*(column.sum(keepdims=True) for column in columns))[0])
    return value, bootstrap(statistic, *columns) if len(items) > 1 else (math.nan, math.nan)


def _ratio(metric: str) -> Callable[..., Array]:
    if metric == "perplexity":
        return lambda nll, tokens: np.exp(nll / tokens)
    return lambda total, number: total / number


def _share(none: Array, n: Array, full: Array, f: Array, own: Array, m: Array) -> Array:
    """The recovered share; not a number where context is worth nothing at all."""
    worth = np.abs(none / n - full / f) > 1e-6
    return recovered_share(none / n, np.where(worth, full / f, np.nan), own / m)


def _share_gap(*sums: Array) -> Array:
    return np.asarray(_share(*sums[:4], *sums[4:6]) - _share(*sums[:4], *sums[6:]))


def _gain_growth(*sums: Array) -> Array:
    (none, n, own, m), (earlier_none, k, earlier, j) = sums[:4], sums[4:]
    return np.asarray((none / n - own / m) - (earlier_none / k - earlier / j))


def _gap(own: Array, m: Array, full: Array, f: Array) -> Array:
    return np.asarray(own / m - full / f)
