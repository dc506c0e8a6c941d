"""Benchmarks of others: their layouts, their scores by hand, and the command from end to end."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import cited_files as cited
import pytest
from test_tasks import fetched
from test_trust import in_words
from tiny import saved_folder, tiny_tokenizer

from ccm import cli, hub
from ccm.cli import measured
from ccm.data.books import load_books
from ccm.errors import CCMError, ConfigError, DataError
from ccm.evaluation import summary
from ccm.evaluation.benchmarks import BENCHMARKS, layout, locomo, ruler
from ccm.evaluation.benchmarks.judge import Judge
from ccm.evaluation.benchmarks.longmemeval import RIGHT, Judged
from ccm.evaluation.benchmarks.pieces import PIECE, lines, packed, turns
from ccm.evaluation.benchmarks.scoring import F1, All, Exact, Part, Some, Within
from ccm.evaluation.items import Generation, Item, Likelihood, newest
from ccm.evaluation.suites import benchmark_suite
from ccm.methods.base import LONGEST

TOKENIZER = tiny_tokenizer()
METHODS = "none,full,streaming-llm:window=64"


def said(item: Item) -> str:
    return TOKENIZER.decode([token for segment in item.segments for token in segment])


def asked(item: Item) -> list[Any]:
    return [query for queries in item.queries.values() for query in queries]


def items(name: str, data: Path | None = None, limit: int = 9, **options: Any) -> list[Item]:
    """The items of the first part of a benchmark."""
    suite = benchmark_suite(name, None if data is None else str(data), **options)
    (first, *_) = suite.plans(limit=limit)
    found = list(first.task.items(TOKENIZER, limit))
    assert found == list(first.task.items(TOKENIZER, limit)), "the same ones every time"
    for item in found:
        assert item.once and max(item.queries) == len(item.segments) and all(item.segments)
        assert max(map(len, item.segments)) <= LONGEST
    return found


# ---------------------------------------------------------------------- what all of them promise


def test_names_that_are_written_down_are_those_that_there_are() -> None:
    assert tuple(sorted(BENCHMARKS)) == cli.eval.BENCHMARKS
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for name, cls in BENCHMARKS.items():
        assert cls.key == name and cls.title and cls.licence and cls.origin
        assert "https://arxiv.org/abs/" in cls.paper and cls.paper.split()[-1] in page
        assert cls.generated or (cls.file and "http" in cls.source)
        assert f"`ccm eval {name}" in page and set(cls.metrics) <= {"score", "nll"}


@pytest.mark.parametrize("name", [name for name, cls in BENCHMARKS.items() if not cls.generated])
def test_without_its_files_a_benchmark_says_which_and_from_where(name: str, tmp_path: Path) -> None:
    cls = BENCHMARKS[name]
    with pytest.raises(ConfigError, match=r"give --data FOLDER with .*http"):
        benchmark_suite(name)
    with pytest.raises(DataError, match=r"gone is not there, expected a folder with .*: download .*http"):
        benchmark_suite(name, str(tmp_path / "gone"))
    (tmp_path / "other.csv").write_text("1")
    with pytest.raises(DataError, match=r"holds other.csv, expected .*: download .*http"):
        benchmark_suite(name, str(tmp_path))
    assert cls.source


def test_what_a_benchmark_has_no_use_for_is_refused(tmp_path: Path) -> None:
    cited.store(tmp_path / "locomo10.json", [cited.locomo()])
    with pytest.raises(ConfigError, match="scored without a judge: leave --judge out"):
        benchmark_suite("locomo", str(tmp_path), Judge("http://x", "m"))
    with pytest.raises(ConfigError, match="texts of its own: leave --lengths out"):
        benchmark_suite("locomo", str(tmp_path), lengths=(512,))
    with pytest.raises(ConfigError, match="not on the model hub"):
        benchmark_suite("locomo", "hub")
    with pytest.raises(ConfigError, match="leave --data out"):
        benchmark_suite("ruler", str(tmp_path))


def test_a_changed_file_is_another_task(tmp_path: Path) -> None:
    options = []
    for name in ("conv-1", "conv-2", "conv-1"):
        cited.store(tmp_path / "locomo10.json", [cited.locomo(name)])
        layout._digest.cache_clear()  # files of the same size and, by chance, time
        options.append(benchmark_suite("locomo", str(tmp_path)).tasks[0][1])
    assert options[0] == options[2] != options[1]


def test_the_hub_is_asked_for_the_files_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        cited.store(tmp_path / "longmemeval_s_cleaned.json", [cited.longmemeval()])
        return str(tmp_path)

    monkeypatch.setattr("ccm.data.hub.snapshot_download", download)
    monkeypatch.setattr(hub, "silent", lambda: "")
    assert benchmark_suite("longmemeval", "hub").plans()[0].task.name == "longmemeval"
    wanted = {"repo_type": "dataset", "allow_patterns": ["longmemeval_s_cleaned.json"]}
    assert calls == [("xiaowu0162/longmemeval-cleaned", wanted)]
    monkeypatch.setattr(hub, "silent", lambda: "no network")
    with pytest.raises(DataError, match="no network; give a folder"):
        benchmark_suite("longmemeval", "hub")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "locomo10.json"
    for text, words in (
        ("{", "locomo10.json is not JSON"),
        ('{"a": 1}', r"expected a list of records"),
        ("[3]", r"locomo10.json, record 1 is 3, expected an object"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            items("locomo", tmp_path)


# ---------------------------------------------------------------------- text in pieces


def test_pieces_lose_nothing_and_are_folded_at_once() -> None:
    text = "One. Two, three; four.\n" * 20 + "x" * 400 + " end. " + "word " * 90
    pieces = packed(TOKENIZER, lines(text))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(len(TOKENIZER.encode(piece)) for piece in pieces) <= PIECE
    assert len(pieces) < 2.5 * len(TOKENIZER.encode(text)) / PIECE, "neighbours are joined"
    long = turns(TOKENIZER, [("user", "a" * 300), ("assistant", " "), ("assistant", "b")])
    sizes = [len(piece) for piece in long[:3]]
    assert len(long) == 4 and max(sizes) - min(sizes) <= 2


def test_the_newest_that_fits_is_kept_behind_the_first() -> None:
    segments = tuple((k,) * 10 for k in range(5))
    query = Likelihood((7,) * 6, (1, 6))
    item = Item("i", segments, {3: (query,), 5: (query, query)}, once=True)
    assert newest(item, 56) is item
    cut = newest(item, 55)
    assert [segment[0] for segment in cut.segments] == [0, 2, 3, 4] and cut.cut == 10
    assert cut.queries == {2: (query,), 4: (query, query)}
    least = newest(item, 16)
    assert least.segments == segments[:1] and least.cut == 40 and least.queries == {1: (query,) * 3}
    written = replace(item, queries={5: (Generation((7,) * 6, ("x",), max_tokens=10),)})
    assert newest(written, 65).cut == 10 and newest(written, 66) is written


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("rule", "text", "score"),
    [
        (Part(("1", "2", "3", "Bo")), "2 and 1, BO", 0.75),
        (All(("1", "bo")), "1 Bo", 1.0),
        (All(("1", "bo")), "1", 0.0),
        (Some(("x", "Oslo")), "in oslo.", 1.0),
        (Some(("x",)), "in oslo.", 0.0),
        (Within(("The Hague",)), "It is hague!", 1.0),
        (Within(("The Hague",)), "Haag", 0.0),
        (Exact(("42",)), "label: 42", 1.0),
        (Exact(("42",)), "the 42.", 1.0),
        (Exact(("42",)), "it is 42", 0.0),
        (F1(("grey cat", "dog")), "a grey dog", 2 / 3),
    ],
)
def test_rules_by_hand(rule: Callable[[str], float], text: str, score: float) -> None:
    assert rule(text) == pytest.approx(score)


# ---------------------------------------------------------------------- LoCoMo


@pytest.mark.parametrize(
    ("category", "right", "text", "score"),
    [
        # adopted, adoption -> adopt; "the", "and" and punctuation do not count: 2 of 2 and 2 of 3 words
        (4, "adoption, Miso!", "She adopted the Miso", 2 * 2 / (3 + 2)),
        (4, "Oslo", "Bergen", 0.0),
        (4, "Oslo", "", 0.0),
        # each part of the answer takes its best part of the text: 1, 1 / (2 words and 1: 2/3) and 0
        (1, "rice, green tea, soup", "tea, rice", (1 + 2 / 3 + 0) / 3),
        (2, "8 May 2023", "8 May", 2 * 2 / 5),
        (3, "Likely yes; he moved", "likely yes", 1.0),
        (4, "Likely yes; he moved", "likely yes", 2 * 2 / 6),
        (5, locomo.NOTHING, "There is no information available.", 1.0),
        (5, locomo.NOTHING, "It is not mentioned", 1.0),
        (5, locomo.NOTHING, "Miso", 0.0),
        (5, locomo.NOTHING, "(b)", 1.0),
        (5, locomo.NOTHING, "B", 1.0),
        (5, locomo.NOTHING, "(a) Miso", 0.0),
        (5, locomo.NOTHING, "a", 0.0),
        (5, locomo.NOTHING, "a dog", 0.0),
    ],
)
def test_locomo_scores_by_hand(category: int, right: str, text: str, score: float) -> None:
    options = ("Miso", locomo.NOTHING) if category == 5 else ()
    assert locomo.Rule(category, right, options)(text) == pytest.approx(score)


def test_locomo_keeps_speakers_and_dates_in_the_order_of_sessions(tmp_path: Path) -> None:
    cited.store(tmp_path / "data" / "locomo10.json", [cited.locomo(), cited.locomo("conv-2")])
    first, second = items("locomo", tmp_path)
    assert (first.name, second.name) == ("conv-1", "conv-2") and len(items("locomo", tmp_path, 1)) == 1
    text = said(first)
    told = [
        "conversations between Ana and Ben",
        "[1:56 pm on 8 May, 2023] Ana: I adopted a cat, Miso!",
        "Ben: Lovely. [shows a picture: a grey cat]",
        "[8:10 pm on 1 June, 2023] Ana: I like rice, soup and tea.",
        "[9:00 am on 2 July, 2023] Ben: I moved to Oslo.",
    ]
    places = [text.find(part) for part in told]
    assert -1 not in places and all(a < b for a, b in pairwise(places))
    queries = asked(first)
    assert [query.tag for query in queries] == [
        "multi-hop", "temporal", "open-domain", "single-hop", "single-hop", "adversarial",
    ]  # fmt: skip
    assert queries[4].answers == ("2023",)
    adversarial = TOKENIZER.decode(queries[5].prompt)
    assert "Miso" in adversarial and "(a)" in adversarial and "(b)" in adversarial
    right = "(a)" if adversarial.index(locomo.NOTHING) < adversarial.index("Miso") else "(b)"
    assert queries[5].rule(right) == 1 and queries[5].rule("(a)(b)".replace(right, "")) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["conversation"].pop("session_2_date_time"),
         r"locomo10.json, record 1: conversation: session_2_date_time is missing, expected a text"),
        (lambda r: r["conversation"]["session_1"][1].pop("speaker"), r"session_1\[1\]: speaker is missing"),
        (lambda r: r.pop("qa"), "record 1: qa is missing, expected a list"),
        (lambda r: r["qa"][0].update(category=7), r"qa\[0\]: category is 7, expected a number from 1 to 5"),
        (lambda r: r["qa"][3].pop("answer"), r"qa\[3\]: answer is missing"),
        (lambda r: r["qa"][5].pop("adversarial_answer"), r"qa\[5\]: answer is missing"),
        (lambda r: [r["conversation"].pop(f"session_{k}") for k in (1, 2, 10)], "session_1 is missing"),
    ],
)  # fmt: skip
def test_a_wrong_locomo_file_names_record_and_field(
    change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    record = cited.locomo()
    change(record)
    cited.store(tmp_path / "locomo10.json", [record])
    with pytest.raises(DataError, match=words):
        items("locomo", tmp_path)


# ---------------------------------------------------------------------- LongMemEval


def test_longmemeval_folds_chats_by_date_and_asks_at_a_date(tmp_path: Path) -> None:
    records = [
        cited.longmemeval(),
        cited.longmemeval("q2_abs"),
        cited.longmemeval("q3", "temporal-reasoning"),
    ]
    cited.store(tmp_path / "longmemeval_oracle.json", records)
    found = items("longmemeval", tmp_path)
    text = said(found[0])
    told = [
        "[2023/05/20 (Sat) 02:21] My cat is called Miso.",
        "What a name!",
        "[2023/05/21 (Sun) 10:00] Thanks, bye.",
        "Bye.",
    ]
    places = [text.find(part) for part in told]
    assert -1 not in places and all(a < b for a, b in pairwise(places))
    assert len(found[0].segments) == 4, "an empty turn is none"
    tags = [query.tag for item in found for query in asked(item)]
    assert tags == ["single-session-user", "abstention", "temporal-reasoning"]
    (query,) = asked(found[0])
    assert "Today is 2023/05/30 (Tue) 23:40. What is my cat called?" in TOKENIZER.decode(query.prompt)
    assert query.rule("Miso") == 1 and query.rule("My cat is Miso") == pytest.approx(2 / 5) and query.lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(question_type="riddle"), "question_type is 'riddle', expected one of"),
        (lambda r: r["haystack_dates"].pop(), "haystack_dates is .* expected one for each of 2"),
        (lambda r: r["haystack_sessions"][1][0].update(role="cat"), r"haystack_sessions\[1\]\[0\]: role is 'cat'"),
        (lambda r: r["haystack_sessions"][1][0].pop("content"), r"\[1\]\[0\]: content is missing, expected a text"),
        (lambda r: r.pop("question_date"), "record 1: question_date is missing, expected a text"),
    ],
)  # fmt: skip
def test_a_wrong_longmemeval_file_names_record_and_field(
    change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    record = cited.longmemeval()
    change(record)
    cited.store(tmp_path / "longmemeval_s.json", [record])
    with pytest.raises(DataError, match=words):
        items("longmemeval", tmp_path)


class Server(ThreadingHTTPServer):
    """A judge: says what ``verdict`` makes of a question, and keeps what it was asked."""

    verdict: Callable[[str], str]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        text = self.server.verdict(body["messages"][0]["content"])
        message = {"role": "assistant", "content": text}
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_longmemeval_asks_a_judge_by_the_kind_of_question(judging: Server) -> None:
    judging.verdict = lambda question: "Yes." if "Response: Miso" in question else "No."
    judge = Judge(f"http://127.0.0.1:{judging.server_port}/v1", "some-judge")
    for kind in RIGHT:
        rule = Judged(judge, "What is my cat called?", "Miso, a cat", kind)
        assert rule("Miso") == 1 and rule("Rex") == 0
        question = judging.asked[-1]["messages"][0]["content"]
        for part in ("What is my cat called?", "Miso, a cat", "Response: Rex", RIGHT[kind]):
            assert part in question
    assert {(body["model"], body["temperature"]) for body in judging.asked} == {("some-judge", 0)}
    assert set(judging.keys) == {"Bearer a-key"}, "the key is that of the environment"
    assert "off by one" in RIGHT["temporal-reasoning"] and len(set(RIGHT.values())) == 5


def test_a_judge_that_does_not_answer_ends_the_run(judging: Server) -> None:
    judging.shutdown()
    judging.server_close()
    with pytest.raises(DataError, match=r"gave no answer .* the same command goes on .* OPENAI_API_KEY"):
        Judge(f"http://127.0.0.1:{judging.server_port}/v1", "gone").ask("?")


# ---------------------------------------------------------------------- multi-session chat


def test_msc_foresees_the_turns_of_the_last_session(tmp_path: Path) -> None:
    for session in (2, 3):
        records = [cited.msc(f"d{k}", session) for k in range(2)]
        cited.store(tmp_path / "msc" / "msc_dialogue" / f"session_{session}" / "test.txt", records)
        cited.store(tmp_path / "msc" / "msc_dialogue" / f"session_{session}" / "train.txt", records)
    found = items_of_msc(tmp_path)
    assert [item.name for item in found] == ["session 2 d0", "session 3 d0", "session 2 d1", "session 3 d1"]
    assert sorted(found[0].queries) == [2, 3] and sorted(found[1].queries) == [4, 5]
    text = said(found[1])
    assert text.count("Hi, I cook a lot.") == 2 and text.count("[7 days later] ") == 2
    assert "[7 days later] What did you cook?" in text, "the gap stands before the next session"
    for item, tag in zip(found, ("session 2", "session 3"), strict=False):
        queries = asked(item)
        assert {query.tag for query in queries} == {tag}
        scored = [TOKENIZER.decode(query.ids[slice(*query.scored)]) for query in queries]
        assert scored[1].startswith("Soup, on my boat.") and "What did you cook?" in scored[0]


def items_of_msc(folder: Path, limit: int = 9) -> list[Item]:
    (plan,) = benchmark_suite("msc", str(folder)).plans(limit=limit)
    return list(plan.task.items(TOKENIZER, limit))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(previous_dialogs=[]), "test.txt, line 1: previous_dialogs is .*at least one"),
        (lambda r: r["dialog"][1].pop("text"), r"line 1: dialog\[1\]: text is missing"),
        (lambda r: r["previous_dialogs"][0].update(dialog=[]), r"previous_dialogs\[0\]: dialog is \[\]"),
        (lambda r: r["metadata"].pop("initial_data_id"), "metadata: initial_data_id is missing"),
    ],
)
def test_a_wrong_msc_file_names_line_and_field(
    change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    record = cited.msc()
    change(record)
    cited.store(tmp_path / "session_2" / "test.txt", [record])
    with pytest.raises(DataError, match=words):
        items_of_msc(tmp_path)


# ---------------------------------------------------------------------- MemoryAgentBench


def parts_of(name: str, folder: Path, judge: Judge | None = None) -> dict[str, list[Item]]:
    """The items of every part of a benchmark."""
    plans = benchmark_suite(name, str(folder), judge).plans(limit=9)
    return {plan.task.name: list(plan.task.items(TOKENIZER, 9)) for plan in plans}


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_memory_agent_bench_is_scored_by_its_sources(ending: str, tmp_path: Path) -> None:
    for ability, rows in cited.memory_agent_bench().items():
        path = tmp_path / "data" / f"{ability}-00000-of-00001.{ending}"
        if ending == "parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pytest.importorskip("pyarrow").Table
            path.parent.mkdir(exist_ok=True)
            answers = [
                [part if isinstance(part, list) else [part] for part in row["answers"]] for row in rows
            ]
            rows = [{**row, "answers": own} for row, own in zip(rows, answers, strict=True)]
            parquet.write_table(table.from_pylist(rows), path)
        else:
            cited.store(path, rows)
    parts = parts_of("memory-agent-bench", tmp_path)
    assert list(parts) == [
        "accurate-retrieval", "test-time-learning", "long-range-understanding", "conflict-resolution",
    ]  # fmt: skip
    found = {item.name: asked(item) for some in parts.values() for item in some}
    assert not any("recsys" in name for name in found) and len(found) == 7
    right = [
        ("eventqa_full 1", "HE RAN home", 1.0), ("eventqa_full 1", "he ran", 0.0),
        ("ruler_qa1_197K 1", "In oslo!", 1.0), ("ruler_qa1_197K 1", "Rome", 0.0),
        ("longmemeval_s* 1", "Ana", 1.0), ("icl_banking77_5900shot_balance 1", "label: 42", 1.0),
        ("icl_banking77_5900shot_balance 1", "it is 42", 0.0), ("detective_qa 1", "B. ben", 1.0),
        ("infbench_sum_eng_shots2 1", "Ana moved to Oslo", 1.0),
        ("factconsolidation_sh_6k 1", "It is Oslo.", 1.0), ("factconsolidation_sh_6k 1", "Rome", 0.0),
    ]  # fmt: skip
    for name, text, score in right:
        assert found[name][0].rule(text) == score, (name, text)
        assert found[name][0].tag == name[:-2]
    (conflict,) = parts["conflict-resolution"]
    assert said(conflict).count("1. Ana lives in Oslo.") == 20 and len(conflict.segments) > 4
    assert "larger number holds" in TOKENIZER.decode(asked(conflict)[0].prompt)


def test_memory_agent_bench_asks_the_judge_of_chats(judging: Server, tmp_path: Path) -> None:
    cited.store(tmp_path / "Accurate_Retrieval.json", cited.memory_agent_bench()["Accurate_Retrieval"])
    judging.verdict = lambda question: "yes"
    judge = Judge(f"http://127.0.0.1:{judging.server_port}/v1", "j")
    (items_,) = parts_of("memory-agent-bench", tmp_path, judge).values()
    first, second = asked(items_[-1])
    assert first.rule("x") == second.rule("x") == 1
    said_ = [body["messages"][0]["content"] for body in judging.asked]
    assert RIGHT["multi-session"] in said_[0] and RIGHT["abstention"] in said_[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["metadata"].pop("source"), "record 1: metadata: source is missing"),
        (
            lambda r: r["metadata"].update(source="riddles"),
            "source is 'riddles', expected one that begins with",
        ),
        (lambda r: r["answers"].append("x"), "answers is .*expected one for each of 1 questions"),
        (
            lambda r: r.update(answers=[[]]),
            r"answers\[0\]: answers is \[\], expected a text or a list of texts",
        ),
        (lambda r: r.pop("context"), "record 1: context is missing, expected a text"),
    ],
)
def test_a_wrong_memory_agent_bench_file(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    (record,) = cited.memory_agent_bench()["Conflict_Resolution"]
    change(record)
    cited.store(tmp_path / "Conflict_Resolution.json", [record])
    with pytest.raises(DataError, match=words):
        parts_of("memory-agent-bench", tmp_path)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "Conflict_Resolution-0.parquet").write_text("version https://git-lfs")
    with pytest.raises(
        DataError, match=r"Conflict_Resolution-0.parquet is no parquet file .*: download it again"
    ):
        parts_of("memory-agent-bench", tmp_path)


# ---------------------------------------------------------------------- SCBench


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("scbench_kv", "It is b-1.", "B-1"),
        ("scbench_qa_eng", "ANA, I think", "Eva"),
        ("scbench_qa_chn", "安娜。", "彼得"),
        ("scbench_vt", "abc and def", "nothing"),
        ("scbench_mf", "It is 7.9", "It is 8"),
        ("scbench_many_shot", "answer (b)", "(A)"),
        ("scbench_summary", "The cat sat", "dog"),
        ("scbench_choice_eng", "B. blue", "A"),
        ("scbench_choice_eng", "the answer is: B", "the answer is: C, not B"),
        ("scbench_repoqa_and_kv", "b-1", "def f"),
    ],
)
def test_scbench_is_scored_by_its_tasks(task: str, right: str, wrong: str, tmp_path: Path) -> None:
    if task == "scbench_summary":
        pytest.importorskip("rouge_score")
    cited.store(tmp_path / "data" / f"{task}.jsonl", cited.scbench()[task])
    parts = parts_of("scbench", tmp_path)
    assert list(parts) == [task]
    ((item,),) = parts.values()
    query = asked(item)[0]
    assert query.rule(right) == 1 and query.rule(wrong) == 0
    assert len(asked(item)) == (2 if task == "scbench_kv" else 1), "functions of repositories are left out"


def test_scbench_scores_by_hand() -> None:
    from ccm.evaluation.benchmarks.scbench import Characters, Digits, Number

    assert Characters(("安娜去北京",))("安娜 来了") == pytest.approx(2 * 2 / (4 + 5))
    assert Number(("2.5",))("about 2.5") == 1 and Number(("2.5",))("2") == 0 and Number(("3",))("none") == 0
    assert Digits(("71",))("is 71, 72") == 1 and Digits(("71",))("72, 71") == 0


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("scbench_kv", lambda r: r.pop("multi_turns"), "line 1: multi_turns is missing, expected a list"),
        ("scbench_kv", lambda r: r["multi_turns"][1].pop("answer"), r"multi_turns\[1\]: answer is missing"),
        ("scbench_mf", lambda r: r["multi_turns"][0].update(answer="x"), "answer is 'x', expected a number"),
        ("scbench_choice_eng", lambda r: r["multi_turns"][0].update(answer="pink"), "one of the options"),
        ("scbench_repoqa_and_kv", lambda r: r["multi_turns"].pop(), "one request that can be scored"),
    ],
)
def test_a_wrong_scbench_file(task: str, change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    (record,) = cited.scbench()[task]
    change(record)
    cited.store(tmp_path / f"{task}.jsonl", [record])
    with pytest.raises(DataError, match=words):
        parts_of("scbench", tmp_path)


# ---------------------------------------------------------------------- BEAM


def test_beam_reads_the_conversation_that_counts(tmp_path: Path) -> None:
    for size, number in (("1M", 2), ("100K", 10), ("100K", 2)):
        cited.beam(tmp_path, size, number)
    parts = parts_of("beam", tmp_path)
    assert {part: [item.name for item in some] for part, some in parts.items()} == {
        "beam-100K": ["beam-100K 2", "beam-100K 10"], "beam-1M": ["beam-1M 2"],
    }  # fmt: skip
    item = parts["beam-100K"][0]
    assert "[March-15-2024] I use Flask." in said(item) and "too long" not in said(item)
    queries = asked(item)
    assert [query.tag for query in queries] == [
        "abstention", "event-ordering", "information-extraction", "instruction-following",
    ]  # fmt: skip
    assert queries[2].rule("March 29") == 1 and queries[3].answers == ("Has code.",)


def test_beam_has_a_judge_go_through_the_rubric(judging: Server, tmp_path: Path) -> None:
    cited.beam(tmp_path)

    def verdict(question: str) -> str:
        if "same event" in question:
            point, line = question.split("1. ")[1].split("\n\n2. ")
            return "Yes" if line.startswith(f"about {point}") else "No"
        return "0.5" if "the sprint" in question else "Score: 1"

    judging.verdict = verdict
    judge = Judge(f"http://127.0.0.1:{judging.server_port}/v1", "j")
    (item,) = parts_of("beam", tmp_path, judge)["beam-100K"]
    abstention, order, extraction, _ = asked(item)
    assert abstention.rule("x") == 1 and extraction.rule("x") == pytest.approx(0.75)
    assert order.rule("about a\nabout b\nabout c") == 1 and order.rule("about c\nabout b\nabout a") == 0
    assert order.rule("about a\n\nabout c\nabout b") == pytest.approx((1 / 3 + 1) / 2)
    judging.verdict = lambda question: "well"
    with pytest.raises(DataError, match=r"the judge j said 'well', expected 0, 0.5 or 1"):
        extraction.rule("x")


@pytest.mark.parametrize(
    ("said_", "tau"),
    [
        ("abc", 1.0),
        ("cba", 0.0),
        ("acb", 2 / 3),  # 2 pairs agree and 1 does not: (2 - 1) / 3
        ("ab", 1.0),  # c is last
        ("b", 0.5),  # a and c tie behind b: a pair agrees, another does not
    ],
)
def test_order_by_hand(said_: str, tau: float) -> None:
    from ccm.evaluation.benchmarks.beam import order

    assert order("abc", said_) == pytest.approx(tau)
    assert order("a", "a") == 0, "one event has no order"


def test_wrong_beam_files(tmp_path: Path) -> None:
    home = cited.beam(tmp_path)
    questions = home / "probing_questions" / "probing_questions.json"
    content = json.loads(questions.read_text())
    content["abstention"][0].pop("rubric")
    cited.store(questions, content)
    with pytest.raises(DataError, match=r"abstention\[0\]: rubric is missing"):
        parts_of("beam", tmp_path)
    cited.store(home / "chat_trunecated.json", [{"turns": [[{"role": "cat", "content": "x"}]]}])
    with pytest.raises(DataError, match=r"chat_trunecated.json, record 1: turns\[0\]\[0\]: role is 'cat'"):
        parts_of("beam", tmp_path)
    for name in ("chat.json", "chat_trunecated.json"):
        (home / name).unlink()
    with pytest.raises(DataError, match=r"has no chat.json beside probing_questions.json"):
        parts_of("beam", tmp_path)
    home.parent.rename(tmp_path / "chats" / "other")
    with pytest.raises(DataError, match="in folders named 100K, 128K, 500K, 1M"):
        parts_of("beam", tmp_path)


# ---------------------------------------------------------------------- RULER


def needs(kind: ruler.Kind) -> None:
    """Skips what is made of data that cannot be fetched here."""
    if isinstance(kind, ruler.Documents):
        fetched(ruler.load_squad_shifts)
    if isinstance(kind, ruler.Needles) and kind.hay == "essay":
        fetched(load_books)


@pytest.mark.parametrize("name", list(ruler.KINDS))
def test_ruler_texts_hold_the_answers_at_their_depths(name: str) -> None:
    kind = ruler.KINDS[name]
    needs(kind)
    for seed in range(3):
        for size in (100, 200):
            text = kind.text(random.Random(seed), size)
            assert text == kind.text(random.Random(seed), size), "the same text every time"
            assert text.answers and text.question
            held = " ".join(text.parts)
            assert all(answer in held for answer in text.answers)
            assert text.depths == kind.text(random.Random(seed), 150).depths, "whatever the size"
            if not text.depths:
                continue
            # that many sentences that are no needles stand before each
            needles = [text.parts[size * depth // 100 + n] for n, depth in enumerate(text.depths)]
            assert len(text.parts) == size + len(needles)
            for answer in text.answers:
                assert any(answer in needle for needle in needles), (name, seed, size)
            if not isinstance(kind, ruler.Documents):
                assert all(needle.startswith(("VAR ", "One secret ")) for needle in needles)


def test_ruler_tells_what_is_asked() -> None:
    chain = ruler.KINDS["vt"].text(random.Random(1), 50)
    told = dict(part[4:-1].split(" = ") for part in chain.parts if part.startswith("VAR "))
    value = chain.question.split("set to ")[1].split()[0]
    for name in chain.answers:
        while name in told:
            name = told[name].removeprefix("VAR ")
        assert name == value, "every variable leads to the number"
    several = ruler.Needles(hay="noise", keys=4, asked=4).text(random.Random(1), 50)
    assert len(several.answers) == 4 and all(
        any(f"{key} is: {value}." in part for part in several.parts)
        for key, value in zip(several.question[27:-13].split(" and "), several.answers, strict=True)
    )
    words = ruler.KINDS["cwe"].text(random.Random(1), 400)
    said_ = [part.split(". ")[1] for part in words.parts]
    counts = {word: said_.count(word) for word in said_}
    assert {counts[word] for word in words.answers} == {30} and sorted(counts.values())[-11] == 3
    coded = ruler.KINDS["fwe"].text(random.Random(1), 64)
    order = sorted(set(coded.parts), key=lambda word: -coded.parts.count(word))
    assert order[0] == "..." and tuple(order[1:4]) == coded.answers
    assert coded.parts.count(order[3]) > coded.parts.count(order[4])


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_3", "vt", "cwe"])
def test_ruler_texts_fill_their_lengths_and_no_more(name: str) -> None:
    lengths = (3000, 4000)
    (plan,) = benchmark_suite("ruler", lengths=lengths).plans([name], limit=4)
    found = list(plan.task.items(TOKENIZER, 4))
    assert [item.name for item in found] == [
        "3000 tokens 0", "4000 tokens 0", "3000 tokens 1", "4000 tokens 1",
    ]  # fmt: skip
    for item, length in zip(found, lengths * 2, strict=True):
        (query,) = asked(item)
        size = sum(map(len, item.segments)) + len(query.prompt) + query.max_tokens
        assert 0.85 * length < size <= length and query.tag == f"{length} tokens"
        assert query.rule(" ".join(query.answers)) == 1 and query.rule("…") == 0
        assert max(map(len, item.segments)) <= LONGEST
    assert asked(found[0])[0].answers == asked(found[1])[0].answers != asked(found[2])[0].answers
    with pytest.raises(ConfigError, match="has no text of 300 tokens: give --lengths larger ones"):
        ruler.fitted("cwe", 300, 0, TOKENIZER)
    for lengths in ((), (0,), (2, 1)):
        with pytest.raises(ConfigError, match="lengths is"):
            ruler.Ruler(name=name, lengths=lengths)


# ---------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_folder(tmp_path_factory.mktemp("cited") / "model")


def test_locomo_from_the_command_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = cited.locomo("conv-2")
    long["conversation"]["session_1"] *= 4
    cited.store(tmp_path / "files" / "locomo10.json", [cited.locomo(), long])
    command = ["eval", "locomo", "--data", "files", "--methods", METHODS, "--model", model, "--threads", "1"]
    command += ["--processes", "1"]
    assert cli.main([*command, "--limit", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scored"] == {"locomo": locomo.Locomo(name="locomo").scored}
    rows = {(row["method"], row["tag"], row["metric"]): row for row in result["rows"]}
    kinds = {"", *locomo.CATEGORIES.values()}
    for method in METHODS.split(","):
        assert {tag for name, tag, metric in rows if (name, metric) == (method, "score")} == kinds
    assert (
        rows["full", "", "score"]["kv_bytes"] > rows["streaming-llm:window=64", "", "score"]["kv_bytes"] > 0
    )
    assert rows["none", "", "score"]["kv_bytes"] == 0
    assert cli.main([*command, "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "6 measurements, 3 of an earlier run" in out, "it goes on where it was"
    assert "scored: F1 of stemmed words" in out and "nothing to keep" in out
    for words in ("adversarial", "multi-hop", "share kept", "asked: ", "right: rice, tea", "(score 0.00)"):
        assert words in out
    records = Path("ccm-eval/locomo/records.jsonl").read_text().splitlines()
    assert sum('"cut"' in line for line in records) >= 1
    assert "full reads the newest" in out and "the model reads no more at once" in out


def test_what_a_judge_said_is_measured_once(
    model: str,
    judging: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cited.store(tmp_path / "longmemeval_oracle.json", [cited.longmemeval()])
    judging.verdict = lambda question: "yes"
    url = f"http://127.0.0.1:{judging.server_port}/v1"
    command = ["eval", "longmemeval", "--data", "longmemeval_oracle.json", "--methods", "none,full"]
    command += ["--model", model, "--threads", "1", "--processes", "1", "--json"]
    for _ in range(2):
        assert cli.main([*command, "--judge", url, "--judge-model", "j"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert {row["value"] for row in result["rows"] if row["metric"] == "score"} == {1.0}
        assert "accuracy by j as judge" in result["scored"]["longmemeval"]
        assert result["settings"]["longmemeval"]["options"]["judge"] == "j"
    assert len(judging.asked) == 2, "one verdict a method, and none when it is asked again"
    assert cli.main(command) == 2
    assert "holds results of other settings" in capsys.readouterr().err, "scores without a judge are others"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["locomo"], "give --data FOLDER with locomo10.json"),
        (["quick", "--data", "x"], "--data is for a benchmark of others, got suite quick"),
        (["longmemeval", "--data", "x", "--judge", "http://x"], "both --judge URL and --judge-model NAME"),
        (["ruler", "--lengths", "1k"], "--lengths is '1k', expected numbers"),
        (["ruler", "--tasks", "niah"], "unknown task of suite ruler 'niah'"),
        (["locomoo"], "did you mean locomo?"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def scored(method: str, item: str, tag: str, *scores: float) -> dict[str, Any]:
    queries = [
        {"step": 1, "index": k, "kind": "generation", "tag": tag, "text": "", "score": score}
        for k, score in enumerate(scores)
    ]
    step = {"step": 1, "tokens": 9, "fold_seconds": 0.1, "ttft_seconds": 0.1, "kv_bytes": 10, "kv_entries": 1}
    about = {"entries": [], "peak_kv_bytes": 10, "seconds": 1.0, "changed": True}
    return {"task": "t", "method": method, "item": item, "queries": queries, "steps": [step], **about}


def test_share_kept_of_scores_by_hand() -> None:
    records = []
    for k in range(6):
        for tag, none, full, own in (("easy", 0.0, 0.8, 0.6), ("hard", 0.1, 0.1, 0.1)):
            for method, score in (("none", none), ("full", full), ("m", own)):
                records.append(scored(method, f"{tag} {k}", tag, score))
    rows = summary.rows(records)
    shares = {(row["method"], row["tag"]): row["value"] for row in rows if row["metric"] == "recovered_share"}
    assert shares["m", "easy"] == pytest.approx(0.75) and shares["m", ""] == pytest.approx(0.75)
    assert ("m", "hard") not in shares, "there is nothing to keep"
    gain = [row for row in rows if row["metric"] == "score gain over none" and row["tag"] == "easy"]
    assert [row["value"] for row in gain] == [pytest.approx(0.8)]
    shown = in_words(measured.kinds("t", rows))
    easy, hard = shown.index("easy"), shown.index("hard")
    assert "0.75 (0.75, 0.75)" in shown[easy:hard] and "nothing to keep" in shown[hard:]
    assert "full context gains 0.40 over none" in shown[:easy]


def test_errors_are_the_librarys_own() -> None:
    assert issubclass(DataError, CCMError)
