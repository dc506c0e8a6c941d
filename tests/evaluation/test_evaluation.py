"""The online protocol, its records and their summary: equalities on tiny models, interrupted runs, bad input."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import environment
from tiny import random_rows, scramble, tiny_model, tiny_tokenizer

import ccm
from ccm import cli
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.data import get_source
from ccm.data.conversation import SPLITS
from ccm.errors import ConfigError, DataError, UnknownNameError
from ccm.evaluation import metrics, protocol, records, summary
from ccm.evaluation.items import Choice, Generation, Item, Likelihood
from ccm.evaluation.own_data import OwnChats, OwnItems, own_task
from ccm.evaluation.protocol import State, option_scores, run_item
from ccm.evaluation.records import Records
from ccm.evaluation.report import read
from ccm.evaluation.runner import Evaluation
from ccm.evaluation.share import turn_nll
from ccm.evaluation.suites import SUITES, Plan, get_suite, in_order, meant, own_suite, parse_method
from ccm.evaluation.tasks import EvalTask, list_tasks
from ccm.files.adapter_folder import shipped_adapters
from ccm.methods import Run, get_method, list_methods
from ccm.methods.baselines import BASELINES
from ccm.models.known import split_methods

ENTRY = 2 * 3 * 2 * 8 * 4  # keys and values, 3 layers, 2 KV heads of 8, fp32: bytes of one token
LENGTHS = [6, 9, 5, 7, 8, 4]
EMPTY: dict[str, Any] = {"tasks": {}, "methods": {}}
CLOCK = ("seconds", "fold_seconds", "ttft_seconds")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapter folders for the tiny llama."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, rule in (("concat", "concat"), ("merge", "mean")):
        compressor = scramble(Compressor(tiny_model(), CompressorConfig(slots=3, sink=0, rule=rule)))
        compressor.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("concat", "merge")}


def in_hand(folder: Path) -> list[Path]:
    """The saved states of items that were not finished."""
    return sorted(folder.glob("in-hand-*.pt"))


def open_run(text: str, adapters: dict[str, str], model: Any = None) -> Run:
    for name, folder in adapters.items():
        text = text.replace(name, folder)
    return parse_method(text).method().open(model or tiny_model())


def make_item(seed: int = 0) -> Item:
    """A likelihood at every step, choices at some."""
    *segments, prompt, blank = random_rows([[*LENGTHS, 5, 4]], seed)[0]
    options = ((7,), (11, 5), (9, 30, 4))
    queries = {
        t: (
            Likelihood(tuple(segments[t]), (1, len(segments[t]))),
            *([Choice(tuple(prompt), options, 1, tuple(blank), (0, 0, 1), "c")] if t % 2 else []),
        )
        for t in range(5)
    }
    return Item(f"item {seed}", tuple(map(tuple, segments)), queries)


@dataclass(frozen=True)
class Toy(EvalTask):
    name, title, metrics, licence, origin = "toy", "Random tokens", ("nll", "accuracy"), "none", "seeded"
    steps: tuple[int, ...] = (0, 1, 2, 3, 4)

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        return (make_item(seed) for seed in range(limit))


def plan(adapters: dict[str, str], *texts: str, limit: int = 3) -> Plan:
    for name, folder in adapters.items():
        texts = tuple(text.replace(name, folder) for text in texts)
    return Plan(Toy(), {}, limit, texts)


def evaluation(*plans: Plan) -> Evaluation:
    return Evaluation(tiny_model(), None, "toys", plans, [text for plan in plans for text in plan.methods])


def no_clock(value: Any) -> Any:
    """The same without what a clock says."""
    if isinstance(value, dict):
        return {k: no_clock(v) for k, v in value.items() if k not in CLOCK}
    return [no_clock(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- the protocol


@pytest.mark.parametrize(
    "text", ["none", "full", "streaming-llm:sink=2,window=9", "concat", "merge:sink=2,window=8"]
)
def test_a_record_is_what_living_through_the_item_gives(text: str, adapters: dict[str, str]) -> None:
    item, run = make_item(), open_run(text, adapters)
    record = run_item(open_run(text, adapters), item)
    held, at = [], []
    for t in range(5):
        if t:
            run.append(item.segments[t - 1])
            held.append(run.memory.length)
        query = item.queries[t][0]
        logits = run.logits(query.ids)
        nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(query.ids[1:]), reduction="sum")
        found = next(q for q in record["queries"] if q["step"] == t and q["kind"] == "likelihood")
        assert found["nll"] == pytest.approx(float(nll), abs=1e-3)
        assert found["tokens"] == len(query.ids) - 1
        at.append(run.kv_bytes)
    assert record["entries"] == held
    assert [step["kv_bytes"] for step in record["steps"]] == at
    assert [step["tokens"] for step in record["steps"]] == [sum(LENGTHS[:t]) for t in range(5)]
    assert record["changed"] is (text != "none")
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("text", "before"), [("concat", 12), ("merge", 3), ("full", 27)])
def test_the_peak_is_the_largest_cache_on_the_way(text: str, before: int, adapters: dict[str, str]) -> None:
    *segments, last = random_rows([[6, 9, 5, 7, 12]])[0]
    item = Item("i", (*map(tuple, segments), tuple(last)), {5: (Likelihood(tuple(last), (1, 3)),)})
    slots = 0 if text == "full" else 3
    record = run_item(open_run(text, adapters), item)
    assert record["peak_kv_bytes"] == (before + 12 + slots) * ENTRY
    assert record["steps"][0]["kv_bytes"] == {"concat": 15, "merge": 3, "full": 39}[text] * ENTRY


def naive_scores(run: Run, prompt: Sequence[int], options: Sequence[Sequence[int]]) -> list[float]:
    scores = []
    for option in options:
        logits = run.logits([*prompt, *option]).log_softmax(-1)
        scores.append(sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(option)))
    return scores


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
@pytest.mark.parametrize("prompt", [[5], [5, 8, 20, 31]])
def test_options_that_share_a_prompt_score_as_each_alone(
    prompt: list[int], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = get_method("streaming-llm", sink=2, window=12).open(tiny_model(family))
    for segment in random_rows([LENGTHS])[0]:
        run.append(segment)
    options = [[7], [11, 5], [9, 30, 4], [9, 30, 5, 6, 7]]
    monkeypatch.setattr(protocol, "_KEYS_AT_ONCE", 40)  # several passes
    expected = naive_scores(run, prompt, options)
    assert option_scores(run, prompt, options)[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert option_scores(run, prompt, [[7], [9]])[0].tolist() == pytest.approx(
        naive_scores(run, prompt, [[7], [9]]), abs=1e-3
    )
    wrong = naive_scores(get_method("none").open(tiny_model(family)), prompt, options)
    assert not np.allclose(wrong, expected, atol=1e-2), "the memory must matter for this to mean anything"


def test_a_choice_subtracts_what_options_are_worth_without_content(adapters: dict[str, str]) -> None:
    run = open_run("concat", adapters)
    run.append(random_rows([[9]])[0][0])
    prompt, blank, options = (5, 8), (6, 39), ((7,), (11, 5), (9, 30, 4))
    plain = np.array(naive_scores(run, prompt, options))
    calibrated = plain - np.array(naive_scores(run, blank, options))
    assert plain.argmax() != calibrated.argmax(), "another seed is needed"
    for scores, used in ((plain, ()), (calibrated, blank)):
        queries = {1: (Choice(prompt, options, int(scores.argmax()), used, (0, 1, 1)),)}
        item = Item("i", (tuple(random_rows([[9]])[0][0]),), queries)
        (found,) = run_item(open_run("concat", adapters), item)["queries"]
        share = np.exp(scores) / np.exp(scores).sum()
        group = int(share[1:].sum() > share[0])
        assert found["chosen"] == scores.argmax() and found["correct"] == 1
        assert found["group_correct"] == int(group == (0, 1, 1)[int(scores.argmax())])


class Scripted(torch.nn.Module):
    """Stands in for a reader: writes the given text, token by token, as long as it is not stopped."""

    def __init__(self, tokenizer: Any, text: str):
        super().__init__()
        self.ids = tokenizer.encode(text, add_special_tokens=False)
        self.written = 0

    def generate(
        self, prompt: Any, memory: Any, stopping_criteria: Any, max_new_tokens: int, **_: Any
    ) -> Any:
        ids = torch.tensor(prompt)
        for token in self.ids[:max_new_tokens]:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            self.written += 1
            if bool(stopping_criteria[0](ids, None).all()):
                break
        return ids


@pytest.mark.parametrize(
    ("written", "text", "em", "tokens"),
    [
        ("The blue cat.\nNext", "The blue cat.", 1, 14),
        ("\nblue cat<|im_end|>\n", "blue cat", 1, 10),
        ("a blue dog and more", "a blue dog and more", 0, 19),
        ("<|im_end|>", "", 0, 1),
    ],
)
def test_an_answer_ends_with_its_line_or_turn(written: str, text: str, em: int, tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    run = get_method("none").open(tiny_model())
    object.__setattr__(run.method, "reader", Scripted(tokenizer, written))
    query = Generation((5, 6), ("red", "blue cat"), 30)
    (found,), seconds = protocol._ask(run, 1, (query,), tokenizer)
    assert (found["text"], found["em"], run.reader.written) == (text, em, tokens)
    assert seconds > 0


def test_generation_reads_the_memory_greedily(adapters: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    segments = tuple(tuple(range(k, k + 8)) for k in (20, 60))
    item = Item("i", segments, {2: (Generation((40, 41), ("x",), 5),)})
    run = get_method("full").open(model)
    (found,) = run_item(run, item, tokenizer)["queries"]
    ids = [t for segment in segments for t in segment] + [40, 41]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    whole = tokenizer.decode(ids[-5:], skip_special_tokens=True).strip().split("\n")[0].strip()
    assert found["text"] == whole
    with pytest.raises(ConfigError, match="tokenizer"):
        run_item(get_method("full").open(model), item)


def test_a_query_cannot_change_the_run() -> None:
    class Leaky(type(get_method("full").open(tiny_model()))):  # type: ignore[misc]
        def logits(self, ids: Sequence[int], begin: int = 1) -> torch.Tensor:
            result = super().logits(ids, begin)
            self.append(ids)  # what a query must not do
            return result

    item = make_item()
    clean = run_item(get_method("full").open(tiny_model()), item)
    leaky_run = Leaky(get_method("full").bind(tiny_model()))
    record = run_item(leaky_run, item)
    assert record["entries"] == clean["entries"]
    firsts = [[q for q in r["queries"] if q["index"] == 0] for r in (record, clean)]
    for one, other in zip(*firsts, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], abs=1e-4)
    # the control: put to the run itself, they do change it
    assert leaky_run.memory.length == 0, "the given run is as it was"
    leaky_run.logits(item.queries[0][0].ids)
    assert leaky_run.memory.length > 0


def test_a_window_of_equal_bytes_has_as_many_entries_at_every_step(adapters: dict[str, str]) -> None:
    item = make_item()
    reference = run_item(open_run("concat", adapters), item)
    run = get_method("streaming-llm").open(tiny_model())
    record = run_item(run, item, entries=reference["entries"])
    assert record["entries"] == reference["entries"] == [3, 6, 9, 12]
    sizes = [[step["kv_bytes"] for step in r["steps"]] for r in (record, reference)]
    assert sizes[0] == sizes[1]
    with pytest.raises(ConfigError, match="size of another method"):
        run_item(get_method("full").open(tiny_model()), item, entries=reference["entries"])
    with pytest.raises(ConfigError, match="asks after 4 segments and has 2"):
        run_item(get_method("full").open(tiny_model()), replace(item, segments=item.segments[:2]))


def stream_item(segments: int = 40) -> Item:
    texts = [tuple(text) for text in random_rows([[8] * (segments + 1)])[0]]
    queries = {t: (Likelihood(texts[t], (1, 8), "stream"),) for t in range(segments + 1)}
    return Item("stream", tuple(texts[:-1]), queries)


def test_streams_are_summed_over_blocks_of_read_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    item = stream_item()
    method = get_method("streaming-llm", sink=2, window=14)
    monkeypatch.setattr(protocol, "BLOCK", 64)
    pooled = run_item(method.open(tiny_model()), item)
    single = Item(item.name, item.segments, {t: (replace(q[0], tag=""),) for t, q in item.queries.items()})
    every = run_item(method.open(tiny_model()), single)
    assert [q["step"] for q in pooled["queries"]] == [64, 128, 192, 256, 320, 384]
    for block, query in enumerate(pooled["queries"]):
        inside = [q for q in every["queries"] if q["step"] * 8 // 64 == block]
        assert query["nll"] == pytest.approx(sum(q["nll"] for q in inside), rel=1e-6)
        assert query["tokens"] == sum(q["tokens"] for q in inside)
    assert [s["steps"] for s in pooled["steps"]] == [8, 8, 8, 8, 8, 1]
    assert [s["tokens"] for s in pooled["steps"]] == [56, 120, 184, 248, 312, 320]
    assert pooled["entries"] == every["entries"]


# ---------------------------------------------------------------------- records


METHODS = ("none", "full", "streaming-llm:sink=2,window=9", "concat", "merge:sink=2,window=8")


@pytest.mark.parametrize("text", METHODS)
def test_an_item_goes_on_from_its_saved_state_to_equal_numbers(
    text: str, adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BLOCK", 64)
    key = ("toy", text, "stream")
    item = stream_item(12)
    whole = run_item(open_run(text, adapters), item)
    store = Records(tmp_path, EMPTY)
    opened = open_run(text, adapters)

    def stop(state: State) -> None:
        store.hold(key, state)
        if state.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_item(opened, item, on_step=stop)
    store.save()
    store = Records(tmp_path, EMPTY)
    opened, steps = open_run(text, adapters), []
    assert store.held(("toy", text, "another"), opened) is None
    state = store.held(key, opened)
    assert state is not None and state.step == 9
    record = run_item(opened, item, resume=state, on_step=lambda state: steps.append(state.step))
    store.add(key, record)
    assert steps == [10, 11, 12]
    assert no_clock(record) == no_clock(whole)
    assert record["seconds"] > state.measured["seconds"]
    assert not in_hand(tmp_path)
    # the control: from an empty run the numbers are others
    if text != "none":
        begun = run_item(opened, item, resume=State(9, open_run(text, adapters), state.measured))
        assert no_clock(begun) != no_clock(whole)


def test_a_state_is_saved_once_a_minute(
    adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Records(tmp_path, EMPTY)
    opened = open_run("full", adapters)
    run_item(opened, stream_item(3), on_step=lambda state: store.hold(("a", "b", "c"), state))
    assert not in_hand(tmp_path)
    monkeypatch.setattr(records, "SAVE_EVERY", 0.0)
    run_item(opened, stream_item(3), on_step=lambda state: store.hold(("a", "b", "c"), state))
    assert in_hand(tmp_path)
    in_hand(tmp_path)[0].write_bytes(b"half")
    assert store.held(("a", "b", "c"), opened) is None, "a damaged state only costs the item in hand"


def test_half_a_line_is_dropped_and_a_broken_one_is_named(tmp_path: Path) -> None:
    store = Records(tmp_path, EMPTY)
    for item in ("one", "two"):
        store.add(("t", "m", item), {"item": item, "é": 1})
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    store = Records(tmp_path, EMPTY)
    assert [record["item"] for record in store.all()] == ["one"]
    store.add(("t", "m", "two"), {"item": "two", "é": 1})
    assert path.read_bytes() == whole
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(DataError, match="line 1 is not a record"):
        Records(tmp_path, EMPTY)


def test_a_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "seed": 0,
        "model": {"name": "a"},
        "tasks": {"x": {"limit": 2}},
        "methods": {"m": "1"},
    }
    more = {**settings, "tasks": {"y": {"limit": 3}}, "methods": {"n.a=1": "2"}}
    first = Records(tmp_path, settings)
    store = Records(tmp_path, more)
    assert store.settings["tasks"] == {"x": {"limit": 2}, "y": {"limit": 3}}
    assert store.settings["methods"] == {"m": "1", "n.a=1": "2"}
    for change, words in (
        ({"seed": 1}, "seed: it has 0, got 1"),
        ({"model": {"name": "b"}}, "model name: it has a, got b"),
        ({"tasks": {"x": {"limit": 5}}}, "tasks x limit: it has 2, got 5"),
        ({"methods": {"m": "9"}}, "methods m: it has 1, got 9"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            Records(tmp_path, {**settings, **change})
        assert "--out" in str(error.value)
    assert first.settings["tasks"] == {"x": {"limit": 2}}
    store.add(("y", "m", "item"), {"item": "item"})
    first.refresh()
    assert first.settings == Records(tmp_path, settings).settings == store.settings


# ---------------------------------------------------------------------- whole evaluations


def test_two_runs_give_the_same_rows_and_a_resumed_one_too(adapters: dict[str, str], tmp_path: Path) -> None:
    texts = ("none", "full", "streaming-llm@concat", "concat", "merge")
    first = evaluation(plan(adapters, *texts, limit=2)).run(tmp_path / "a")
    again = evaluation(plan(adapters, *texts, limit=2)).run(tmp_path / "b")
    assert no_clock(first["rows"]) == no_clock(again["rows"])
    assert json.loads((tmp_path / "a.json").read_text()) == first
    assert len(read(tmp_path / "a.json").rows) == len(first["rows"]), "the report can read it"

    seen = []

    def stop(place: Any) -> None:
        seen.append(place)
        if len(seen) == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation(plan(adapters, *texts, limit=2)).run(tmp_path / "c", stop)
    lines = (tmp_path / "c" / "records.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 10
    places: list[Any] = []
    resumed = evaluation(plan(adapters, *texts, limit=2)).run(tmp_path / "c", places.append)
    assert no_clock(resumed["rows"]) == no_clock(first["rows"])
    assert places[0].total == places[-1].total == places[-1].done
    assert (tmp_path / "c" / "records.jsonl").read_text().splitlines()[: len(lines)] == lines


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_evaluation import evaluation, plan, records
records.SAVE_EVERY = 0.0
seen = []
def on_progress(place):
    seen.append(place)
    if len(seen) == 26:
        os.kill(os.getpid(), signal.SIGKILL)
evaluation(plan({{}}, "none", "full", "streaming-llm:sink=2,window=9")).run(Path({out!r}), on_progress)
"""


