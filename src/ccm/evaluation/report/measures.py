"""What the rows say: the metric of a task, differences with intervals, claims, and where quality is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from .load import Results, Row

#: Resampling fewer items than this says nothing.
FEW = 5
#: A step as large as this is no number of segments: streams count the tokens that were read.
STREAM_STEP = 1024


@dataclass(frozen=True)
class Metric:
    """How a metric is read. ``lost`` names the unit of a difference."""

    name: str
    title: str
    higher: bool
    digits: int
    lost: str


#: In the order in which a task's main one is chosen.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", True, 3, "accuracy"),
        Metric("f1", "F1", True, 3, "F1"),
        Metric("em", "exact match", True, 3, "exact match"),
        Metric("rouge_l", "ROUGE-L", True, 3, "ROUGE-L"),
        Metric("perplexity", "perplexity", False, 2, "nats per token"),
        Metric("group_accuracy", "accuracy of groups", True, 3, "accuracy of groups"),
    )
}
#: What methods are compared by where there are perplexities: it does not hang on how hard the items are.
SHARE = Metric("recovered_share", "recovered share", True, 3, "recovered share")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def is_stream(results: Results, task: str) -> bool:
    return max(row.step for row in results.rows if row.task == task) >= STREAM_STEP


def metrics_of(results: Results, task: str, tag: str = "") -> list[Metric]:
    """The metrics of a task, its main one first."""
    return _metrics({row.metric for row in results.rows if (row.task, row.tag) == (task, tag)})


def metrics_of_kinds(results: Results, task: str) -> list[Metric]:
    """The metrics that a task has by kind of query."""
    return _metrics({row.metric for row in results.rows if row.task == task and row.tag})


def _metrics(have: set[str]) -> list[Metric]:
    return [metric for name, metric in METRICS.items() if name in have]


def estimate(row: Row) -> Estimate:
    return Estimate(
        row.value,
        row.value if row.ci_low is None else row.ci_low,
        row.value if row.ci_high is None else row.ci_high,
    )


def gain(metric: Metric, own: Estimate, other: Estimate) -> Estimate:
    """How much better ``own`` is than ``other``; of perplexities in nats per token.

    The interval is made of the two intervals as if they were independent (MOVER: Zou and Donner, 2008). The methods
    answer the same queries, so it is wider than a paired one.
    """
    a, b = _upward(metric, own), _upward(metric, other)
    value = a.value - b.value
    return Estimate(
        value,
        value - math.hypot(a.value - a.low, b.high - b.value),
        value + math.hypot(a.high - a.value, b.value - b.low),
    )


def _upward(metric: Metric, number: Estimate) -> Estimate:
    """On a scale where more is better."""
    if metric.name == "perplexity":
        return Estimate(-math.log(number.value), -math.log(number.high), -math.log(number.low))
    if metric.higher:
        return number
    return Estimate(-number.value, -number.high, -number.low)


def overall(results: Results, task: str, method: str, metric: Metric) -> Estimate | None:
    """What a method reaches in a task: at the last step, or over all blocks of a stream."""
    if is_stream(results, task):
        return pooled(results.of(task, metric.name).get(method, []))
    row = results.last(task, method, metric.name)
    return None if row is None else estimate(row)


def pooled(rows: Sequence[Row]) -> Estimate | None:
    """Perplexity over the blocks of a stream, each as large as the others and independent of them."""
    if not rows:
        return None
    logs = [Estimate(*(math.log(number) for number in (e.value, e.low, e.high))) for e in map(estimate, rows)]
    mean = fmean(log.value for log in logs)
    below = math.hypot(*(log.value - log.low for log in logs)) / len(logs)
    above = math.hypot(*(log.high - log.value for log in logs)) / len(logs)
    return Estimate(math.exp(mean), math.exp(mean - below), math.exp(mean + above))


def slowdown(rows: Sequence[Row]) -> float | None:
    """How many times as long a segment of a stream takes in its last quarter as in its first: medians over blocks."""
    seconds = [(row.fold_seconds or 0.0) + (row.ttft_seconds or 0.0) for row in rows]
    quarter = max(1, len(seconds) // 4)
    first, last = median(seconds[:quarter]), median(seconds[-quarter:])
    return last / first if first else None


def kv_bytes(results: Results, task: str, method: str) -> float | None:
    """Bytes of keys and values that are read at the last step."""
    metric = metrics_of(results, task)
    row = results.last(task, method, metric[0].name) if metric else None
    return None if row is None else row.kv_bytes


# ---------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Finding:
    """A claim and what was measured.

    Attributes:
        claim: in words.
        task: where.
        metric: of the difference.
        gain: of the better side over the other, as the claim has it.
        kv: bytes of the two sides.
        n: items behind it, or blocks of a stream.
        blocks: whether they are blocks.
        verdict: "held", "not held", or "open" where the interval has both signs, is nothing but 0, or rests on fewer
            than ``FEW`` items (of a stream: on one block).
    """

    claim: str
    task: str
    metric: Metric
    gain: Estimate
    kv: tuple[float | None, float | None]
    n: int
    blocks: bool = False

    @property
    def of_full(self) -> bool:
        """Whether it is about full context, and so about the task and not about memories."""
        return self.claim.startswith("`full`")

    @property
    def verdict(self) -> str:
        if self.n < (2 if self.blocks else FEW) or self.gain.low == self.gain.high == 0:
            return "open"
        return "held" if self.gain.low >= 0 else "not held" if self.gain.high <= 0 else "open"


#: (better, relation, worse): whether there is anything to keep, then what the paper shows, of methods that had the
#: same short training
ORDER = (
    ("full", ">", "none"),
    ("ccm-concat-short", "≥", "ccm-merge-short"),
    ("ccm-concat-short", ">", "gisting-online"),
    ("ccm-merge-short", ">", "gisting-online"),
    ("ccm-concat-short", ">", "compressive"),
    ("ccm-merge-short", ">", "compressive"),
    ("ccm-concat-short", ">", "autocompressor"),
    ("ccm-concat-short", ">", "mean-pool"),
    ("ccm-concat", "≥", "ccm-merge"),
)


def is_ccm(method: str) -> bool:
    return method.startswith("ccm-")


def is_window(method: str) -> bool:
    return base(method) in ("streaming-llm", "window")


def base(method: str) -> str:
    """The method's name without options and without the one whose bytes it has."""
    return method.split("@")[0].split(":")[0]


