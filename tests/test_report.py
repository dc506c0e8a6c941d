"""Stored results as tables, figures and a page."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from ccm.cli import main
from ccm.errors import ConfigError, DataError
from ccm.evaluation.report import Results, Row, build, load, read
from ccm.evaluation.report.measures import METRICS, Estimate, gain, growth, losses, orderings, pooled
from ccm.evaluation.report.tables import (
    findings_table,
    glance,
    kinds_table,
    losses_tables,
    markdown,
    number,
    signed,
    steps_table,
    with_interval,
)

STEPS = (0, 1, 2, 4, 8, 16)
#: method -> (strength from 0 to 1, KV bytes a step, KV bytes at most)
METHODS = {
    "none": (0.0, 0, 0),
    "full": (1.0, 1_500_000, 10**9),
    "ccm-concat": (0.92, 184_320, 10**9),
    "ccm-merge": (0.85, 737_280, 737_280),
    "ccm-merge:rule=ema": (0.83, 737_280, 737_280),
    "ccm-merge:sink=4,window=64": (0.97, 900_000, 3_200_000),
    "streaming-llm@ccm-concat": (0.55, 184_320, 10**9),
    "streaming-llm@ccm-merge": (0.45, 737_280, 737_280),
    "streaming-llm:sink=0@ccm-concat": (0.4, 184_320, 10**9),
    "gisting": (0.7, 184_320, 184_320),
    "gisting-online": (0.6, 184_320, 10**9),
    "compressive": (0.66, 184_320, 10**9),
    "mean-pool": (0.3, 184_320, 10**9),
    "summary": (0.35, 600_000, 2_000_000),
}
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "conversation": ("perplexity", ()),
    "icl": (
        "accuracy",
        ("intent", "spam", "verb supersense", "fine foods", "fortune topic", "debate speaker", "language id"),
    ),
    "personalization": ("accuracy", ()),
    "squad": ("f1", ("distance 0", "distance 1", "distance 3", "distance 7")),
    "updates": ("accuracy", ("name", "number", "order", "preference")),
}
BOUNDED = "ccm-concat:sink=4,window=128,rule=bounded"
STREAMED = (
    BOUNDED,
    "ccm-merge:sink=4,window=128",
    f"streaming-llm@{BOUNDED}",
    f"streaming-llm:sink=0@{BOUNDED}",
)
ABOUT: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "adapters": {"ccm-concat": "f1b6.a015-59d1", "ccm-merge": "f1b6.a015-ae78"},
    "seeds": [0],
    "versions": {"ccm": "0.1.0", "torch": "2.13.0"},
    "revision": "abcdef0",
    "settings": {"limits": {"conversation": 20, "icl": 16}},
    "machine": "2 cores",
}


def made_up(
    suite: str = "quick",
    methods: tuple[str, ...] = tuple(METHODS),
    tasks: tuple[str, ...] = ("conversation", "icl", "stream"),
    seed: int = 0,
) -> dict[str, Any]:
    """A file as ``ccm eval`` writes it, with numbers as they might be; nothing of it was measured."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for task, method in itertools.product(TASKS, methods):
        metric, tags = TASKS[task]
        if task in tasks:
            strength, step_bytes, most = METHODS[method]
            for step in STEPS:
                held = min(step * step_bytes, most)
                common = {
                    "task": task, "method": method, "step": step, "n": 20, "kv_bytes": held,
                    "peak_kv_bytes": held * 1.1, "fold_seconds": 0.11, "ttft_seconds": 0.08, "seconds": 12.5,
                }  # fmt: skip
                for k, tag in enumerate(("", *tags)):
                    gained = strength * (1 - math.exp(-step / 4)) * (1 - 0.12 * k) + rng.uniform(-0.01, 0.01)
                    if metric == "perplexity":
                        value, half = 93 * math.exp(-0.8 * gained), 3.0
                    else:
                        value, half = 0.3 + 0.5 * gained, 0.05
                    bounds = {"value": value, "ci_low": value - half, "ci_high": value + half}
                    rows.append({**common, "tag": tag, "metric": metric, **bounds})
                    if metric == "accuracy":
                        gap = -0.5 * (1 - strength) * (1 - math.exp(-step / 4)) * (1 + 0.2 * k)
                        paired = {"value": gap, "ci_low": gap - 0.02, "ci_high": gap + 0.02}
                        rows.append({**common, "tag": tag, "metric": "accuracy_gap", **paired})
                if metric == "perplexity" and step:
                    share = {"value": strength, "ci_low": strength - 0.05, "ci_high": strength + 0.04}
                    rows.append({**common, "tag": "", "metric": "recovered_share", **share})
    for method in STREAMED if "stream" in tasks else ():
        for block in range(1, 41):
            level = 34 if method.startswith("ccm") else 1500 if "sink=0@" in method else 37
            value = level * math.exp(0.1 * math.sin(block))
            rows.append(
                {
                    "task": "stream", "method": method, "step": 2048 * block, "tag": "", "metric": "perplexity",
                    "value": value, "ci_low": value * 0.97, "ci_high": value * 1.03, "n": 3,
                    "kv_bytes": 3_200_000, "peak_kv_bytes": 3_300_000,
                    "fold_seconds": 0.1 + 0.002 * rng.random(), "ttft_seconds": 0.05, "seconds": 900,
                }
            )  # fmt: skip
    return {
        "schema": 1,
        "suite": suite,
        "rows": rows,
        **ABOUT,
        "skipped": {"autocompressor": "adapter not found"},
    }