def test_a_killed_evaluation_loses_nothing_that_was_finished(tmp_path: Path, one_thread: None) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = (tmp_path / "killed" / "records.jsonl").read_text()
    assert in_hand(tmp_path / "killed")
    texts = ("none", "full", "streaming-llm:sink=2,window=9")
    first = evaluation(plan({}, *texts)).run(tmp_path / "whole")
    resumed = evaluation(plan({}, *texts)).run(tmp_path / "killed")
    assert (tmp_path / "killed" / "records.jsonl").read_text().startswith(before)
    assert 3 <= len(before.splitlines()) < 9
    assert no_clock(resumed["rows"]) == no_clock(first["rows"])


def test_items_that_do_not_fit_are_left_out_and_told(adapters: dict[str, str], tmp_path: Path) -> None:
    small = tiny_model(max_position_embeddings=24)
    texts = ("full", "streaming-llm@full", "streaming-llm:sink=1,window=6")
    run = Evaluation(small, None, "toys", [Plan(Toy(), {}, 1, texts)], texts)
    result = run.run(tmp_path / "a")
    assert {row["method"] for row in result["rows"]} == {texts[2]}
    assert len(result["warnings"]) == 2
    assert (
        "could not take 1 items" in result["warnings"][0]
        and "more than the model's context" in result["warnings"][0]
    )
    assert no_clock(run.run(tmp_path / "a")) == no_clock(result), "and are not tried again"


