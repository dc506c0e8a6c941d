"""Stored results as tables, pictures and pages."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ccm.cli import main
from ccm.errors import ConfigError, DataError
from ccm.evaluation.report import Results, Row, benchmarks, load, read
from ccm.evaluation.report.load import Estimate
from ccm.evaluation.report.pages import build, write
from ccm.evaluation.report.tables import (
    by_kind,
    by_step,
    cell,
    claims,
    gain,
    glance,
    markdown,
    number,
    reached,
)

ROOT = Path(__file__).parents[2]
METHODS = ("none", "full", "ccm-concat", "streaming-llm@ccm-concat")


def row(method: str, value: float, step: int = 4, **more: Any) -> Row:
    settings = {"task": "toy", "tag": "", "metric": "accuracy", "n": 10, "kv_bytes": 1e6, **more}
    return Row(method=method, value=value, step=step, **settings)


def results(*rows: Row) -> Results:
    return Results("quick", rows)


def made_up(suite: str = "quick") -> dict[str, Any]:
    """A file as ``ccm eval`` writes it; nothing of it was measured."""
    rows = [
        vars(row(method, 0.2 + 0.1 * i, step, task=task, tag=tag, ci_low=0.1, ci_high=0.9))
        for task, tag, step, (i, method) in itertools.product(
            ("icl", "updates"), ("", "name", "number"), (0, 8), enumerate(METHODS)
        )
    ]
    rows += [
        vars(row(method, level * block, 2048 * block, task="stream", metric="perplexity", fold_seconds=0.1))
        for method, level in zip(METHODS[2:], (34.0, 37.0), strict=True)
        for block in (1, 2, 3)
    ]
    about = {"model": {"name": "tiny"}, "skipped": {"gisting": "adapter not found"}, "warnings": ["icl: odd"]}
    return {"schema": 1, "suite": suite, "rows": rows, "seconds": 3.5, **about}


def stored(folder: Path, content: Any, name: str = "quick.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---------------------------------------------------------------------- pages


def test_a_summary_and_a_page_with_a_picture_of_each_suite(tmp_path: Path) -> None:
    for suite in ("quick", "second"):
        stored(tmp_path, made_up(suite), f"{suite}.json")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "docs")]) == 0
    made = {str(path.relative_to(tmp_path / "docs")) for path in (tmp_path / "docs").rglob("*.*")}
    assert made == {
        "results.md",
        *(f"results/{s}.{end}" for s in ("quick", "second") for end in ("md", "png")),
    }
    summary, page = ((tmp_path / "docs" / name).read_text() for name in ("results.md", "results/quick.md"))
    assert "[quick](results/quick.md): icl, updates, stream" in summary and "held +0.08" in summary
    for said in (
        "`gisting` has no rows: adapter not found", "- icl: odd.", "- model: name tiny", "(quick.png)",
        "| `ccm-concat` | 100.0 % | 33 ms | 0 ms | 0.40 <sub>0.10 to 0.90</sub> |",
        "icl: accuracy at t = 0 · 8", "updates: accuracy of name · number", "| at 6,144 |",
    ):  # fmt: skip
        assert said in page, said
    assert (tmp_path / "docs/results/quick.png").read_bytes().startswith(b"\x89PNG")
    same = [read(tmp_path / "quick.json")]
    assert build(same, {}) == build(same, {}), "the same rows give the same bytes"


def test_the_committed_pages_are_what_the_stored_results_give() -> None:
    folder = ROOT / "results"
    for name, text in write(load([folder]), benchmarks.load([folder])).items():
        assert (ROOT / "docs" / name).read_text() == text, f"{name} is old: run ccm report"
        assert text.count("\n") <= 180, f"{name} is longer than people read"
    pages = {path.stem for path in (ROOT / "docs/results").iterdir()}
    assert pages == {path.stem for path in (folder / "eval").glob("*.json")}, "a page without results"


def test_shares_of_other_sources_are_of_the_rows_that_all_have(tmp_path: Path) -> None:
    nats = {"none": [10.0, 10.0, 99.0], "full": [6.0, 2.0, 99.0], "window as slots 4": [8.0, 7.0]}
    stores = {
        name: {"sources": {"k": {"source": "books", "nats": found}}}
        for name, found in (("held_out_baselines", nats), ("held_out_mine", {"slots 4": [7.0, 4.0, 99.0]}))
    }
    stored(tmp_path, made_up("reach"), "reach.json")  # a suite under the name of a benchmark
    for name, content in stores.items():
        stored(tmp_path, content, f"{name}.json")
    title, table = benchmarks.sections(benchmarks.load([tmp_path]))
    assert "Other sources" in title
    assert table.splitlines()[0] == "| source | window as slots 4 | mine slots 4 | rows |"
    assert table.splitlines()[2] == "| books | 0.42 | 0.75 | 2 |"


def test_memories_without_training_are_compared_row_by_row() -> None:
    nats = {
        "none": [10.0, 10.0],
        "full": [6.0, 2.0],
        "attention-matching": [6.0, 4.0],
        "h2o": [8.0, 7.0, 0.0],
    }
    lone = {"source": "alone", "nats": {name: nats[name] for name in ("none", "full", "attention-matching")}}
    found = {"sources": {"k": {"source": "books", "nats": nats}, "l": lone}}
    (_, table) = benchmarks.sections({"held_out_baselines": found, "held_out_other": found})
    first, *_, of_other, _ = table.split("\n\n")
    assert "attention-matching" in first and of_other.startswith("Without training on other, ")
    beside = table.split("\n\n")[2].splitlines()
    assert beside[0].startswith("| source | attention-matching | streaming-llm |")
    assert beside[2:] == ["| books | 0.83 (0.75 to 1.00) |  |  |  |  |  |  | +0.42 (+0.38 to +0.50) |  | 2 |"]


def test_fitted_entries_in_a_fifth_of_the_bytes_are_compared_row_by_row() -> None:
    base = {
        "none": [10.0, 10.0, 10.0],
        "full": [6.0, 2.0, 2.0],
        "window, a fifth": [10.0, 10.0],
        "attention-matching, a fifth": [8.0, 7.0, 0.0],
        "attention-matching, a fifth, int4": [6.0, 6.0],
    }
    own = {"slots-and-matching, a fifth": [7.0, 7.0], "slots-and-matching, a fifth, int4": [5.0, 5.0]}
    alone = {"source": "alone", "nats": base}
    found = {"sources": {"k": {"source": "books", "nats": base}, "l": alone}}
    adapter = {"sources": {"k": {"source": "books", "nats": own}}}
    (_, table) = benchmarks.sections({"held_out_baselines": found, "held_out_mine": adapter})
    said, beside = table.split("\n\n")[-2:]
    assert "a slot of mine" in said
    header, _, books, mean = beside.splitlines()
    assert header.startswith(
        "| source | window | attention-matching | slots-and-matching | ahead | attention-matching, int4 |"
    )
    cells = "0.00 | 0.42 | 0.50 | +0.08 (0.00 to +0.25) | 0.67 | 0.83 | +0.17 (+0.12 to +0.25)"
    assert books == f"| books | {cells} | 2 |"
    assert mean == f"| **mean** | {cells} |  |"


# ---------------------------------------------------------------------- tables


def test_a_table_holds_values_intervals_and_costs() -> None:
    found = results(
        row("full", 0.9, kv_bytes=2.5e6, fold_seconds=0.1),
        row("full", 0.8, step=2),
        row("none", 0.5, ci_low=0.4, ci_high=0.6, kv_bytes=0.0, ttft_seconds=0.02),
    )
    assert glance(found).splitlines() == [
        "| method | KV of full | to fold a segment | to the first token | toy: accuracy, t = 4, n = 10 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `none` | 0.0 % | 0 ms | 20 ms | **0.50** <sub>0.40 to 0.60</sub> |",
        "| `full` | 100.0 % | 100 ms | 0 ms | **0.90** |",
    ]
    assert by_step(found).splitlines()[2:] == ["| `none` | ? · 0.50 |", "| `full` | 0.80 · 0.90 |"]


def test_kinds_are_in_order_of_their_numbers() -> None:
    found = results(
        *(row("full", n / 4, tag=tag) for n, tag in enumerate(("distance 10", "distance 9", "name")))
    )
    assert by_kind(results(row("full", 0.5), *found.rows)).splitlines()[::2] == [
        "| method | toy: accuracy of distance 9 · distance 10 · name, n = 10 |",
        "| `full` | 0.25 · 0.00 · 0.50 |",
    ]


def test_numbers_have_real_minus_signs_and_bars_do_not_break_tables() -> None:
    assert [number(x) for x in (-0.001, -0.5, 1234.5, 0.0)] == ["0.00", "−0.50", "1,234", "0.00"]
    assert [number(x, sign=True) for x in (-0.001, -0.5, 0.5, 0.0)] == ["0.00", "−0.50", "+0.50", "0.00"]
    assert cell(Estimate(1.0, 0.5, 2.0), 1) == "1.0 <sub>0.5 to 2.0</sub>"
    assert markdown(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


# ---------------------------------------------------------------------- what follows from rows


def test_a_claim_is_held_not_held_or_open() -> None:
    def verdict(value: float, n: int = 10, low: float = 0.1) -> str:
        paired = row(
            "ccm-concat",
            value,
            metric="accuracy over ccm-merge",
            ci_low=value - low,
            ci_high=value + low,
            n=n,
        )
        (found,) = claims(results(row("ccm-concat", 0.5), row("ccm-merge", 0.5), paired)).values()
        return found["toy"].verdict

    assert [verdict(value) for value in (0.3, -0.3, 0.05)] == ["held", "not held", "open"]
    assert verdict(0.3, n=1) == "open", "one item proves nothing"
    assert verdict(0.0, low=0.0) == "open"


def test_a_gain_may_be_stored_the_other_way_round() -> None:
    stored = row("ccm-merge", 0.2, metric="accuracy over ccm-concat", ci_low=0.1, ci_high=0.4)
    found = gain(results(row("ccm-merge", 0.5), stored), "toy", "ccm-concat", "ccm-merge")
    assert found == Estimate(-0.2, -0.4, -0.1)
    assert gain(results(row("ccm-merge", 0.5)), "toy", "ccm-concat", "ccm-merge") is None


def test_perplexities_are_compared_by_recovered_share_and_streams_by_common_blocks() -> None:
    talk = [
        row("ccm-concat", value, task="talk", metric=metric)
        for metric, value in (
            ("perplexity", 50.0),
            ("recovered_share", 0.7),
            ("recovered_share over ccm-merge", -0.2),
        )
    ]
    stream = [
        row(name, level, step=2048 * block, task="stream", metric="perplexity")
        for name, levels in (("ccm-concat", (20.0, 40.0)), ("ccm-merge", (10.0, 10.0, 99.0)))
        for block, level in enumerate(levels, 1)
    ]
    found = claims(results(*talk, *stream))["`ccm-concat` > `ccm-merge`"]
    assert found["talk"].value == -0.2
    blocks = found["stream"]  # the third block is of one method only
    assert blocks.value == pytest.approx((math.log(0.5) + math.log(0.25)) / 2)
    assert blocks.high - blocks.value == pytest.approx(12.71 * math.log(2) / 2)
    one = claims(results(*stream[1:]))["`ccm-concat` > `ccm-merge`"]["stream"]
    assert one.low == one.high == pytest.approx(math.log(0.25)) and one.verdict == "open", (
        "one block proves nothing"
    )


def test_growth_is_of_ccm_and_of_full_context_in_the_main_metric() -> None:
    rows = [row(name, 0.5) for name in ("none", "full", "ccm-merge", "gisting")]
    rows += [row(name, 0.2, metric="accuracy since 1") for name in ("full", "ccm-merge", "gisting")]
    rows += [row("full", 0.5, metric="f1"), row("full", 0.1, metric="f1 since 1", step=8)]
    assert claims(results(*rows)) == {
        f"`{name}`: last t > first t": {"toy": Estimate(0.2, 0.2, 0.2)} for name in ("full", "ccm-merge")
    }


def test_blocks_of_a_stream_are_pooled_in_nats() -> None:
    blocks = [
        row("x", ppl, step=2048 * i, metric="perplexity", ci_low=ppl / 1.1, ci_high=ppl * 1.1)
        for i, ppl in enumerate((10, 40), 1)
    ]
    whole = reached(results(*blocks), "toy", "x")
    assert whole and whole.value == pytest.approx(20)
    assert whole.high / whole.value == pytest.approx(1.1 ** (math.sqrt(2) / 2))
    assert reached(results(*blocks), "toy", "y") is None


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema is 2, expected 1"),
        (lambda c: c.pop("suite"), "key 'suite' is missing"),
        (lambda c: c.update(rows=[]), "rows is empty"),
        (lambda c: c.update(rows=[3]), "rows[0]: key 'task' is missing"),
        (lambda c: c["rows"][3].pop("metric"), "rows[3]: key 'metric' is missing"),
        (lambda c: c["rows"][3].update(value=float("nan")), "rows[3]: value is nan, expected"),
        (lambda c: c["rows"][3].update(step="4"), "rows[3]: step is '4', expected a whole number"),
        (lambda c: c["rows"][3].update(kv_bytes=[1]), "rows[3]: kv_bytes is [1], expected a finite number"),
        (
            lambda c: c["rows"].append(c["rows"][3]),
            "is there twice (icl, streaming-llm@ccm-concat, accuracy)",
        ),
        (lambda c: c["rows"][-1].update(ci_low=0), "not above 0"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    content = made_up()
    change(content)
    file = stored(tmp_path, content)
    assert main(["report", str(file), "--out", str(tmp_path / "docs")]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and message in error
    assert not (tmp_path / "docs").exists(), "half-written"


def test_no_file_no_json_and_two_of_one_suite(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load([tmp_path / "absent.json"])
    with pytest.raises(DataError, match="in this folder; run ccm eval"):
        load([tmp_path])
    with pytest.raises(DataError, match="expected JSON"):
        load([stored(tmp_path, "{", "broken.json")])
    (tmp_path / "broken.json").unlink()
    stored(tmp_path, made_up())
    stored(tmp_path, made_up(), "copy.json")
    with pytest.raises(ConfigError, match="both hold suite 'quick'"):
        load([tmp_path])


def test_what_the_leaderboard_stored_beside_them_is_no_suite(tmp_path: Path) -> None:
    """``ccm eval``, ``ccm leaderboard`` and ``ccm report`` share a folder when nobody names one."""
    board = json.loads((ROOT / "results" / "leaderboard.json").read_text())
    file = stored(tmp_path, board, "leaderboard.json")
    with pytest.raises(DataError, match="in this folder; run ccm eval"):
        load([tmp_path])
    with pytest.raises(DataError, match="is of ccm leaderboard"):
        load([file])
    stored(tmp_path, made_up())
    assert [result.suite for result in load([tmp_path])] == ["quick"]


def test_without_matplotlib_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(stored(tmp_path, made_up())), "--out", str(tmp_path / "docs")]) == 2
    assert "pip install 'compressed-context-memory[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
