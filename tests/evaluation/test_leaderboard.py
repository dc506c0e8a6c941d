"""``ccm leaderboard``: sizes of equal bytes, what is measured, what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import ABSENT, EXAMPLE, NAMES, TOKENIZER, elsewhere, model, tiny_adapters
from tiny import random_rows, tiny_model

from ccm.cli import main
from ccm.evaluation.items import Choice, Generation, Item, Likelihood
from ccm.evaluation.leaderboard import (
    ENDS,
    TASKS,
    Board,
    Table,
    as_json,
    default_methods,
    from_json,
    sized,
    table,
)
from ccm.evaluation.metrics import frontier
from ccm.evaluation.report import leaderboard as report
from ccm.evaluation.suites import Plan
from ccm.evaluation.tasks import get_task
from ccm.evaluation.tasks.foreseen import foreseen
from ccm.files.adapter_folder import shipped_adapters
from ccm.methods.base import METHODS
from ccm.methods.bits.packed import Packed
from ccm.methods.spec import parse

#: Twelve segments, the budget of four entries for each, and more than that in tokens.
LENGTHS = [[15, 9, 20, 14, 13, 7, 14, 19, 14, 12, 15, 11], [21, 8, 30, 14, 13, 14, 6, 19, 24, 14, 10, 15]]
BUDGET = 48
#: Methods that read all that was said, and one whose length is what the model writes.
UNBOUNDED = ("full", "ape", "summary")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def low_norm() -> Iterator[str]:
    """A method of somebody else, registered as docs/extending.md shows."""
    with elsewhere() as name:
        yield name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=2048).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


# ---------------------------------------------------------------------- sizes


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, str]]:
    return model(), tiny_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("name", NAMES)
def test_a_question_reads_no_more_than_the_budget(name: str, case: tuple[Any, dict[str, str]]) -> None:
    of, adapters = case
    text = adapters.get(name, name)
    bound = parse(text).method().bind(of, TOKENIZER)
    written = sized(text, bound, BUDGET, LENGTHS)
    method = parse(written).method().bind(of, TOKENIZER)
    if name in UNBOUNDED:
        assert written == text
        return
    for lengths in LENGTHS:
        memory = method.empty()
        for ids in random_rows([lengths])[0]:
            memory = method.fold(memory, [ids])
        read = method.recall(memory).rows[0]
        slots = read.slots.length
        if isinstance(method, Packed):  # as many as have the bytes of the others in 16 bits
            size = method.reader.kv_shape()[2]
            slots = math.ceil(slots * method.width(size) / (2 * size))
        entries = read.sink.length + slots + read.window.length
        # what keeps a fixed number of slots uses all of it; whole segments and blocks leave some over
        least = {"none": 0, "gisting": 3, "retrieve": 32}.get(name, 32 if name in adapters else BUDGET)
        assert least <= entries <= BUDGET, f"{written} reads {entries}"


def test_a_growing_memory_gets_as_many_slots_a_segment_as_fit(case: tuple[Any, dict[str, str]]) -> None:
    of, adapters = case
    bound = parse("mean-pool").method().bind(of, TOKENIZER)
    assert sized("mean-pool", bound, BUDGET, LENGTHS) == "mean-pool"
    assert sized("mean-pool", bound, 40, LENGTHS) == "mean-pool:slots=3"
    assert sized("mean-pool", bound, 11, LENGTHS) == "mean-pool", "not one a segment fits: as it is"
    path = adapters["ccm-concat"]
    bound = parse(path).method().bind(of, TOKENIZER)
    assert sized(path, bound, 36, LENGTHS) == path, "three slots a segment, as the adapter has them"
    assert sized(path, bound, 24, LENGTHS) == f"{path}:slots=2"


def test_options_of_ones_own_stay(case: tuple[Any, dict[str, str]]) -> None:
    of, _ = case
    bound = parse("snapkv:tokens=7").method().bind(of, TOKENIZER)
    assert sized("snapkv:tokens=7", bound, BUDGET, LENGTHS) == "snapkv:tokens=7"
    assert sized("snapkv", bound.resized(tokens=64), BUDGET, LENGTHS) == "snapkv:window=22,tokens=22"


def test_a_method_of_a_file_keeps_the_name_of_the_file(
    low_norm: str, case: tuple[Any, dict[str, str]]
) -> None:
    """Helpers are other processes, which know it by no other."""
    bound = parse(str(EXAMPLE)).method().bind(case[0], TOKENIZER)
    assert sized(str(EXAMPLE), bound, BUDGET, LENGTHS) == str(EXAMPLE)
    assert sized(str(EXAMPLE), bound, 24, LENGTHS) == f"{EXAMPLE}:tokens=2"


def test_everything_that_is_registered_is_compared_or_left_out_with_a_reason(low_norm: str) -> None:
    names, left_out = default_methods()
    assert names[:2] == list(ENDS) and low_norm in names
    trained = {"ccm-concat", "ccm-merge"} | {each for each in shipped_adapters() if each in METHODS}
    registered = {METHODS[name].name for name in METHODS}
    assert {*names, *left_out} == registered | set(shipped_adapters()) and trained <= set(names)
    assert set(left_out) == {"summary", "cartridge", "ccm-tasks", *ABSENT} and all(left_out.values())
    assert not any("/" in why for why in left_out.values()), "no path of this machine goes on a page"


# ---------------------------------------------------------------------- questions


def test_right_answers_are_scored_where_they_stand() -> None:
    ids = tuple(TOKENIZER.encode("Who is it?", add_special_tokens=False))
    choice = Choice(ids, ((5, 6), (7, 8)), 1, tag="name")
    asked = {1: (choice, Generation(ids, ("x",))), 2: (Generation(ids, ("Ada", "her")),)}
    found = foreseen(Item("a", ((1, 2), (3,)), asked), TOKENIZER)
    (one,) = found.queries[1]
    assert one == Likelihood((*ids, 7, 8), (len(ids), len(ids) + 2), "name")
    (two,) = found.queries[2]
    assert isinstance(two, Likelihood)
    assert TOKENIZER.decode(list(two.ids[two.scored[0] : two.scored[1]])).strip() == "Ada"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_scores_likelihoods_alone(name: str) -> None:
    options, limit = TASKS[name]
    task = get_task(name, **options)
    assert task.metrics == ("nll",) and limit >= 5
    if name == "facts":  # the others need data
        items = list(task.items(TOKENIZER, 2))
        assert all(
            isinstance(q, Likelihood) for item in items for some in item.queries.values() for q in some
        )
        assert [len(item.segments) for item in items] == [12, 12] and len(items[0].queries[12]) == 6


# ---------------------------------------------------------------------- tables


def records(**nll: tuple[float, ...]) -> list[dict[str, Any]]:
    """Of methods: nats of each item, over two questions of five tokens at two steps."""
    sizes = {"none": 0, "full": 900, "small": 100, "large": 500}
    found = []
    for method, each in nll.items():
        for item, total in enumerate(each):
            steps = [
                {
                    "step": t,
                    "kv_bytes": sizes[method] * t / 2,
                    "fold_seconds": t / 10,
                    "ttft_seconds": t * len(method),
                }
                for t in (1, 2)
            ]
            queries = [{"step": t, "index": 0, "kind": "likelihood", "tag": "", "nll": total / 2, "tokens": 5}
                       for t in (1, 2)]  # fmt: skip
            found.append(
                {"task": "facts", "method": method, "item": f"{item}", "queries": queries, "steps": steps,
                 "peak_kv_bytes": 1, "seconds": 1.0, "changed": method != "none", "commit": "a" * 40}
            )  # fmt: skip
    return found


def made_of(found: list[dict[str, Any]]) -> Table:
    plan = Plan(get_task("facts"), {}, 3, ())
    families = {name: "Entries that are made" for name in ("none", "full", "small", "large")}
    return table(Board((plan,), {"facts": 10}, families, {}), plan, 30, found, model="tiny")


GOOD = records(
    none=(30.0, 31.0, 33.0), full=(10.0, 11.0, 12.0), large=(20.0, 21.0, 22.0), small=(25.0, 26.0, 27.0)
)
POOR = records(
    none=(30.0, 31.0, 33.0), full=(10.0, 51.0, 34.0), large=(20.0, 21.0, 22.0), small=(25.0, 26.0, 27.0)
)


def test_rows_stand_by_quality_and_what_is_too_large_below() -> None:
    found = made_of(GOOD)
    assert [row.method for row in found.rows] == ["none", "full", "small", "large"], (
        "500 bytes are more than 300"
    )
    small, large = found.rows[2:]
    assert (small.within, large.within) == (True, False)
    assert (small.kv_bytes, small.fold_seconds) == (100, 0.15), "bytes of the last step, time of the mean one"
    assert small.first_token == pytest.approx(len("small") / len("full"), abs=1e-3)
    assert small.share == pytest.approx((94 - 78) / (94 - 33), abs=1e-4)
    assert small.low is not None and small.high is not None and small.low < small.share < small.high
    assert small.gain == pytest.approx((94 - 78) / 30, abs=1e-4)
    assert small.command == "ccm leaderboard --tasks facts --methods small" and small.commit == "a" * 40
    assert found.kept and found.n == 3 and found.queries == 2 and found.kv_bytes == 300


def test_where_full_context_is_no_better_nothing_is_to_keep() -> None:
    found = made_of(POOR)
    assert not found.kept and {row.share for row in found.rows} == {None}
    text = page_of(found)
    assert text.count("nothing to keep") == 2 and "Nothing to keep" in text
    assert "Nothing to keep" not in page_of(made_of(GOOD))


def page_of(found: Table) -> str:
    about = {
        "model": {"name": "tiny", "dtype": "float32"},
        "machine": {"processes": 1, "cores": 2, "device": "cpu"},
        "seconds": 60.0,
        "left_out": {"summary": "it writes"},
    }
    stored = json.loads(json.dumps(as_json([found], about)))
    assert from_json(stored) == [found]
    return report.page(stored, from_json(stored), "leaderboard.png")


def test_the_page_names_model_and_commit_in_every_row() -> None:
    lines = [line for line in page_of(made_of(GOOD)).splitlines() if line.startswith("| `")]
    assert len(lines) == 4 and all(line.endswith("| tiny, aaaaaaa |") for line in lines)
    assert "**more**" in lines[3] and "**more**" not in "".join(lines[:3])
    assert "- `summary`: it writes." in page_of(made_of(GOOD))


def test_the_frontier_begins_at_no_memory() -> None:
    found = made_of(GOOD)
    assert [row.method for row in found.rows if row.best] == ["none", "full", "small", "large"]
    worse = records(none=(30.0, 31.0), full=(10.0, 11.0), small=(35.0, 36.0))
    assert [row.method for row in made_of(worse).rows if row.best] == ["none", "full"]
    assert frontier({"none": (0.0, 0.0), "a": (1.0, -1.0)}) == ["none"]


def test_the_picture_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    assert report.draw([made_of(GOOD), replace(made_of(POOR), task="b")]).startswith(b"\x89PNG")


def test_the_page_of_this_project_is_made_of_its_results() -> None:
    """``ccm leaderboard --out results/leaderboard --page docs/leaderboard.md``"""
    root = Path(__file__).parents[2]
    if not (file := root / "results" / "leaderboard.json").is_file():
        pytest.skip("it is not measured yet")
    stored = json.loads(file.read_text())
    made = report.page(stored, from_json(stored), "leaderboard.png")
    assert made == (root / "docs" / "leaderboard.md").read_text()


# ---------------------------------------------------------------------- the command


def run(folder: Path, out: Path, *options: str) -> int:
    common = ("--model", str(folder), "--tasks", "facts", "--processes", "1", "--out", str(out))
    return main(["leaderboard", *common, *options])


def quality(out: Path) -> list[tuple[Any, ...]]:
    stored = json.loads(out.with_suffix(".json").read_text())
    return [
        (row["method"], row["gain"], row["share"], row["low"], row["high"], row["kv_bytes"], row["n"])
        for each in stored["tables"]
        for row in each["rows"]
    ]


def test_two_runs_are_equal_and_a_rerun_measures_nothing(
    folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    named = ("--methods", "snapkv,mean-pool")
    assert run(folder, tmp_path / "a", *named, "--limit", "1") == 0
    assert "4 measurements, 4 to do" in capsys.readouterr().out
    assert run(folder, tmp_path / "a", *named, "--limit", "2") == 0  # goes on
    out = capsys.readouterr().out
    assert "8 measurements, 4 of an earlier run" in out and "4 to do" in out
    first = quality(tmp_path / "a")
    assert [row[0] for row in first][:2] == ["none", "full"] and len(first) == 4
    assert run(folder, tmp_path / "a", *named, "--limit", "2") == 0
    assert "nothing is measured now" in capsys.readouterr().out
    assert run(folder, tmp_path / "b", *named, "--limit", "2") == 0
    assert run(folder, tmp_path / "a", *named, "--limit", "2", "--fresh") == 0
    assert quality(tmp_path / "a") == quality(tmp_path / "b") == first
    assert (tmp_path / "a.old").is_dir()
    page = (tmp_path / "a.md").read_text()
    assert "snapkv:window=22,tokens=22" in page and "![" in page and "a.png" in page


def test_a_method_from_elsewhere_has_a_row(
    low_norm: str, folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    """With all that are registered, none of which fails."""
    assert run(folder, tmp_path / "a", "--limit", "1", "--json") == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["tables"][0]["rows"]
    names = {row["method"].partition(":")[0] for row in rows}
    assert low_norm in names and {"snapkv", "attention-matching", "retrieve-text", "none"} <= names
    of_an_adapter = {"slots-and-words", "slots-and-matching", *shipped_adapters()}
    assert names == set(default_methods()[0]) - of_an_adapter, (
        "an adapter of another model is left out, and nothing else"
    )
    assert "left out: ccm-chat" in err and "results: " in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "snapvk"), "did you mean snapkv"),
        (("--methods", "window@ccm-concat"), "leave what follows @ out"),
        (("--page", "board.txt"), "ends with .md"),
        (("--entries", "2"), "--entries"),
    ],
)
def test_what_is_refused_says_why(
    options: tuple[str, ...], said: str, folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run(folder, tmp_path / "a", *options) == 2
    assert said in capsys.readouterr().err
    assert main(["leaderboard", "--tasks", "poems"]) == 2
    assert "conversation, facts" in capsys.readouterr().err
