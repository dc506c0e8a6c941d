"""docs/extending.md: its code is run as it stands, on a tiny model."""

from __future__ import annotations

import io
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_rows, tiny_model, tiny_tokenizer

import ccm
import ccm.cli.repl
from ccm.cli import main
from ccm.errors import ConfigError
from ccm.evaluation.items import Choice
from ccm.evaluation.report import read
from ccm.evaluation.tasks import get_task
from ccm.evaluation.tasks.base import TASKS
from ccm.methods.base import METHODS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """What the code of the page left behind: its names, and the folder in which it ran."""
    assert "shopping" not in TASKS and "low-norm" not in METHODS
    folder = tmp_path_factory.mktemp("extending")
    module = types.ModuleType("extending")
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, module.__name__, module)  # where dataclasses look names up
        patch.setattr(ccm, "load_default_model", lambda: (model, TOKENIZER))
        for name in (TASKS, METHODS):
            for added in ("shopping", "low-norm"):
                patch.setitem(name, added, None)
                name.pop(added)  # taken out again in the end, whoever put it in
        for block in BLOCKS:
            exec(compile(block, "docs/extending.md", "exec"), module.__dict__)
        yield vars(module), folder


def test_the_page_shows_the_files_and_they_are_short() -> None:
    assert len(BLOCKS) == 4
    for block, name in zip(BLOCKS, ("shopping", "low_norm"), strict=False):
        assert block == (ROOT / "examples" / "extending" / f"{name}.py").read_text()
        assert len(block.splitlines()) < 50


def test_one_item_gives_a_record(ran: tuple[dict[str, Any], Path]) -> None:
    names, _ = ran
    record = names["record"]
    assert [(query["step"], query["tag"]) for query in record["queries"]] == [
        (1, "oldest"), (1, "newest"), (4, "oldest"), (4, "newest"),
    ]  # fmt: skip
    assert [step["kv_entries"] for step in record["steps"]] == [2, 8]
    assert record["changed"]


def test_the_task_asks_for_what_is_on_the_list(ran: tuple[dict[str, Any], Path]) -> None:
    task = get_task("shopping")
    items = list(task.items(TOKENIZER, 12))
    assert items == list(task.items(TOKENIZER, 12))
    answers = []
    for item in items:
        turns = [TOKENIZER.decode(list(ids)) for ids in item.segments]
        for t, queries in item.queries.items():
            for query in queries:
                assert isinstance(query, Choice)
                right, wrong = (
                    TOKENIZER.decode(list(query.options[k])) for k in (query.answer, 1 - query.answer)
                )
                said = turns[:t] if query.tag == "oldest" else turns[t - 1 : t]
                assert any(right in turn for turn in said) and not any(wrong in turn for turn in turns)
                answers.append(query.answer)
    assert 0.3 < sum(answers) / len(answers) < 0.7


def test_the_method_keeps_the_low_norms(ran: tuple[dict[str, Any], Path]) -> None:
    model = tiny_model()
    segments = random_rows([[6, 9, 5]])[0]
    runs = {
        name: ccm.get_method(name, **options).open(model)
        for name, options in {"full": {}, "low-norm": {"tokens": 9}}.items()
    }
    few = ccm.get_method("low-norm", tokens=3).open(model)
    for segment in segments[:2]:
        for run in (*runs.values(), few):
            run.append(segment)
    full, all_of_them, some = (run.logits(segments[2]) for run in (*runs.values(), few))
    assert torch.allclose(full, all_of_them, atol=1e-5), "all entries kept is full context"
    assert not torch.allclose(full, some, atol=1e-2)
    first = ccm.get_method("low-norm", tokens=3).open(model)
    first.append(segments[0])
    norms = runs["full"].memory.rows[0].window.keys[:, :, :6].norm(dim=-1).sort(dim=-1).values
    kept = first.memory.rows[0].slots.keys.norm(dim=-1)
    assert torch.allclose(kept.sort(dim=-1).values, norms[..., :3], atol=1e-5)
    with pytest.raises(ConfigError, match="tokens is 0"):
        ccm.get_method("low-norm", tokens=0)


def test_the_page_talks_to_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^ccm (chat .*)$", PAGE, re.MULTILINE)
    monkeypatch.delitem(METHODS, "low-norm", raising=False)
    monkeypatch.chdir(ROOT / "examples" / "extending")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello.\n/save {tmp_path}/a.ccm\n"))
    tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert main([*command.split(), "--model", str(tmp_path), "--max-tokens", "5"]) == 0
    assert "[16 slots: " in capsys.readouterr().out  # of a question and an answer
    monkeypatch.delitem(METHODS, "low-norm")
    assert main(["chat", "--model", str(tmp_path), "--load", f"{tmp_path}/a.ccm"]) == 2
    assert "give it by --memory" in capsys.readouterr().err


def test_the_table_becomes_a_page(
    ran: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names, folder = ran
    file = folder / "ccm-eval" / "mine.json"
    results = read(file)
    assert results.methods == list(names["methods"]) and results.tags("shopping") == ["newest", "oldest"]
    window, kept = (
        results.last("shopping", name, "accuracy") for name in ("streaming-llm@low-norm", "low-norm")
    )
    assert window and kept and window.kv_bytes == kept.kv_bytes
    assert main(["report", str(file), "--out", str(folder / "report")]) == 0
    page = (folder / "report" / "results" / "mine.md").read_text()
    assert "| `low-norm:tokens=2` |" in page and "of newest · oldest" in page
    assert "`low-norm` > `streaming-llm@low-norm`" in page
