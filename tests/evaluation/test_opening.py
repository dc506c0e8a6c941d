"""What README and page print of the first contact comes from a run, and the run is repeated here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def stored() -> dict:
    return json.loads((ROOT / "results" / "opening.json").read_text())


def test_the_stored_answers_are_what_they_are_counted_as(
    stored: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "opening", raising=False)
    import opening

    assert tuple(stored["memories"]) == opening.MEMORIES
    for name, found in stored["memories"].items():
        assert found["memory"].startswith(f"{name}:sink=4,window=64")
        told = [(row["told"], row["asked"], row["expected"]) for row in found["facts"]]
        assert told == list(opening.FACTS)
        for row in found["facts"]:
            for time, answers in row["answers"].items():
                assert answers["none"] == row["none"]
                assert row["right"][time] == {
                    way: opening.right(text, row["expected"]) for way, text in answers.items()
                }
        assert tuple(found["right"]) == opening.TIMES
        for time, counted in found["right"].items():
            for way, count in counted.items():
                assert count == sum(row["right"][time][way] for row in found["facts"])
    assert not opening.right("My dog is called Bella.", "Biscuit") and opening.right("To peanut.", "peanuts")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_opening_comes_out_as_stored(stored: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on the machine that stored them; elsewhere rounding may move a word, and so two facts.

    Chats of their own do not depend on one another, so some of them stand for all.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import opening

    found, before = stored["memories"][opening.TALKING], torch.get_num_threads()
    torch.set_num_threads(stored["environment"]["threads"])
    try:
        again = opening.opening(opening.TALKING, alone=4)
    finally:
        torch.set_num_threads(before)
    for time, counted in again["right"].items():
        assert again["kv_bytes"][time]["memory"] <= found["kv_bytes"][time]["memory"] * 1.2
        for way, count in counted.items():
            rows = found["facts"][: 4 if time != opening.TIMES[2] else None]
            assert abs(count - sum(row["right"][time][way] for row in rows)) <= 2, (time, way)
    assert again["settings"] == found["settings"] and again["memory"] == found["memory"]