def stored(folder: Path, content: Any, name: str = "quick.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read(stored(tmp_path_factory.mktemp("results"), made_up()))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page and figures of two suites."""
    folder = tmp_path_factory.mktemp("report")
    stored(folder, made_up())
    few = made_up("second", ("none", "full", "ccm-merge"), ("icl", "stream"), seed=1)
    stored(folder, few, "second.json")
    assert main(["report", str(folder), "--out", str(folder / "docs")]) == 0
    return folder / "docs"


# ---------------------------------------------------------------------- the page


def test_every_figure_is_on_the_page_and_every_row_in_a_table(written: Path, results: Results) -> None:
    page = (written / "results.md").read_text()
    figures = sorted(path.name for path in (written / "figures").iterdir())
    assert figures == sorted(
        [
            f"{kind}-{suite}.png"
            for kind in ("steps", "pareto", "kinds", "stream")
            for suite in ("quick", "second")
        ]
    )
    assert all(page.count(f"(figures/{name})") == 1 for name in figures)
    assert all((written / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    for row in results.rows:
        if row.metric in ("accuracy", "f1") and not row.tag:
            assert f"{row.value:.3f} <sub>{row.ci_low:.3f} to {row.ci_high:.3f}</sub>" in page


def test_the_page_says_what_is_missing_and_how_it_was_made(written: Path) -> None:
    page = (written / "results.md").read_text()
    assert "`autocompressor` has no rows: adapter not found" in page
    for said in ("SmolLM2-135M-Instruct", "f1b6.a015-59d1", "settings.limits.icl | 16", "abcdef0", "2 cores"):
        assert said in page


def test_other_weights_of_the_same_name_are_told(tmp_path: Path) -> None:
    """An adapter that was trained on between two suites; the control has the same weights in both."""
    old, new = (made_up(suite, ("none", "full", "ccm-concat"), ("icl",)) for suite in ("old", "quick"))
    results = [read(stored(tmp_path, content, f"{content['suite']}.json")) for content in (old, new)]
    assert "other weights" not in build(results)[0]
    old["adapters"] |= {"ccm-concat": "f1b6.a015-0000"}
    page, _ = build([read(stored(tmp_path, old, "old.json")), results[1]])
    assert page.count("Not the adapters of suite `quick`, but other weights: `ccm-concat`.") == 1
    assert page.count("Not the adapters of suite `old`, but other weights: `ccm-concat`.") == 1


def test_the_same_rows_give_the_same_bytes(written: Path, results: Results) -> None:
    rows = tuple(row for row in results.rows if row.method in ("none", "full", "ccm-merge", STREAMED[1]))
    some = Results("quick", tuple(row for row in rows if row.task in ("icl", "stream")))
    first, second = build([some]), build([some])
    assert first == second and len(first[1]) == 4
    others = tuple(Row(**{**vars(row), "value": row.value * 1.1}) for row in some.rows)
    changed = build([Results("quick", others)])
    assert changed[0] != first[0] and all(changed[1][name] != first[1][name] for name in first[1])


def test_a_memory_without_effect_is_named(tmp_path: Path) -> None:
    content = made_up(methods=("none", "full", "ccm-merge"), tasks=("conversation",))
    none = content["rows"][0]
    content["rows"].append({**none, "method": "ccm-merge", "step": 16, "metric": "no_effect", "value": 1.0})
    page, _ = build([read(stored(tmp_path, content))])
    assert "conversation: ccm-merge changed nothing" in page
    content["warnings"] = ["conversation: ccm-merge could not take 2 items"]
    page, _ = build([read(stored(tmp_path, content))])
    assert "could not take 2 items" in page


@pytest.mark.slow  # draws every figure
def test_committed_page_is_what_the_stored_results_give() -> None:
    root = Path(__file__).parent.parent
    files = sorted((root / "results" / "eval").glob("*.json"))
    if not files:
        pytest.skip("no results are stored yet")
    page, figures = build(load(files))
    assert (root / "docs" / "results.md").read_text() == page
    assert {path.name for path in (root / "docs" / "figures").iterdir()} >= set(figures)


# ---------------------------------------------------------------------- tables


def row(method: str, value: float, step: int = 4, **more: Any) -> Row:
    settings = {"task": "toy", "tag": "", "metric": "accuracy", "n": 10, "kv_bytes": 1e6, **more}
    return Row(method=method, value=value, step=step, **settings)


def test_a_table_holds_values_intervals_and_bytes() -> None:
    rows = (
        row("none", 0.5, ci_low=0.4, ci_high=0.6, kv_bytes=0.0),
        row("full", 0.9, kv_bytes=2.5e6),
        row("full", 0.8, step=2),
        row("full", -0.25, metric="accuracy_gap"),
    )
    table = steps_table(Results("s", rows), "toy", METRICS["accuracy"]).splitlines()
    assert table == [
        "| method | t = 2, n = 10 | t = 4, n = 10 | KV bytes | accuracy gap to full |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `none` |  | 0.500 <sub>0.400 to 0.600</sub> | 0.00 MB |  |",
        "| `full` | 0.800 | 0.900 | 2.50 MB | −0.250 |",
    ]
    assert "| `none` | 0.0 % | 0.50 <sub>0.40 to 0.60</sub> |" in glance(Results("s", rows))


def test_kinds_are_in_order_of_their_numbers() -> None:
    rows = tuple(
        row("full", 0.5, tag=tag, n=n) for n, tag in enumerate(("distance 10", "distance 9", "name"), 1)
    )
    results = Results("s", rows)
    assert results.tags("toy") == ["distance 9", "distance 10", "name"]
    header = kinds_table(results, "toy", METRICS["accuracy"]).splitlines()[0]
    assert header == "| method | distance 9, n = 2 | distance 10, n = 1 | name, n = 3 |"


def test_numbers_have_real_minus_signs_and_bars_do_not_break_tables() -> None:
    assert [number(x, 2) for x in (-0.001, -0.5, 1234.5, 0.0)] == ["0.00", "−0.50", "1,234", "0.00"]
    assert [signed(x, 2) for x in (-0.001, -0.5, 0.5, 0.0)] == ["0.00", "−0.50", "+0.50", "0.00"]
    assert with_interval(Estimate(1.0, 0.5, 2.0), 1) == "1.0 <sub>0.5 to 2.0</sub>"
    assert markdown(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


# ---------------------------------------------------------------------- what follows from rows


def test_a_claim_is_held_not_held_or_open() -> None:
    def verdicts(concat: float, window: float, half: float) -> list[str]:
        pair = (("ccm-concat", concat), ("streaming-llm@ccm-concat", window))
        rows = [row(name, value, ci_low=value - half, ci_high=value + half) for name, value in pair]
        return [finding.verdict for finding in orderings(Results("s", tuple(rows)))]

    assert verdicts(0.8, 0.5, 0.1) == ["held"]
    assert verdicts(0.5, 0.8, 0.1) == ["not held"]
    assert verdicts(0.5, 0.6, 0.1) == ["open"]
    sure = (row("ccm-concat", 0.8, n=1), row("streaming-llm@ccm-concat", 0.5, n=1))
    assert orderings(Results("s", sure))[0].verdict == "open", "one item proves nothing"


def test_differences_take_better_as_up_and_add_the_errors() -> None:
    a, b = Estimate(0.8, 0.77, 0.84), Estimate(0.5, 0.47, 0.54)
    better = gain(METRICS["accuracy"], a, b)
    assert better.value == pytest.approx(0.3)
    assert (better.low, better.high) == pytest.approx((0.3 - 0.05, 0.3 + 0.05))
    lower = gain(METRICS["perplexity"], Estimate(20, 19, 21), Estimate(40, 38, 42))
    assert lower.value == pytest.approx(math.log(2))
    assert lower.low < lower.value < lower.high


def test_perplexities_are_compared_by_recovered_share_and_streams_by_common_blocks() -> None:
    conversation = [
        row(name, ppl, task="conversation", metric="perplexity")
        for name, ppl in (("ccm-concat", 50.0), ("ccm-merge", 60.0))
    ] + [
        row(name, share, task="conversation", metric="recovered_share")
        for name, share in (("ccm-concat", 0.7), ("ccm-merge", 0.9))
    ]
    stream = [
        row(name, ppl, step=2048 * block, task="stream", metric="perplexity")
        for name, levels in (("ccm-concat", (20.0, 40.0)), ("ccm-merge", (10.0, 10.0, 99.0)))
        for block, ppl in enumerate(levels, 1)
    ]
    by_task = {f.task: f for f in orderings(Results("s", tuple(conversation + stream)))}
    assert by_task["conversation"].metric.name == "recovered_share"
    assert by_task["conversation"].gain.value == pytest.approx(-0.2)
    stream_gain = by_task["stream"].gain  # the third block is of one method only
    assert stream_gain.value == pytest.approx((math.log(0.5) + math.log(0.25)) / 2)
    half = 12.71 * (math.log(2) / math.sqrt(2)) / math.sqrt(2)
    assert stream_gain.high - stream_gain.value == pytest.approx(half)
    assert by_task["stream"].n == 2


def test_growth_is_of_ccm_and_of_full_context_in_the_main_metric() -> None:
    rows = [row(name, 0.5, step=step) for name in ("none", "full", "ccm-merge", "gisting") for step in (1, 8)]
    rows += [
        row(name, value, step=8, metric="accuracy since 1", ci_low=value - 0.1, ci_high=value + 0.1)
        for name, value in (("none", 0.0), ("full", 0.3), ("ccm-merge", 0.2), ("gisting", 0.2))
    ]
    rows += [row("full", 0.2, step=step, metric="f1") for step in (1, 8)]
    rows += [row("full", 0.1, step=8, metric="f1 since 1")]
    full, memory = growth(Results("s", tuple(rows)))
    assert (full.claim, full.verdict, full.of_full) == ("`full`: t = 8 > t = 1", "held", True)
    assert (memory.claim, memory.gain.value) == ("`ccm-merge`: t = 8 > t = 1", pytest.approx(0.2))


def test_a_task_without_worth_in_its_context_is_named_beside_the_claims() -> None:
    def page(full: float) -> str:
        pairs = (("none", 0.3), ("full", full), ("ccm-concat", 0.5), ("ccm-merge", 0.4))
        rows = [row(name, value, ci_low=value - 0.05, ci_high=value + 0.05) for name, value in pairs]
        return build([Results("s", tuple(rows))])[0]

    sentence = "not surely better than none in: "
    assert "Of 1 comparisons" in page(0.9) and sentence not in page(0.9)
    assert "Of 1 comparisons" in page(0.3) and sentence in page(0.3)


def test_blocks_of_a_stream_are_pooled_in_nats() -> None:
    blocks = [
        row("x", ppl, step=2048 * i, ci_low=ppl / 1.1, ci_high=ppl * 1.1) for i, ppl in enumerate((10, 40), 1)
    ]
    whole = pooled(blocks)
    assert whole is not None
    assert whole.value == pytest.approx(20)
    assert whole.high / whole.value == pytest.approx(1.1 ** (math.sqrt(2) / 2))
    assert pooled([]) is None


def test_losses_are_sorted_and_paired_gaps_come_first() -> None:
    rows = [
        row("full", 0.9, tag="name"),
        row("full", 0.8, tag="number"),
        row("ccm-merge", 0.8, tag="name"),
        row("ccm-merge", 0.4, tag="number"),
        row("ccm-merge", -0.41, tag="number", metric="accuracy_gap", ci_low=-0.5, ci_high=-0.3),
        row("mean-pool", 0.3, tag="name"),
    ]
    found = losses(Results("s", tuple(rows)))
    assert [(loss.method, loss.tag) for loss in found] == [
        ("mean-pool", "name"), ("ccm-merge", "number"), ("ccm-merge", "name"),
    ]  # fmt: skip
    assert found[1].lost == Estimate(0.41, 0.3, 0.5)
    lines = losses_tables(Results("s", tuple(rows))).splitlines()[2:]
    assert lines == [  # the kind where CCM loses most comes first
        "| toy · number | 0.800 | **`ccm-merge`** −0.41 |",
        "| toy · name | 0.900 | `mean-pool` −0.60, **`ccm-merge`** −0.10 |",
    ]
    results = Results("s", tuple(rows))
    assert "ccm-concat" not in findings_table(results, orderings(results))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema is 2, expected 1"),
        (lambda c: c.pop("suite"), "key 'suite' is missing"),
        (lambda c: c.update(rows=[]), "rows is empty"),
        (lambda c: c["rows"][3].pop("metric"), "rows[3]: key 'metric' is missing"),
        (lambda c: c["rows"][3].update(value=float("nan")), "rows[3]: value is nan, expected"),
        (lambda c: c["rows"][3].update(step="4"), "rows[3]: step is '4', expected a whole number"),
        (lambda c: c["rows"][3].update(kv_bytes=[1]), "rows[3]: kv_bytes is 'a list', expected"),
        (lambda c: c["rows"].append(c["rows"][3]), "and rows[3] are both"),
        (lambda c: c["rows"][0].update(ci_low=0), "not above 0"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    content = made_up(methods=("none", "full"))
    change(content)
    file = stored(tmp_path, content)
    assert main(["report", str(file), "--out", str(tmp_path / "docs")]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and message in error
    assert not (tmp_path / "docs").exists(), "half-written"


def test_no_file_no_json_and_two_of_one_suite(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load([tmp_path / "absent.json"])
    with pytest.raises(DataError, match="in this folder; run ccm eval"):
        load([tmp_path])
    with pytest.raises(DataError, match="expected JSON"):
        load([stored(tmp_path, "{", "broken.json")])
    (tmp_path / "broken.json").unlink()
    stored(tmp_path, made_up(methods=("none",)))
    stored(tmp_path, made_up(methods=("none",)), "copy.json")
    with pytest.raises(ConfigError, match="both hold suite 'quick'"):
        load([tmp_path])


def test_without_matplotlib_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = stored(tmp_path, made_up(methods=("none", "full")))
    assert main(["report", str(file), "--out", str(tmp_path / "docs")]) == 2
    assert "pip install 'compressed-context-memory[eval]'" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