def test_methods_without_adapter_are_left_out_unless_asked_for(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    missing = f"ccm-concat:adapter={tmp_path}/none"
    plans = [plan({}, "none", missing, f"streaming-llm@{missing}", limit=1)]
    result = Evaluation(tiny_model(), None, "toys", plans).run(tmp_path / "a")
    assert result["skipped"] == {
        missing: "adapter not found",
        f"streaming-llm@{missing}": f"{missing} is left out",
    }
    with pytest.raises(ConfigError, match="no adapter"):
        Evaluation(tiny_model(), None, "toys", plans, [missing])
    with pytest.raises(ConfigError, match="cannot be given the size"):
        evaluation(plan(adapters, "full@concat"))
    other = tiny_model(hidden_size=16)
    skipped = Evaluation(other, None, "toys", [plan(adapters, "none", "concat")]).skipped
    assert "is for" in skipped[adapters["concat"]]


def test_the_default_is_the_best_memory_for_the_model(tmp_path: Path) -> None:
    texts = ("none", "default:slots=4", "streaming-llm@default:slots=4")
    result = evaluation(plan({}, *texts, limit=1)).run(tmp_path / "a")
    found = {row["method"] for row in result["rows"]}
    best = "attention-matching:slots=4"
    assert found == {"none", best, f"streaming-llm@{best}"}
    assert meant("snapkv:tokens=4@none", tiny_model()) == "snapkv:tokens=4@none"


# ---------------------------------------------------------------------- rows


def record(method: str, item: str, nll: float, correct: int = 0, **more: Any) -> dict[str, Any]:
    queries = [
        {"step": 1, "index": 0, "kind": "likelihood", "tag": "", "nll": nll, "tokens": 4},
        {"step": 1, "index": 1, "kind": "choice", "tag": "x", "correct": correct, "chosen": 0},
        {"step": 1, "index": 2, "kind": "choice", "tag": "y", "correct": 1, "chosen": 0, "group_correct": 0},
    ]
    step = {
        "step": 1,
        "tokens": 9,
        "kv_bytes": 100,
        "kv_entries": 4,
        "fold_seconds": 1.0,
        "ttft_seconds": 0.5,
    }
    return {
        "task": "t",
        "method": method,
        "item": item,
        "queries": queries,
        "steps": [step],
        "peak_kv_bytes": 200,
        "seconds": 3.0,
        "changed": method != "none",
        **more,
    }


RECORDS = [
    record(method, f"i{k}", nll + k / 4, correct=int(k % 3 < right))
    for method, nll, right in (("none", 12.0, 1), ("full", 8.0, 2), ("m", 9.0, 1))
    for k in range(6)
]


def one(rows: list[dict[str, Any]], method: str, metric: str, tag: str = "") -> dict[str, Any]:
    (row,) = (r for r in rows if (r["method"], r["metric"], r["tag"]) == (method, metric, tag))
    return row


def test_rows_are_what_the_records_say() -> None:
    rows = summary.rows(RECORDS)
    mean = sum(9.0 + k / 4 for k in range(6)) / 24
    assert one(rows, "m", "perplexity")["value"] == pytest.approx(math.exp(mean))
    assert one(rows, "m", "recovered_share")["value"] == pytest.approx(0.75)
    assert one(rows, "m", "recovered_share")["ci_low"] == pytest.approx(0.75), "paired: the items cancel"
    low, high = (one(rows, "m", "perplexity")[end] for end in ("ci_low", "ci_high"))
    assert low < math.exp(mean) < high
    assert one(rows, "m", "accuracy", "x")["value"] == pytest.approx(2 / 6)
    assert one(rows, "m", "accuracy", "y")["value"] == 1.0
    assert one(rows, "m", "accuracy")["value"] == pytest.approx(8 / 12)
    assert one(rows, "m", "accuracy_gap", "x")["value"] == pytest.approx(-2 / 6)
    assert one(rows, "m", "group_accuracy")["value"] == 0.0
    assert {
        "kv_bytes": 100,
        "peak_kv_bytes": 200,
        "fold_seconds": 1,
        "ttft_seconds": 0.5,
        "seconds": 3,
        "n": 6,
    }.items() <= one(rows, "m", "accuracy").items()
    assert not [row for row in rows if row["method"] == "full" and row["metric"] == "accuracy_gap"]
    assert rows == summary.rows(RECORDS)


def test_growth_is_paired_by_item_and_of_perplexities_over_no_context() -> None:
    def at(method: str, item: int, step: int, nll: float, correct: int) -> dict[str, Any]:
        of_step = record(method, f"i{item}", nll, correct)
        queries = [{**query, "step": step} for query in of_step["queries"]]
        return {**of_step, "queries": queries, "steps": [{**of_step["steps"][0], "step": step}]}

    def both(method: str, item: int, first: float, last: float, *correct: int) -> dict[str, Any]:
        a, b = at(method, item, 1, first, correct[0]), at(method, item, 8, last, correct[1])
        return {**a, "queries": a["queries"] + b["queries"], "steps": a["steps"] + b["steps"]}

    # later words are harder, and of two items one is much harder; memory gains 1 nat of 4 tokens at first, then 3
    told = [both("none", k, 12.0 + k, 16.0 + k, 0, 0) for k in range(2)]
    told += [both("m", k, 11.0 + k, 13.0 + k, 0, 1) for k in range(2)]
    rows = summary.rows(told)
    grown = one(rows, "m", "perplexity since 1")
    assert (grown["step"], grown["n"], grown["value"]) == (8, 2, pytest.approx(2 / 4))
    assert grown["ci_low"] == pytest.approx(2 / 4), "paired: the items cancel"
    assert one(rows, "m", "accuracy since 1")["value"] == pytest.approx(1 / 2)
    assert not [row for row in rows if row["method"] == "none" and " since " in row["metric"]]
    alone = [record("m", "i0", 9.0), record("none", "i0", 12.0)]
    assert not [row for row in summary.rows(alone) if " since " in row["metric"]]


def test_the_share_needs_none_and_full_of_the_same_items() -> None:
    fewer = [r for r in RECORDS if r["method"] != "full" or r["item"] in ("i1", "i4")]
    assert one(summary.rows(fewer), "m", "recovered_share")["n"] == 2
    without = [r for r in RECORDS if r["method"] != "full"]
    assert not [row for row in summary.rows(without) if row["metric"] in ("recovered_share", "accuracy_gap")]
    worthless = [r for r in RECORDS if r["method"] != "full"] + [
        {**r, "method": "full"} for r in RECORDS if r["method"] == "none"
    ]
    assert not [row for row in summary.rows(worthless) if row["metric"] == "recovered_share"]


def test_methods_are_compared_item_by_item() -> None:
    """What is a little better on every item is so with certainty, however much the items differ."""
    levels = {"none": 20.0, "full": 4.0, "good": 6.0, "worse": 6.4}
    records = [
        record(method, f"i{k}", nll * (1 + k)) for method, nll in levels.items() for k in range(6)
    ]  # fmt: skip
    row = one(summary.rows(records), "good", "recovered_share over worse")
    assert row["value"] == pytest.approx(0.4 / 16) and row["n"] == 6
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(0.4 / 16), pytest.approx(0.4 / 16))
    noisy = [*records[:-6], *(record("worse", f"i{k}", (6.4 + (-1) ** k) * (1 + k)) for k in range(6))]
    row = one(summary.rows(noisy), "good", "recovered_share over worse")
    assert row["ci_low"] < 0 < row["ci_high"]
    compared = {
        (row["method"], row["metric"].removeprefix("recovered_share over "))
        for row in summary.rows(records)
        if row["metric"].startswith("recovered_share over")
    }
    assert compared == set(itertools.combinations(levels, 2))


