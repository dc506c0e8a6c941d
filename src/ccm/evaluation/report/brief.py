"""Five lines on top of each page: what was measured, what there was to keep, what kept it, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..metrics import frontier
from . import tables
from .load import TITLES, Results
from .tables import number, size

#: Fewer items than this leave intervals too wide for a ranking.
_MANY = 30
#: The distance, in turns, that a reader hears of; the longest that is there if it is not.
_FAR = 32


def suite(results: Results) -> list[str]:
    """Lines on a suite."""
    lines = [_measured(results), _worth(results), _best(results), _windows(results), _times(results)]
    return [line for line in lines if line]


def _measured(results: Results) -> str:
    counts = [tables.items(results, task) for task in results.tasks if not results.is_stream(task)]
    model = results.about.get("model", {}).get("name", "")
    tasks, methods = _count(len(results.tasks), "kind of task", "kinds of tasks"), len(results.methods)
    line = f"{tasks} and {_count(methods, 'method', 'methods')}{f', on {model}' if model else ''}"
    if not counts:
        return f"{line}: one text without end."
    items = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    note = " So few items leave wide intervals: read those first." if max(counts) < _MANY else ""
    return f"{line}, {items} items each.{note}"


def _worth(results: Results) -> str:
    known = {task: worth for task in results.tasks if (worth := results.worth(task))}
    good = [
        f"{task} ({number(worth.value, sign=True)}{' nats' if results.main(task) == 'perplexity' else ''})"
        for task, worth in known.items()
        if not results.nothing_to_keep(task)
    ]
    none = [task for task in known if results.nothing_to_keep(task)]
    parts = [f"Full context is better than none on {', '.join(good)}"] if good else []
    parts += [f"there is nothing to keep on {', '.join(none)}"] if none else []
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _best(results: Results) -> str:
    """The best memory of each task that has something to keep."""
    found = []
    for task in results.tasks:
        points = tables.points(results, task)
        memories = {name: point for name, point in points.items() if name not in ("none", "full")}
        if not memories or results.nothing_to_keep(task):
            continue
        most = points.get("full", (0.0, 0.0))[0]
        smaller = {name: point for name, point in memories.items() if not most or point[0] < most}
        name = max(smaller, key=lambda name: (smaller[name][1], -smaller[name][0]), default="")
        if name and ("none" not in points or name in frontier(points)):
            reached = tables.reached(results, task, name)
            metric = TITLES[results.yardstick(task)]
            held = f"{100 * smaller[name][0] / most:.0f} % of the bytes" if most else size(smaller[name][0])
            value = number(reached.value) if reached else ""
            found.append(f"{task} `{name}` ({metric} {value}, {held})")
    return (
        f"Best memory by its figure, of those smaller than full context: {'; '.join(found)}." if found else ""
    )


def _windows(results: Results) -> str:
    verdicts = [
        found.verdict for claim, of in tables.claims(results).items() if "@" in claim for found in of.values()
    ]
    if not verdicts:
        return ""
    held, failed, undecided = map(verdicts.count, ("held", "not held", "open"))
    return (
        f"Of {_count(len(verdicts), 'comparison', 'comparisons')} of a memory with a window cut to its bytes, "
        f"the memory is better in {held}, worse in {failed}; {undecided} are open."
    )


def _times(results: Results) -> str:
    costs = {name: tables.costs(results, name)[1:] for name in results.methods}
    memories = [of for name, of in costs.items() if name not in ("none", "full") and len(of) == 2]
    machine = results.about.get("machine", {})
    if not memories:
        return ""
    fold, first = ([of[k] for of in memories] for k in (0, 1))
    where = (
        f" ({machine['cores']} cores, {machine['device']})" if {"cores", "device"} <= machine.keys() else ""
    )
    return (
        f"Folding a segment took {min(fold, key=_milliseconds)} to {max(fold, key=_milliseconds)}, the first token "
        f"{min(first, key=_milliseconds)} to {max(first, key=_milliseconds)}{where}."
    )


def _milliseconds(text: str) -> int:
    return int(text.removesuffix(" ms").replace(",", ""))


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


# ---------------------------------------------------------------------- benchmarks


def summary(stored: Any) -> list[str]:
    """Lines on what the benchmarks stored, one for each that is there."""
    return [line(stored[name]) for name, line in _LINES.items() if name in stored]


def _quality(result: dict[str, Any]) -> str:
    beside = "window of the same bytes as "
    name, own = next((name, m) for name, m in result["methods"].items() if beside + name in result["methods"])
    window = result["methods"][beside + name]
    return (
        f"Small talk of ten turns ({result['rows']} conversations): {name}, keeps {own['recovered_share']:.2f} of "
        f"what full context is worth in {own['times_less_kv']:.1f} times fewer KV bytes; a window of these bytes "
        f"keeps {window['recovered_share']:.2f}."
    )


def _reach(result: dict[str, Any]) -> str:
    distances = sorted({row["distance"] for row in result["rows"]})
    far = _FAR if _FAR in distances else distances[-1]
    right = {row["method"]: row["accuracy"] for row in result["rows"] if row["distance"] == far}
    name = max(
        (name for name in right if f"window of the same bytes as {name}" in right), key=right.__getitem__
    )
    return (
        f"Facts told {far} turns back ({result['conversations']} of them, chance {result['chance']:.2f}): {name} "
        f"finds {right[name]:.2f} of them, full context {right.get('full', 0):.2f}, a window of the memory's bytes "
        f"{right[f'window of the same bytes as {name}']:.2f}."
    )


def _growth(result: dict[str, Any]) -> str:
    row = min(result["rows"], key=lambda row: row["nbytes_after_all"])
    return (
        f"After {row['turns']:,} turns a memory ({row['session']}) holds {size(row['nbytes_after_all'])}, full "
        f"context {size(row['full_context_nbytes'])}."
    )


def _fold_cost(result: dict[str, Any]) -> str:
    ratios = [row["ratio"] for row in result["rows"]]
    return f"Folding a segment takes {min(ratios):.2f} to {max(ratios):.2f} times as long as prefilling it."


def _first_token(result: dict[str, Any]) -> str:
    late, again = (result["seconds"][name]["median"] for name in ("late", "stateless"))
    return (
        f"The server's first token of the 100th turn comes after {late:.2f} s ({result['conversations']} "
        f"conversations), after {again:.2f} s where all of it is read again."
    )


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": _quality,
    "reach": _reach,
    "growth": _growth,
    "fold_cost": _fold_cost,
    "first_token": _first_token,
}