def orderings(results: Results) -> list[Finding]:
    """The paper's order of methods, and every memory against a window of its own bytes, task by task."""
    pairs = [*ORDER]
    pairs += [(name.split("@", 1)[1], ">", name) for name in results.methods if "@" in name]
    found = []
    for better, relation, worse in pairs:
        for task in results.tasks:
            for metric in _compared(results, task):
                if better == "full" and metric is SHARE:  # 1 by definition
                    continue
                gained, n = _gained(results, task, metric, better, worse)
                if gained:
                    kv = kv_bytes(results, task, better), kv_bytes(results, task, worse)
                    claim = f"`{better}` {relation} `{worse}`"
                    blocks = is_stream(results, task)
                    found.append(Finding(claim, task, metric, gained, kv, n, blocks))
    return found


def _gained(
    results: Results, task: str, metric: Metric, better: str, worse: str
) -> tuple[Estimate | None, int]:
    """The gain of one method over another and the items, or blocks of a stream, behind it."""
    if is_stream(results, task):
        return _over_blocks(*(results.of(task, metric.name).get(name, []) for name in (better, worse)))
    own, other = (results.last(task, name, metric.name) for name in (better, worse))
    if not own or not other:
        return None, 0
    if paired := results.get(task, better, own.step, f"{metric.name} over {worse}"):
        return estimate(paired), paired.n
    if paired := results.get(task, worse, own.step, f"{metric.name} over {better}"):
        turned = estimate(paired)
        return Estimate(-turned.value, -turned.high, -turned.low), paired.n
    return gain(metric, estimate(own), estimate(other)), min(own.n, other.n)


def _over_blocks(own: Sequence[Row], other: Sequence[Row]) -> tuple[Estimate | None, int]:
    """The mean gain in nats over the blocks that both have, with the interval of a mean of independent numbers."""
    beside = {row.step: row.value for row in other}
    gains = [math.log(beside[row.step] / row.value) for row in own if row.step in beside]
    if not gains:
        return None, 0
    half = _student(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    mean = fmean(gains)
    return Estimate(mean, mean - half, mean + half), len(gains)


def _compared(results: Results, task: str) -> list[Metric]:
    main = metrics_of(results, task)[:1]
    plain = not is_stream(results, task) and results.steps(task, SHARE.name)
    return [SHARE] if main == [METRICS["perplexity"]] and plain else main


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, to within 0.01."""
    small = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    return small[freedom - 1] if freedom <= len(small) else 1.96 + 2.37 / freedom + 2.8 / freedom**2


def growth(results: Results) -> list[Finding]:
    """Whether quality grows from the first time step to the last, of full context and of CCM; perplexities as the
    gain over no context."""
    found = []
    for row in results.rows:
        name, _, step = row.metric.partition(" since ")
        if not step or not (row.method == "full" or is_ccm(row.method)):
            continue
        first = results.get(row.task, row.method, int(step), name)
        if first and (metric := METRICS[name]) == metrics_of(results, row.task)[0]:
            claim = f"`{row.method}`: t = {row.step} > t = {step}"
            kv = row.kv_bytes, first.kv_bytes
            found.append(Finding(claim, row.task, metric, estimate(row), kv, row.n))
    return found


# ---------------------------------------------------------------------- where quality is lost


@dataclass(frozen=True)
class Loss:
    """What a method lacks against full context in one kind of query, over n items; positive is worse."""

    task: str
    tag: str
    method: str
    metric: Metric
    lost: Estimate
    full: float
    n: int

    @property
    def kind(self) -> str:
        return f"{self.task} · {self.tag}" if self.tag else self.task


def losses(results: Results) -> list[Loss]:
    """All losses against "full" at the last step of each kind of query, worst first."""
    found = []
    for task in results.tasks:
        if is_stream(results, task):
            continue
        for tag in results.tags(task) or [""]:
            for metric in metrics_of(results, task, tag)[:1]:
                full = results.last(task, "full", metric.name, tag)
                for method in results.methods:
                    own = results.last(task, method, metric.name, tag)
                    if method not in ("none", "full") and own and full:
                        lost = _gap(results, own) or gain(metric, estimate(full), estimate(own))
                        found.append(Loss(task, tag, method, metric, lost, full.value, own.n))
    return sorted(found, key=lambda loss: -loss.lost.value)


def _gap(results: Results, own: Row) -> Estimate | None:
    """The paired gap of accuracies, where it is stored."""
    row = results.get(own.task, own.method, own.step, "accuracy_gap", own.tag)
    if row is None or own.metric != "accuracy":
        return None
    gap = estimate(row)
    return Estimate(-gap.value, -gap.high, -gap.low)