def test_one_item_has_no_interval() -> None:
    row = one(summary.rows([record("m", "i", 9.0)]), "m", "perplexity")
    assert (row["value"], row["ci_low"], row["ci_high"], row["n"]) == (
        pytest.approx(math.exp(9 / 4)),
        None,
        None,
        1,
    )


def test_a_method_without_effect_is_reported() -> None:
    idle = [record("idle", f"i{k}", 9.0, changed=False) for k in range(2)]
    half = [record("half", f"i{k}", 9.0, changed=bool(k)) for k in range(2)]
    rows = summary.rows([*RECORDS, *idle, *half])
    assert [row["method"] for row in rows if row["metric"] == "no_effect"] == ["idle"]
    assert "idle changed nothing" in summary.warnings(idle)[0]
    assert summary.warnings(half) == []


def test_the_bootstrap_resamples_items_together() -> None:
    rng = np.random.default_rng(1)
    total, count = rng.random(7), rng.integers(1, 5, 7).astype(float)
    picks = np.random.default_rng(0).integers(7, size=(1000, 7))
    naive = np.array([total[pick].sum() / count[pick].sum() for pick in picks])
    expected = np.quantile(naive, [0.025, 0.975])
    assert metrics.bootstrap(lambda a, b: a / b, total, count) == pytest.approx(tuple(expected))
    assert metrics.bootstrap(lambda a, b: a / b, total, count, seed=1) != pytest.approx(tuple(expected))
    assert all(map(math.isnan, metrics.bootstrap(lambda a: a / 0, total)))


