"""What ``ccm eval`` and ``ccm report`` say of figures: where they are from, their items, what they are worth."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_evaluation import CHATS, evaluation, in_hand, make_item, no_clock, plan, record, write
from test_report import made_up, results, row, stored
from tiny import saved_folder, tiny_tokenizer

from ccm import cli
from ccm.cli import measured
from ccm.cli.report import PAGES
from ccm.evaluation import runner, summary
from ccm.evaluation.items import Choice, Generation, Item, Likelihood
from ccm.evaluation.metrics import frontier
from ccm.evaluation.records import TAKEN
from ccm.evaluation.report import brief, tables
from ccm.evaluation.report.load import read
from ccm.evaluation.report.pages import write as pages

ROOT = Path(__file__).parents[2]


def in_words(table: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- where figures come from


def test_records_of_the_same_settings_are_taken_over_and_marked(tmp_path: Path) -> None:
    texts = ("none", "full", "streaming-llm@mean-pool", "mean-pool")
    shipped = evaluation(plan({}, *texts, limit=2)).run(tmp_path / "shipped")
    mine = evaluation(plan({}, *texts, limit=3))
    before = mine.take_over(tmp_path / "mine", tmp_path / "shipped")
    assert (before.shipped, before.earlier, before.wanted) == (8, 0, 12)
    result = mine.run(tmp_path / "mine")
    assert result["taken_over"] == 8 and "taken_over" not in shipped
    lines = [json.loads(line) for line in (tmp_path / "mine" / "records.jsonl").read_text().splitlines()]
    assert {line["item"] for line in lines if TAKEN not in line} == {"item 2"}, "the rest is not measured"
    again = mine.take_over(tmp_path / "mine", tmp_path / "shipped")
    assert (again.shipped, again.earlier) == (8, 4)
    assert mine.take_over(tmp_path / "anew").earlier == 0, "nothing without their folder"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, 4),
        ({"versions": {"ccm": "0.0.1"}}, 0),
        ({"seed": 1}, 0),
        ({"tasks": {"toy": {"options": {"steps": [1]}}}}, 0),
        ({"methods": {"mean-pool": "another"}}, 2),  # nor the window of its size
    ],
)
def test_records_of_other_settings_are_not(change: dict[str, Any], taken: int, tmp_path: Path) -> None:
    texts = ("none", "full", "mean-pool", "streaming-llm@mean-pool")
    evaluation(plan({}, *texts, limit=1)).run(tmp_path / "shipped")
    path = tmp_path / "shipped" / "settings.json"
    settings = json.loads(path.read_text())
    for name, value in change.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(settings))
    before = evaluation(plan({}, *texts, limit=1)).take_over(tmp_path / "mine", tmp_path / "shipped")
    assert before.shipped == taken


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_folder(tmp_path_factory.mktemp("trust") / "model")


def test_the_command_says_what_it_took_over_and_measures_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl", CHATS)
    command = ["eval", "chats.jsonl", "--methods", "none,full", "--model", model, "--threads", "1"]
    assert cli.main([*command, "--out", "shipped/chats"]) == 0
    assert "4 measurements, 4 to do\n" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("shipped").rglob("*.json*")}
    monkeypatch.setattr(runner, "SHIPPED", Path("shipped"))
    assert cli.main(command) == 0
    said = "4 taken over from the records of this library, nothing is measured now; --fresh measures all"
    assert said in capsys.readouterr().out
    records = [json.loads(line) for line in Path("ccm-eval/chats/records.jsonl").read_text().splitlines()]
    assert all(found[TAKEN] for found in records)
    assert cli.main([*command, "--fresh"]) == 0
    assert "4 measurements, 4 to do\n" in capsys.readouterr().out
    assert not any(TAKEN in line for line in Path("ccm-eval/chats/records.jsonl").read_text().splitlines())
    assert Path("ccm-eval/chats.old/records.jsonl").exists(), "what was there is put aside"
    assert before == {path: path.read_bytes() for path in before}, "their records are only read"


def test_a_fresh_clone_stays_clean(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = tmp_path / "clone"
    made = subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(clone)], capture_output=True)
    if made.returncode:
        pytest.skip("not a checkout")
    monkeypatch.chdir(clone)

    def changed() -> str:
        return subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout

    few = ["--methods", "none,full", "--tasks", "needles", "--limit", "1", "--threads", "1"]
    for command in (
        ["eval", "quick", *few, "--model", model],
        ["eval", "quick", *few, "--model", model, "--fresh", "--show", "1"],
        ["report"],
        ["report", "results"],
        ["doctor"],
        ["data", "list"],
    ):
        assert cli.main(command) in (0, 1), command
        assert changed() == "", command
    assert (clone / "ccm-eval/quick.json").exists() and (clone / PAGES / "results/quick.md").exists()
    for path in ("ccm-demo.png", "runs/mine/adapter"):
        assert not subprocess.run(["git", "check-ignore", "-q", path]).returncode, path
    Path("docs/results.md").write_text("mine")  # the control: a change shows
    assert "docs/results.md" in changed()


def test_the_projects_own_pages_are_made_of_its_own_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OWN_PAGES", "OWN_RESULTS"):
        monkeypatch.setattr(f"ccm.cli.report.{name}", tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()
    own, pages_ = tmp_path / "own_results", tmp_path / "own_pages"
    (pages_ / "results.md").write_text("theirs")
    mine = stored(tmp_path, made_up())
    assert cli.main(["report", str(mine), "--out", str(pages_)]) == 2
    assert "the project's own pages" in capsys.readouterr().err
    assert (pages_ / "results.md").read_text() == "theirs"
    stored(own, made_up())
    assert cli.main(["report", str(own), "--out", str(pages_)]) == 0
    assert (pages_ / "results.md").read_text() != "theirs"


def test_without_results_the_report_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 2
    assert "ccm-eval: no such file or folder; ccm eval SUITE" in capsys.readouterr().err


# ---------------------------------------------------------------------- what figures are worth


def talk(full: float, spread: float = 0.0) -> list[dict[str, Any]]:
    """Six items: full context gains 12 - full nats, or as much less as the spread on every second item."""
    levels = {"none": 12.0, "full": full, "m": 9.0}
    return [
        record(method, f"i{k}", nll + (spread * (-1) ** k if method == "full" else 0))
        for method, nll in levels.items()
        for k in range(6)
    ]


@pytest.mark.parametrize(
    ("full", "spread", "nothing"),
    [(8.0, 0.0, False), (8.0, 1.0, False), (11.8, 3.0, True), (13.0, 0.0, True)],
)
def test_nothing_to_keep_where_full_context_is_no_better_than_none(
    full: float, spread: float, nothing: bool
) -> None:
    rows = [found for found in summary.rows(talk(full, spread)) if "accuracy" not in found["metric"]]
    (worth,) = (
        found for found in rows if found["metric"] == "perplexity gain over none" and not found["tag"]
    )
    assert worth["value"] == pytest.approx((12 - full) / 4) and worth["n"] == 6 and worth["method"] == "full"
    assert measured.kept(worth) is not nothing
    shown = in_words(measured.figures("t", rows))
    assert ("nothing to keep" in shown) is nothing
    assert ("0.750" in shown) is (not nothing and full == 8.0), shown  # the share of m
    found = results(*(row(**{k: v for k, v in r.items() if k != "seconds"}) for r in rows if not r["tag"]))
    assert found.nothing_to_keep("t") is nothing
    cells = [line for line in tables.glance(found).splitlines() if line.startswith("| `m`")]
    assert ("nothing to keep" in cells[0]) is nothing
    kept, nothing_ = "Full context is better than none on t", "There is nothing to keep on t"
    assert brief.suite(found)[1].startswith(nothing_ if nothing else kept)


def test_every_figure_has_its_number_of_items() -> None:
    lines = in_words(measured.figures("t", summary.rows(talk(8.0)))).splitlines()
    figures = [line.split() for line in lines if "perplexity" in line]
    assert len(figures) == 3 and all("6" in figure for figure in figures)
    several = [row("none", 0.5), row("full", 0.8), row("m", 0.7, n=3)]
    page = tables.glance(results(*several))
    assert "t = 4, n = 10 |" in page and "(n = 3) |" in page and page.count("(n = ") == 1


def test_the_frontier_begins_at_no_memory() -> None:
    points = {"full": (100, 0.9), "none": (0, 0.5), "small": (10, 0.4), "good": (20, 0.7), "same": (20, 0.7)}
    assert frontier(points | {"large": (90, 0.6)}) == ["none", "good", "full"]
    assert frontier({name: point for name, point in points.items() if name != "none"}) == []
    assert frontier({"none": (0, 0.5), "nothing": (0, 0.9)}) == ["none", "nothing"]
    page = tables.glance(results(row("none", 0.5, kv_bytes=0.0), row("full", 0.4), row("m", 0.6)))
    bold = [line.split("`")[1] for line in page.splitlines() if "**" in line]
    assert bold == ["none", "m"]


def test_every_page_begins_with_its_summary(tmp_path: Path) -> None:
    found = read(stored(tmp_path, made_up()))
    page = pages([found], {})["results/quick.md"].splitlines()
    assert page[0] == "# Suite `quick`" and [line[:2] for line in page[2:5]] == ["- "] * 3
    for path in (ROOT / "docs" / "results.md", *(ROOT / "docs" / "results").glob("*.md")):
        lines = path.read_text().splitlines()
        count = next(k for k, line in enumerate(lines[2:]) if not line.startswith("- "))
        assert 3 <= count <= 5, path


# ---------------------------------------------------------------------- the first figure, single questions


def test_figures_of_a_task_are_there_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    mine = evaluation(plan({}, "none", "full", limit=2))
    mine.run(tmp_path / "a", on_record=lambda task, records, complete: seen.append((len(records), complete)))
    assert seen == [(1, False), (2, False), (3, False), (4, True)]
    monkeypatch.setattr(measured, "_PACE", 0.0)
    shown = []
    console = Console(file=io.StringIO(), width=120)
    with measured.View(console) as view:
        monkeypatch.setattr(view._live, "update", shown.append)
        again = evaluation(plan({}, "none", "full", limit=2))
        result = again.run(tmp_path / "b", view.on_progress, 1, view.on_record)
    assert len(shown) == 4, "a table after every record"
    assert console.file.getvalue().count("toy, step 4") == 1  # type: ignore[attr-defined]
    assert no_clock(result["rows"]) == no_clock(json.loads((tmp_path / "a.json").read_text())["rows"])
    assert not in_hand(tmp_path / "b")


def test_what_was_asked_and_answered_is_shown() -> None:
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    queries = (
        Choice(ids("Which colour?"), (ids("red"), ids("blue")), 1),
        Generation(ids("Which name?"), ("Miso", "Mr Miso")),
        Likelihood(ids("She is called Miso."), (3, 7)),
    )
    records = {
        "none": {
            "queries": [
                {"step": 2, "index": 0, "correct": 0, "chosen": 0},
                {"step": 2, "index": 1, "text": "Rex", "f1": 0.0},
                {"step": 2, "index": 2, "nll": 8.0, "tokens": 4},
            ]
        },
        "m": {"error": "too long"},
    }
    item = Item("i", (ids("a"), ids("b")), {1: queries[:1], 2: queries})
    shown = [line.plain.strip() for line in measured.questions("t", item, records, tokenizer)]
    assert shown == [
        "t · i · after 2 segments", "asked: Which colour? [red | blue]", "right: blue",
        "none: red (wrong)", "m: left out, too long",
        "t · i · after 2 segments", "asked: Which name?", "right: Miso | Mr Miso",
        "none: 'Rex' (F1 0.00)", "m: left out, too long",
        "t · i · after 2 segments", "asked: the next text, by its likelihood", "right: is",
        "none: 2.00 nats per token", "m: left out, too long",
    ]  # fmt: skip
    assert make_item().queries, "items of a task have them"