@pytest.mark.parametrize(
    ("text", "answers", "em", "f1", "rouge_l"),
    [
        ("The Cat!", ["cat"], 1, 1, 2 / 3),
        ("a black cat", ["cat", "dog"], 0, 2 / 3, 1 / 2),
        ("", ["cat"], 0, 0, 0),
        ("cat black", ["black cat"], 0, 1, 1 / 2),
    ],
)
def test_scores_of_written_answers(
    text: str, answers: list[str], em: float, f1: float, rouge_l: float
) -> None:
    assert metrics.exact_match(text, answers) == em
    assert metrics.f1(text, answers) == pytest.approx(f1)
    assert metrics.rouge_l(text, answers) == pytest.approx(rouge_l)


# ---------------------------------------------------------------------- methods and suites


def test_methods_as_they_are_written() -> None:
    spec = parse_method("streaming-llm:sink=0@ccm-merge:rule=ema,rule_options.weight=0.2")
    assert (spec.name, spec.options) == ("streaming-llm", {"sink": 0})
    assert spec.same_as == "ccm-merge:rule=ema,rule_options.weight=0.2"
    assert parse_method(spec.same_as).options == {"rule": "ema", "rule_options": {"weight": 0.2}}
    assert split_methods("none, ccm-concat:slots=2,window=64,full") == [
        "none",
        "ccm-concat:slots=2,window=64",
        "full",
    ]
    order = [s.text for s in in_order(["streaming-llm@ccm-concat", "none", "ccm-concat", "none"])]
    assert order == ["ccm-concat", "streaming-llm@ccm-concat", "none"]
    for wrong in ("ccm-concat:slots", "a@", ":x=1", "m:=1", "m:a=1,a.b=2", "m:a={", "m:a="):
        with pytest.raises(ConfigError, match="expected"):
            parse_method(wrong)
    with pytest.raises(UnknownNameError, match="h3o"):
        parse_method("h3o").method()


def test_an_adapter_is_opened_as_what_it_is(adapters: dict[str, str], tmp_path: Path) -> None:
    assert parse_method(adapters["merge"]).method() == get_method("ccm-concat", adapter=adapters["merge"])
    assert parse_method(adapters["merge"] + ":slots=1").method().bind(tiny_model()).sizes()["slots"] == 1
    compressor = BASELINES["gisting-online"](tiny_model(), CompressorConfig(slots=2, kind="gisting-online"))
    compressor.save_pretrained(tmp_path / "gist")
    spec = parse_method(str(tmp_path / "gist"))
    assert spec.method() == get_method("gisting-online", adapter=spec.name)
    with pytest.raises(ConfigError, match="no adapter"):
        parse_method(f"{tmp_path}/none").method()


@pytest.mark.parametrize("name", sorted(SUITES))
def test_suites_name_tasks_and_methods_that_there_are(name: str) -> None:
    suite = get_suite(name)
    for entry in suite.plans():
        assert entry.limit > 0 and entry.task.name in list_tasks()
        for spec in in_order(entry.methods):
            assert spec.name in [*list_methods(), *shipped_adapters()]
            spec.method()
    with pytest.raises(UnknownNameError, match="expected one of"):
        suite.plans(only=["no-such-task"])
    assert {entry.limit for entry in suite.plans(limit=7)} == {7}


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and an adapter ``merge`` for it."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    model, _ = ccm.load_model(str(home / "model"))
    scramble(Compressor(model, CompressorConfig(slots=2, sink=0, rule="mean"))).save_pretrained(
        home / "merge"
    )
    return home


CHATS = [
    {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"{word} {i} {n}"} for i in range(6)]}
    for n, word in enumerate(("hello", "well"))
]
ITEMS = [
    {
        "context": ["The cat is red.", "It sleeps."],
        "input": "Color?",
        "options": ["red", "blue"],
        "answer": "red",
    },
    {"context": ["The dog is old."], "question": "How old?", "answers": ["old", "very old"]},
]


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def run_command(home: Path, *arguments: str) -> int:
    return cli.main(["eval", *arguments, "--model", str(home / "model")])


def test_help_names_the_suites_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: ccm eval" in text and "Example: ccm eval quick" in text
    assert all(name in text for name in SUITES)


def test_own_conversations_from_the_command_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl", CHATS)
    arguments = ["chats.jsonl", "--methods", "none,full", "--adapter", str(home / "merge"), "--threads", "1"]
    assert run_command(home, *arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(Path("ccm-eval/chats.json").read_text())
    merge = str(home / "merge")
    assert list(dict.fromkeys(row["method"] for row in result["rows"])) == [
        "none", "full", merge, f"streaming-llm@{merge}"
    ]  # fmt: skip
    assert {row["task"] for row in result["rows"]} == {"own-chats"}
    assert {row["step"] for row in result["rows"]} == {0, 1, 2, 4}
    assert {row["n"] for row in result["rows"]} == {2}
    assert list(result["adapters"]) == [merge]
    sizes = {row["method"]: row["kv_bytes"] for row in result["rows"] if row["step"] == 4}
    assert sizes[merge] == sizes[f"streaming-llm@{merge}"] < sizes["full"]
    # again, in words: nothing is measured twice
    before = Path("ccm-eval/chats/records.jsonl").read_bytes()
    assert run_command(home, *arguments) == 0
    out = capsys.readouterr().out
    assert "of an earlier run in ccm-eval/chats, nothing is measured now; --fresh measures all" in out
    assert "recovered share" in out and "next: ccm report ccm-eval/chats.json" in out
    assert Path("ccm-eval/chats/records.jsonl").read_bytes() == before
    # the file has changed: its records are not those of this one
    write(tmp_path / "chats.jsonl", CHATS[:1])
    assert run_command(home, *arguments) == 2
    assert "sha256" in capsys.readouterr().err


def test_a_first_stage_tunes_the_model_for_every_method(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write(tmp_path / "chats.jsonl", CHATS)
    tuned = get_peft_model(ccm.load_model(str(home / "model"))[0], LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    tuned.save_pretrained(tmp_path / "stage")
    model, _ = ccm.load_model(str(home / "model"))
    config = CompressorConfig(slots=2, sink=0, rule="mean")
    Compressor(model, config, base_adapter=tmp_path / "stage").save_pretrained(tmp_path / "two")

    def nll(name: str, *more: str) -> tuple[dict[str, float], dict[str, Any]]:
        methods = f"none,full,{tmp_path / 'two'}" if more else "none,full"
        out = ["--out", str(tmp_path / name)]
        assert run_command(home, str(chats), "--methods", methods, *out, *more) == 0
        result = json.loads((tmp_path / f"{name}.json").read_text())
        last = [row for row in result["rows"] if row["step"] == 4 and row["metric"] == "perplexity"]
        return {row["method"]: row["value"] for row in last}, result["model"]

    plain, model_of_plain = nll("plain")
    own, model_of_own = nll("own", "--first-stage", str(tmp_path / "two"))
    assert len(own) == 3 and all(own[name] != plain[name] for name in plain)
    assert len(model_of_own.pop("first_stage")) == 16 and model_of_own == model_of_plain
    capsys.readouterr()
    assert run_command(home, str(chats), "--first-stage", str(home / "merge")) == 2
    assert "has no first stage" in capsys.readouterr().err


def test_another_type_of_weights(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, merge = write(tmp_path / "chats.jsonl", CHATS), str(home / "merge")
    sizes = {}
    for name in ("float32", "bfloat16"):
        given = (str(chats), "--methods", "full", "--adapter", merge, "--out", str(tmp_path / name))
        assert run_command(home, *given, "--dtype", name) == 0
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["model"]["dtype"] == name
        sizes[name] = {row["method"]: row["kv_bytes"] for row in result["rows"] if row["step"] == 4}
    # slots are kept in float32, and read in the model's type, as a window of as many keys is
    assert sizes["bfloat16"][merge] == sizes["bfloat16"][f"streaming-llm@{merge}"] > 0
    assert sizes["float32"] == {method: 2 * size for method, size in sizes["bfloat16"].items()}
    # records of one type are not continued with another
    assert run_command(home, *given, "--dtype", "float32") == 2
    assert "dtype" in capsys.readouterr().err
    assert run_command(home, str(chats), "--dtype", "int4") == 2
    assert "bfloat16" in capsys.readouterr().err


def test_own_items(home: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = own_task(write(tmp_path / "items.jsonl", ITEMS))
    first, second = task.items(tokenizer, 5)
    assert sorted(first.queries) == [0, 1, 2] and sorted(second.queries) == [0, 1]
    choice, generation = first.queries[1][0], second.queries[1][0]
    options = [
        tokenizer.decode(choice.options[k]) for k in (0, 1)
    ]  # to the end of the turn: none begins another
    assert options == ["red<|im_end|>", "blue<|im_end|>"] and choice.answer == 0
    prompt = tokenizer.decode(choice.prompt)
    assert prompt.endswith("Color?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(choice.blank) == prompt.replace("Color?", "N/A")
    assert generation.answers == ("old", "very old") and "How old?" in tokenizer.decode(generation.prompt)
    assert [tokenizer.decode(ids) for ids in first.segments][1] == "<|im_start|>user\nIt sleeps.<|im_end|>\n"
    arguments = [str(tmp_path / "items.jsonl"), "--methods", "none,full", "--out", str(tmp_path / "out")]
    assert run_command(home, *arguments) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["metric"] for row in rows} >= {"accuracy", "accuracy_gap", "em", "f1", "rouge_l"}
    assert "accuracy gain over none" in {row["metric"] for row in rows if row["method"] == "full"}


def told(task: OwnChats | OwnItems) -> list[str]:
    """The texts that reach the memory, item by item."""
    tokenizer = tiny_tokenizer()
    return ["".join(map(tokenizer.decode, item.segments)) for item in task.items(tokenizer, 99)]


def test_own_items_of_messages(tmp_path: Path) -> None:
    """Roles, tools and named speakers in ``context``; who asks and answers are speakers beside them."""
    context = [
        "It rains.",
        {"role": "Ana", "content": "I have a cat."},
        {"role": "user", "name": "Bo", "content": "I have a dog."},
        {"from": "gpt", "value": "I see."},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": "{}"}]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "late"},
        {"role": "user", "content": ""},
    ]
    task = own_task(write(tmp_path / "own.jsonl", [{**ITEMS[0], "context": context}]))
    (item,) = task.items(tiny_tokenizer(), 9)
    assert [tiny_tokenizer().decode(ids) for ids in item.segments] == [
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in (
            ("user", "It rains."),
            ("user", "Ana: I have a cat."),
            ("user", "Bo: I have a dog."),
            ("assistant", "I see."),
            ("assistant", "[call of look] {}"),
            ("user", "[result of look] sunny"),
            ("user", "[result of a tool] late"),
        )
    ]
    assert sorted(item.queries) == [0, 1, 2, 4, 7]
    counts = task.tally.counts()
    assert counts["items"] == 1 and counts["named_speakers"] == 1
    assert counts["tool_messages"] == 3 and counts["empty_messages"] == 1
    two = [{"role": name, "content": "Hi."} for name in ("Ana", "Bo")]  # neither of them is the assistant
    task = own_task(write(tmp_path / "two.jsonl", [{**ITEMS[0], "context": two}]))
    assert told(task) == ["<|im_start|>user\nAna: Hi.<|im_end|>\n<|im_start|>user\nBo: Hi.<|im_end|>\n"]


def test_training_and_evaluation_read_the_same(tmp_path: Path) -> None:
    """What stands in a file of ShareGPT's rows, of tools and of named speakers means the same to both."""
    lines = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 4},
        {"messages": [{"role": ("Ana", "Bo")[i % 2], "content": str(i)} for i in range(6)]},
        {"messages": [{"role": "developer", "content": "x"}, {"from": "observation", "value": "y"}] * 3},
        "{half",
    ]
    path = write(tmp_path / "own.jsonl", lines)
    source = get_source("jsonl", tiny_tokenizer(), path=path, turns=[6])
    trained = [talk for split in SPLITS for talk in source.conversations(split)]  # type: ignore[attr-defined]
    task = own_task(path)
    assert isinstance(task, OwnChats) and len(trained) == 3
    assert {t.turns for t in trained} == {t.turns for t in task.conversations(tiny_tokenizer())}
    assert source.tally is not None and source.tally.counts() == task.tally.counts()


@pytest.mark.parametrize(
    ("lines", "read", "words"),
    [
        ([ITEMS[0], "{half"], 1, "line 2: not JSON"),
        (["{half", ITEMS[0]], 1, "line 1: not JSON"),
        ([ITEMS[0], "[]"], 1, "line 2: no context in []"),
        ([ITEMS[0], CHATS[0]], 1, "line 2: no context in {'messages'"),
        ([CHATS[0], ITEMS[0]], 1, "line 2: no messages in {'context'"),
        ([{**ITEMS[0], "answer": "green"}, *ITEMS], 2, "line 1: answer is 'green', expected one of ['red'"),
        ([ITEMS[0], "", {**ITEMS[0], "options": ["red"]}], 1, "line 3: options are"),
        ([ITEMS[0], {**ITEMS[0], "input": ""}], 1, "line 2: input is ''"),
        ([ITEMS[0], {**ITEMS[1], "context": []}], 1, "line 2: context is []"),
        ([ITEMS[0], {**ITEMS[1], "context": [" "]}], 1, "line 2: context is [' ']"),
        ([ITEMS[0], {**ITEMS[1], "context": ["a", 5]}], 1, "line 2: message 2: got 5"),
        ([ITEMS[0], {"context": ["a"], "question": "b"}], 1, "line 2: answers is None"),
        ([CHATS[0], {"messages": [{"content": "x"}]}], 1, "line 2: message 1: got {'content': 'x'}"),
        ([*CHATS, {"messages": [{"role": "user"}]}], 2, "line 3: only empty messages"),
    ],
)
def test_a_bad_line_is_skipped_and_told(lines: list[Any], read: int, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", lines)
    (plan,) = own_suite(path).plans()
    task = plan.task
    assert isinstance(task, OwnChats | OwnItems) and plan.limit == read
    assert (task.tally.read, task.tally.skipped) == (read, 1) and words in task.tally.first[0]
    assert len(told(task)) == read
    with pytest.raises(DataError, match="1 line skipped") as caught:
        own_suite(path, strict=True)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "is empty"),
        (
            [{"text": "x"}],
            "no line that can be used: own.jsonl: 0 conversations, 1 line skipped (line 1: no mess",
        ),
        ([{**ITEMS[0], "answer": "green"}] * 5, "0 items, 5 lines skipped (line 1: answer is 'green'"),
    ],
)
def test_nothing_to_use_is_an_error(
    lines: list[Any], words: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "own.jsonl", lines)
    assert run_command(home, str(path), "--methods", "none", "--out", str(tmp_path / "out")) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_told_once_and_stored(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "own.jsonl", [*CHATS, "{half"])
    arguments = [str(path), "--methods", "none", "--threads", "1", "--out", str(tmp_path / "out")]
    assert run_command(home, *arguments, "--strict") == 2
    assert "nothing may be left out" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run_command(home, *arguments) == 0
    line = "own.jsonl: 2 conversations, 1 line skipped (line 3: not JSON"
    assert capsys.readouterr().out.count(line) == 1
    assert run_command(home, *arguments, "--json") == 0
    out, err = capsys.readouterr()
    read = json.loads(out)["read"]["own-chats"]
    assert (read["conversations"], read["lines_skipped"]) == (2, 1) and err.count(line) == 1
    assert json.loads((tmp_path / "out.json").read_text())["read"] == {"own-chats": read}
    write(path, CHATS)
    arguments[-1] = str(tmp_path / "whole")
    assert run_command(home, *arguments, "--strict") == 0
    assert "own.jsonl: 2 conversations\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "unknown suite 'nonsense': expected one of"),
        (["missing.jsonl"], "missing.jsonl is not there"),
        (["quick", "--strict"], "--strict is for a .jsonl file of your own, got suite quick"),
        (["quick", "--methods", "h3o"], "unknown method or adapter 'h3o'"),
        (["quick", "--methods", "full:x=1"], "full"),
        (["quick", "--methods", "ccm-concat:slots"], "option=value"),
        (["quick", "--tasks", "conversation,nonsense"], "unknown task of suite quick 'nonsense'"),
        (["quick", "--limit", "0"], "--limit"),
        (["quick", "--threads", "0"], "--threads"),
        (["quick", "--device", "abacus"], "device 'abacus': no such device"),
        ([], "SUITE"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], words: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(home, *arguments, "--out", str(tmp_path / "out")) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_page_on_evaluation_says_what_there_is(tmp_path: Path) -> None:
    """Its data are read, its suites are all that there are, its commands are understood."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    chats, items, row = re.findall(r"```json\n(.*?)\n```", page, re.DOTALL)
    for text, name in ((chats, "own-chats"), (items, "own-items")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        task = own_task(path)
        assert task.name == name
        assert len(list(task.items(tiny_tokenizer(), 9))) == len(text.splitlines())
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert set(re.findall(r"`([\w-]+)`", first_cells)) == {*SUITES}
    for method, task_names in re.findall(r"ccm eval quick --methods (\S+) --tasks (\S+)", page):
        assert get_suite("quick").plans(task_names.split(","), split_methods(method))
    rows = evaluation(plan({}, "none", "full")).run(tmp_path / "out")["rows"]
    assert json.loads(row).keys() == rows[0].keys()


def test_two_processes_from_the_command_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """Each makes its own evaluation of the same options: model, adapter, suite and methods."""
    path = write(tmp_path / "chats.jsonl", CHATS)
    arguments = [str(path), "--methods", "none,full", "--adapter", str(home / "merge"), "--json"]
    results = []
    for count in ("1", "2"):
        out = str(tmp_path / count)
        assert run_command(home, *arguments, "--processes", count, "--threads", "1", "--out", out) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [result["machine"]["processes"] for result in results] == [1, 2]
    assert no_clock(results[0]["rows"]) == no_clock(results[1]["rows"])
    lines = (tmp_path / "2" / "records.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "1" / "records.jsonl").read_text().splitlines())


def test_an_interrupt_saves_and_says_how_to_go_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "chats.jsonl", CHATS)
    arguments = [str(path), "--methods", "full", "--out", str(tmp_path / "out")]
    hold, calls = Records.hold, []

    def interrupted(self: Records, *given: Any) -> None:
        hold(self, *given)
        calls.append(given)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "hold", interrupted)
        assert run_command(home, *arguments) == 130
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 1
    assert in_hand(tmp_path / "out")
    assert run_command(home, *arguments) == 0
    assert run_command(home, *arguments[:-1], str(tmp_path / "other")) == 0
    rows = [json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("out", "other")]
    assert no_clock(rows[0]) == no_clock(rows[1])


def test_the_first_token_of_a_turn_is_not_scored():
    """Answers without a head, as of Mistral, begin with what they say."""
    logits, ids = torch.randn(4, 9), (3, 4, 5, 6)
    expected = torch.nn.functional.cross_entropy(logits[:3], torch.tensor(ids[1:]), reduction="sum")
    assert turn_nll(logits, ids, (0, 4)) == (pytest.approx(float(expected)), 3)
    assert turn_nll(logits, ids, (0, 4)) == turn_nll(logits, ids, (1, 4))
