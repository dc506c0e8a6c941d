"""Evaluation tasks: the same items every time, of held-out data alone, that ask what they should."""

from __future__ import annotations

import json
import random
import re
import sys
import types
from collections import Counter
from typing import Any

import pytest
from lamp_files import write_lamp
from tiny import tiny_tokenizer

from ccm.data import Conversation, books, facts, get_source, load_chitchat, movielens, tasks
from ccm.data.archives import Archive
from ccm.data.carriers import COQA, SQUAD_SHIFTS
from ccm.data.conversation import Turn
from ccm.data.coqa import load_coqa
from ccm.data.needles import needles
from ccm.data.probes import History
from ccm.data.squad import Paragraph, Question, load_squad_shifts
from ccm.data.topical_chat import load_topical_chat
from ccm.data.updates import MESSAGES, updates
from ccm.errors import ConfigError, DataError, MissingPackageError, StorageError, UnknownNameError
from ccm.evaluation.items import Choice, Generation, Item, Likelihood
from ccm.evaluation.tasks import EvalTask, get_task, list_tasks
from ccm.evaluation.tasks.choosing import choice, spread
from ccm.evaluation.tasks.conversation import conversation_item
from ccm.evaluation.tasks.coqa import cut, sentences
from ccm.evaluation.tasks.squad import pointed_question

TOKENIZER = tiny_tokenizer()


def decode(ids: Any) -> str:
    return TOKENIZER.decode(list(ids))


def fetched(call: Any) -> Any:
    try:
        return call()
    except (DataError, MissingPackageError, StorageError) as error:
        pytest.skip(f"the data cannot be fetched here: {error}")


def check_items(task: EvalTask, limit: int = 12) -> list[Item]:
    """What every task promises; returns its first items."""
    items = list(task.items(TOKENIZER, limit))
    assert items and items == list(task.items(TOKENIZER, limit))
    assert items[:3] == list(task.items(TOKENIZER, 3)) and list(task.items(TOKENIZER, 0)) == []
    assert len({item.name for item in items}) == len(items) <= limit
    for item in items:
        assert item.queries and all(item.segments) and list(item.queries) == sorted(item.queries)
        assert max(item.queries) == len(item.segments)  # nothing is taken in for no question
        assert not task.steps or set(item.queries) <= set(task.steps)
        for query in (query for queries in item.queries.values() for query in queries):
            check_query(query)
    return items


def check_query(query: Likelihood | Choice | Generation) -> None:
    if isinstance(query, Likelihood):
        start, stop = query.scored
        assert 1 <= start < stop <= len(query.ids)
    elif isinstance(query, Choice):
        assert query.prompt and all(query.options) and 0 <= query.answer < len(query.options) > 1
        assert len(query.groups) in (0, len(query.options))
        for a in query.options:  # summed log-probabilities could not be compared otherwise
            assert sum(other[: len(a)] == a for other in query.options) == 1
    else:
        assert query.prompt and all(query.answers) and query.answers and query.max_tokens > 0


def texts(item: Item) -> list[str]:
    return [decode(ids) for ids in item.segments]


def asked(item: Item, kind: type) -> list[tuple[int, Any]]:
    return [(t, q) for t, queries in item.queries.items() for q in queries if isinstance(q, kind)]


# ---------------------------------------------------------------------- registry


def test_registry():
    known = {"conversation", "topical-chat", "daily-dialog", "soda", "icl", "personalization", "stream"}
    assert known | {"squad", "coqa", "needles", "updates"} <= set(list_tasks())
    for name in list_tasks():
        task = get_task(name)
        assert task.name == name and task.title and task.metrics and task.licence and task.origin
        assert set(task.metrics) <= {"nll", "accuracy", "group_accuracy", "em", "f1", "rouge_l"}
    assert get_task("conversation", steps=[0, 3]) == get_task("conversation", steps=(0, 3))
    with pytest.raises(UnknownNameError, match="unknown task 'mmlu': expected one of conversation, coqa"):
        get_task("mmlu")
    with pytest.raises(ConfigError, match=r"task stream: .*turns"):
        get_task("stream", turns=4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("conversation", {"steps": [4, 2]}, r"steps is \(4, 2\): expected growing whole numbers"),
        ("conversation", {"steps": []}, "steps is"),
        ("icl", {"steps": 4}, "steps is 4"),
        ("icl", {"inputs": 0}, "inputs is 0"),
        ("personalization", {"films": True}, "films is True"),
        ("stream", {"segment": 1}, "segment is 1"),
        ("stream", {"tokens": 100}, "tokens is 100: expected a whole number of at least 128"),
        ("stream", {"source": "pile"}, "expected books or pg19"),
        ("squad", {"distances": [0, 0]}, "distances is"),
        ("squad", {"asked": [0]}, "at least 1"),
        ("coqa", {"groups": 0}, "groups is 0"),
        ("needles", {"steps": [0, 1]}, "at least 1"),
        ("updates", {"steps": [1, 17]}, "expected at most 16"),
    ],
)
def test_wrong_options(name, options, words):
    with pytest.raises(ConfigError, match=words):
        get_task(name, **options)


# ---------------------------------------------------------------------- what tasks share


def test_items_are_spread_over_owners():
    pairs = ["ab", "ac", "cd", "ef", "be"]
    assert spread(pairs, lambda pair: pair) == ["ab", "ef", "ac", "cd", "be"]
    assert spread("aabbc", lambda x: x) == ["a", "b", "c", "a", "b"]


def test_what_options_share_joins_the_prompt():
    query = choice([1, 2], [[7, 8, 3], [7, 8, 4, 5]], 1, blank=[9])
    assert query.prompt == (1, 2, 7, 8) and query.options == ((3,), (4, 5)) and query.blank == (9, 7, 8)
    assert choice([1], [[7], [7, 8]], 0).options == ((7,), (7, 8))  # no option loses all its tokens
    assert choice([1], [[7, 2], [7, 3]], 0).blank == ()


# ---------------------------------------------------------------------- conversations


def talk(turns: int, name: str = "t", users: tuple[str, ...] = ("a", "b")) -> Conversation:
    said = tuple(Turn(("user", "assistant")[k % 2], f"{name} says {k}") for k in range(turns))  # type: ignore[arg-type]
    return Conversation(name, users, said)


def test_the_turn_after_t_turns_is_scored():
    item = conversation_item(talk(10), TOKENIZER, (0, 1, 4, 16))
    assert list(item.queries) == [0, 1, 4] and len(item.segments) == 4
    assert texts(item)[1] == "<|im_start|>assistant\nt says 1<|im_end|>\n"
    for t, query in asked(item, Likelihood):
        assert decode(query.ids[slice(*query.scored)]) == f"t says {t}<|im_end|>"


def test_long_conversations_of_new_people_come_first(monkeypatch):
    talks = [talk(5, "short"), talk(20, "1"), talk(20, "2"), talk(20, "3", ("c", "d")), talk(2, "tiny")]
    monkeypatch.setattr("ccm.evaluation.tasks.conversation.load_chitchat", lambda split: talks)
    items = list(get_task("conversation", steps=(2, 16)).items(TOKENIZER, 9))
    assert [item.name for item in items] == ["1", "3", "2", "short"]
    assert [list(item.queries) for item in items] == [[2, 16]] * 3 + [[2]]
    with pytest.raises(DataError, match="has no conversation of more than 64 turns"):
        list(get_task("conversation", steps=(64,)).items(TOKENIZER, 9))


def test_small_talk():
    items = fetched(lambda: check_items(get_task("conversation"), 40))
    by_id = {talk.id: talk for talk in load_chitchat("test")}
    assert all(len(item.segments) == 16 for item in items)
    first = [user for item in items[:20] for user in by_id[item.name].users]
    assert len(first) == len(set(first))  # nobody twice
    trained = {user for s in ("train", "validation") for t in load_chitchat(s, 1, None) for user in t.users}
    assert not {user for item in items for user in by_id[item.name].users} & trained
    for item in items:
        for t, query in asked(item, Likelihood):
            said = decode(query.ids[slice(*query.scored)])
            whole = by_id[item.name].turns[t].text + "<|im_end|>"
            assert said == whole or (
                len(said) >= 100 and whole.startswith(said.removesuffix("<|im_end|>")[:90])
            )


@pytest.fixture
def hub(monkeypatch) -> dict[str, list[dict[str, Any]]]:
    """A stand-in for the package ``datasets`` that knows what is put into the dictionary."""
    sets: dict[str, list[dict[str, Any]]] = {}

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        if name not in sets:
            raise ConnectionError(f"no {name} here")
        assert split == "test"
        return sets[name]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return sets


def test_hub(hub, monkeypatch):
    with pytest.raises(DataError, match="cannot load allenai/soda from the hub"):
        list(get_task("soda").items(TOKENIZER, 1))
    hub["allenai/soda"] = hub["roskoN/dailydialog"] = [
        {field: [f"{n} {k}" for k in range(n)] for field in ("dialogue", "utterances")} for n in range(3, 12)
    ]
    for name in ("soda", "daily-dialog"):
        items = check_items(get_task(name))
        assert [len(item.segments) for item in items] == [8, 8, 8, 2, 2, 4, 4, 4, 4]
        assert decode(items[0].queries[8][0].ids) == "<|im_start|>user\n9 8<|im_end|>\n"
    hub["emozilla/pg19"] = [{"short_book_title": f"Book {n}", "text": "word " * 99} for n in range(5)]
    assert [item.name for item in check_items(get_task("stream", source="pg19"), 4)] == [
        f"Book {n}" for n in range(4)
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="pip install datasets"):
        list(get_task("stream", source="pg19").items(TOKENIZER, 1))


def test_profiles_of_lamp(tmp_path):
    task = get_task("lamp", path=str(write_lamp(tmp_path)), steps=[1, 2, 4])
    items = check_items(task)
    assert [len(item.segments) for item in items] == [4] * 12  # long profiles first
    (query,) = items[0].queries[4]
    assert [decode(option).strip() for option in query.options] == ["crime", "sports", "travel"]
    assert query.answer == ["crime", "sports", "travel"].index(("sports", "crime", "travel")[4 % 3])
    assert items[0].name == "news dev4" and decode(query.prompt).startswith("dev 4 asks\nLabel:")
    assert texts(items[0])[-1] == "dev 4 wrote 3\nLabel: sports\n" and query.blank
    everyone = check_items(task, 99)
    assert {len(item.segments) for item in everyone} == {1, 2, 4} and "news dev7" not in str(everyone)
    with pytest.raises(DataError, match=r"no LaMP_2_movie/dev_questions\.json"):
        list(get_task("lamp", data="films", path=str(tmp_path)).items(TOKENIZER, 1))


# ---------------------------------------------------------------------- in-context learning


@pytest.fixture
def made_up(monkeypatch) -> tuple[str, ...]:
    labels = ("blue", "green", "red")

    def load_task(name: str, split: str) -> tasks.Task:
        assert split == "test" and name in tasks.TEST_TASKS
        items = [tasks.Item(f"{label} {k}", label) for label in labels for k in range(20)]
        return tasks.Task(name, tuple(items), labels, "none")

    monkeypatch.setattr("ccm.evaluation.tasks.icl.load_task", load_task)
    return labels


def test_demonstrations_and_inputs(made_up):
    items = check_items(get_task("icl", inputs=2), 48)
    assert [item.name.split()[0] for item in items[:8]] == list(tasks.TEST_TASKS)
    right = Counter()
    for item in items:
        assert len(item.segments) == 16
        inputs = [tuple(queries) for queries in item.queries.values()]
        assert len(inputs) == 6 and len(set(inputs)) == 1  # the same at every step
        for query in inputs[0]:
            text, rest = decode(query.prompt).split("\n")
            label = decode(query.options[query.answer]).strip()
            assert rest == "Label: " or rest == "Label:"
            assert text.startswith(label) and query.tag == item.name.split()[0]
            assert decode(query.blank).split("\n") == ["N/A", rest]
            assert not any(shown.startswith(f"{text}\n") for shown in texts(item))
            right[query.tag, label] += 1
        for shown in texts(item):
            text, label = re.fullmatch(r"(.*)\nLabel: (.*)\n", shown).groups()  # type: ignore[union-attr]
            assert text.startswith(label)
    assert set(right.values()) == {4} and len(right) == 24  # balanced: 12 inputs, 3 labels, 8 tasks


@pytest.mark.slow
def test_held_out_tasks():
    """Downloads 480 MB the first time."""
    items = fetched(lambda: check_items(get_task("icl"), 16))
    assert {item.name.split()[0] for item in items} == set(tasks.TEST_TASKS)
    assert max(len(ids) for item in items for ids in item.segments) < 100  # 64 and a label
    shown = {text.split("\nLabel")[0] for item in items for text in texts(item)}
    for name in tasks.TRAIN_TASKS:
        assert not shown & {item.text for item in tasks.load_task(name, "train").items}


# ---------------------------------------------------------------------- film ratings


def test_profiles():
    items = fetched(lambda: check_items(get_task("personalization"), 60))
    by_user = {f"user {p.user}": p for p in movielens.load_profiles("test")}
    train = {f"user {p.user}" for s in ("train", "validation") for p in movielens.load_profiles(s)}
    assert {item.name for item in items} <= set(by_user) and not {item.name for item in items} & train
    assert len(items[0].segments) == 16 and min(len(item.segments) for item in items) < 16
    for item in items:
        profile = by_user[item.name]
        history = [f"{r.prompt} {r.rating}" for r in profile.history]
        told = [line for text in texts(item) for line in text.splitlines()]
        assert told == history[-len(told) :] or len(item.segments) < 16
        assert any(told == history[k : k + len(told)] for k in range(len(history)))
        targets = {r.prompt: r.rating for r in profile.targets}
        queries = [tuple(q) for q in item.queries.values()]
        assert len(set(queries)) == 1 and len(queries[0]) == 4
        for query in queries[0]:
            rating = targets[decode(query.prompt).rstrip()]
            assert [decode(option).strip() for option in query.options] == list("12345")
            assert decode(query.options[query.answer]).strip() == str(rating)
            assert (query.groups[query.answer] == 1) == (rating >= 4)
            assert not query.blank


# ---------------------------------------------------------------------- books


def test_books_go_by():
    items = fetched(lambda: check_items(get_task("stream", tokens=1000), 5))
    assert [item.name for item in items] == ["Moby-Dick", "Persuasion", "Northanger Abbey"]
    splits = books.load_books()
    assert not {item.name for item in items} & {*splits["train"], *splits["validation"]}
    for item in items:
        assert len(item.segments) == 14 and {len(ids) for ids in item.segments} == {64}
        for t, query in asked(item, Likelihood):
            assert query.scored == (1, 64) and query.tag == "stream"
            assert t == 14 or item.segments[t] == query.ids  # what is foreseen is what comes next
        whole = [*item.segments, item.queries[14][0].ids]
        read = b"".join(decode(ids).encode("utf-8", "replace") for ids in whole)
        assert read[:900] == splits["test"][item.name].encode()[:900]


# ---------------------------------------------------------------------- questions about texts

DOMAINS = list(SQUAD_SHIFTS)


def paragraph(domain: str, n: int) -> dict[str, Any]:
    secret = f"secret{domain}{n}"
    context = f"In {domain} x{domain}{n} the  word\nis {secret}. " + "And so on. " * 30
    answers = [{"text": t} for t in ("the word is " + "so " * 9, secret, f" {secret} ")]
    vague = {"question": "What is it", "answers": answers}
    return {
        "context": context,
        "qas": [vague, {"question": f" What is the word in x{domain}{n}?", "answers": answers}],
    }


def story(n: int, kind: str, unknown: int = 99) -> dict[str, Any]:
    given = [{"input_text": "Unknown" if k == unknown else f"answer  {k}"} for k in range(8)]
    other = [{"input_text": f"reply {k}"} for k in range(8)]
    return {
        "id": f"s{n}",
        "source": kind,
        "story": " ".join(f"Sentence {k} of story {n} is here." for k in range(12)),
        "questions": [{"input_text": f"question {k}" + "?" * (k % 2)} for k in range(8)],
        "answers": given,
        "additional_answers": {"0": other, "1": other},
    }


@pytest.fixture
def bigbench(tmp_path, monkeypatch) -> Any:
    """A stand-in for the package; gives a function that writes a file into it."""

    def write(name: str, data: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps({"data": data}))
        load_squad_shifts.cache_clear()
        load_coqa.cache_clear()

    monkeypatch.setattr(Archive, "fetch", lambda self: tmp_path)
    for domain, file in SQUAD_SHIFTS.items():
        write(file, [{"title": f"title {n % 9}", "paragraphs": [paragraph(domain, n)]} for n in range(30)])
    write(COQA, [story(n, f"kind {n % 3}", unknown=n) for n in range(20)])
    yield write
    load_squad_shifts.cache_clear()
    load_coqa.cache_clear()


def test_paragraphs_one_by_one(bigbench):
    items = check_items(get_task("squad"), 20)
    assert len(items) == 10 and get_task("squad").steps == (1, 2, 4, 5, 6, 8, 12)
    read = [text for item in items for text in texts(item)]
    assert len(set(read)) == 120  # no paragraph twice
    for item in items:
        domains = Counter(re.search(r"In (\w+) ", text).group(1) for text in texts(item))  # type: ignore[union-attr]
        assert domains == dict.fromkeys(DOMAINS, 3)
        seen = Counter()
        for t, query in asked(item, Generation):
            distance = int(query.tag.removeprefix("squad distance "))
            source = decode(item.segments[t - distance - 1])
            secret = query.answers[0]
            assert secret in source and secret.startswith("secret")  # the most frequent answer, stripped
            place = re.search(r"In \w+ (\w+) ", source).group(1)  # type: ignore[union-attr]
            expected = f"<|im_start|>user\nWhat is the word in {place}? Answer with a few words.<|im_end|>\n"
            assert decode(query.prompt) == expected + "<|im_start|>assistant\n"
            seen[t - distance, distance] += 1
        assert seen == {(k, d): 1 for k in (1, 5) for d in (0, 1, 3, 7)}


def test_questions_point_to_their_paragraph():
    asking = [
        Question("What is it?", ("a",)),
        Question("What does Ada own?", ("a",)),
        Question("Ada?", ("b " * 9,)),
    ]
    paragraphs = [Paragraph("x", "Ada may own a ship.", tuple(asking)), Paragraph("y", "Bob may own it.", ())]
    assert pointed_question(paragraphs, 0) == asking[1]


def test_stories(bigbench):
    items = check_items(get_task("coqa"), 30)
    assert len(items) == 15  # the other five have no answer to one of the first questions
    kinds = {f"story {record.id}": record.kind for record in load_coqa()}
    assert len({kinds[item.name] for item in items[:3]}) == 3
    for item in items:
        number = item.name.removeprefix("story s")
        told = texts(item)
        inner = [text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n") for text in told[:8]]
        assert " ".join(inner) == " ".join(f"Sentence {k} of story {number} is here." for k in range(12))
        for t, query in asked(item, Generation):
            k = t - 8
            assert query.answers == (f"answer {k}", f"reply {k}")
            prompt = decode(query.prompt)
            assert f"\nquestion {k}? Answer with a few words.<|im_end|>" in prompt
            if t < len(told):  # the next segment is the question and its right answer
                assert told[t] == f"{prompt}answer {k}<|im_end|>\n"


def test_stories_are_cut_evenly():
    assert sentences('He said "No." Then he left! Why? 3.5 miles.') == [
        'He said "No."',
        "Then he left!",
        "Why? 3.5 miles.",
    ]
    rng = random.Random(0)
    for _ in range(200):
        parts = ["x" * rng.randint(1, 90) for _ in range(rng.randint(4, 30))]
        groups = cut(parts, 4)
        assert len(groups) == 4 and all(groups) and " ".join(groups) == " ".join(parts)
    assert list(map(len, cut(["x" * 9] * 12, 4))) == [29] * 4


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [5]}', '{"data": [{"id": 1}]}'])
def test_broken_packages(bigbench, content):
    bigbench(COQA, content)
    with pytest.raises(DataError, match=r"bigbench 1.0.0 is not as expected .*: delete"):
        list(get_task("coqa").items(TOKENIZER, 1))
    bigbench(SQUAD_SHIFTS["reddit"], content)
    with pytest.raises(DataError, match=r"bigbench 1.0.0 is not as expected .*: delete"):
        list(get_task("squad").items(TOKENIZER, 1))


@pytest.mark.slow
def test_real_questions():
    """Downloads 358 MB the first time."""
    domains = fetched(load_squad_shifts)
    assert sum(map(len, domains.values())) > 7500 and len(load_coqa()) == 700
    for name in ("squad", "coqa"):
        items = check_items(get_task(name), 40)
        assert len(items) == 40
        for item in items:
            for _, query in asked(item, Generation):
                assert name == "coqa" or min(len(answer.split()) for answer in query.answers) <= 5
    trained = {turn.text for talk in load_topical_chat()["train"] for turn in talk.turns}
    for item in check_items(get_task("topical-chat"), 40):
        assert not {t for t in texts(item) if len(t) > 80} & trained


# ---------------------------------------------------------------------- made-up facts


def test_values_are_never_trained_on():
    trained = {value.lower() for kind in facts.TRAIN for value in kind.values}
    for k in range(60):
        for history in (needles(k), updates(k)):
            for probe in (probe for probes in history.probes for probe in probes):
                assert not {option.lower() for option in probe.options} & trained
                assert len(set(probe.options)) == len(probe.options) and probe.value in probe.options


def test_needles_are_told_once_and_then_asked_for():
    for k in range(20):
        history = needles(k)
        told = " ".join(history.messages)
        assert len(history.messages) == 16 == len(history.probes[16]) and not history.probes[0]
        for t, probes in enumerate(history.probes):
            for probe in probes:
                statement = f"{probe.stem} {probe.value}."
                assert statement in " ".join(history.messages[:t]) and told.count(statement) == 1
                assert len(probe.options) == 8
                others = {p.value for p in history.probes[16] if p.kind == probe.kind}
                assert len(others) == 4 and others <= set(probe.options)
        people = {re.search(r"[A-Z]\w+ ([A-Z]\w+)", probe.question).group() for probe in history.probes[16]}  # type: ignore[union-attr]
        assert len(people) == 4
        assert (
            len({name.split()[0] for name in people}) == 2 and len({name.split()[1] for name in people}) == 2
        )
        codes = next(probe.options for probe in history.probes[16] if probe.kind == "number")
        assert len({"".join(sorted(code)) for code in codes}) == 1


TOLD = {
    "name": r"her name is (\w+)|now on she is called (\w+)|above us is called (\w+)|new one is called (\w+)",
    "number": r"the number (\d+)|room, number (\d+)|I take bus (\d+)",
    "preference": r"could eat (\w+)|order (\w+)",
    "order": r"came to (\w+)|my (\w+) lesson",
}


def told(history: History, kind: str, t: int) -> list[str]:
    found = (re.search(TOLD[kind], message) for message in history.messages[:t])
    return [next(filter(None, match.groups())) for match in found if match]


def test_updates_are_asked_for_as_they_are_now():
    stale, kinds, places = 0, Counter(), Counter()
    for k in range(40):
        history = updates(k)
        assert [len(told(history, kind, MESSAGES)) for kind in TOLD] == [4] * 4
        assert [len(told(history, kind, 4)) for kind in TOLD] == [1] * 4
        for t, probes in enumerate(history.probes):
            assert {p.kind for p in probes} == {c for c in TOLD if len(told(history, c, t)) > (c == "order")}
            for probe in probes:
                values = told(history, probe.kind, t)
                if probe.kind != "order":
                    right = values[-1]
                    stale += values[0] != right
                elif "right after" in probe.question:
                    before = re.search(r"right after (\w+)", probe.question).group(1)  # type: ignore[union-attr]
                    right = values[values.index(before) + 1]
                else:
                    right = values[0]
                assert probe.value == right and set(values) <= set(probe.options) and len(probe.options) == 6
                kinds[probe.kind] += 1
                places[probe.options.index(right)] += 1
    assert stale > 500  # who remembers only what was told first is wrong
    assert min(places.values()) > 0.12 * sum(places.values()) and len(kinds) == 4


@pytest.mark.parametrize("name", ["needles", "updates"])
def test_made_up_items(name):
    items = check_items(get_task(name))
    make = {"needles": needles, "updates": updates}[name]
    for k, item in enumerate(items):
        history = make(k)
        assert texts(item) == [f"<|im_start|>user\n{message}<|im_end|>\n" for message in history.messages]
        for t, query in asked(item, Choice):
            prompt = decode(query.prompt)
            probe = next(p for p in history.probes[t] if p.question in prompt and p.stem in prompt)
            whole = prompt + decode(query.options[query.answer])
            assert whole.endswith(f"<|im_start|>assistant\n{probe.stem} {probe.value}")
            assert len(query.options) == len(probe.options) and query.tag == probe.kind
        for _, query in asked(item, Generation):
            assert decode(query.prompt).endswith((" is", " in", " called", " brings"))
            assert query.max_tokens == len(f" {query.answers[0]}")  # letters are tokens here
    tags = {q.tag for item in items for _, q in asked(item, Choice)}
    assert tags == {"name", "number", "preference", {"needles": "place", "updates": "order"}[name]}
    other = next(get_task(name, steps=(1, 2)).items(TOKENIZER, 1))
    assert len(other.segments) == 2 and other.segments == items[0].segments[:2]


def test_without_chat_template():
    plain = tiny_tokenizer()
    plain.chat_template = None
    item = next(get_task("updates").items(plain, 1))
    assert plain.decode(item.segments[0]).startswith("user: ")
    assert "\nassistant: " in plain.decode(item.queries[1][0].prompt)


def test_sources_do_not_offer_what_is_for_evaluation_alone():
    for name in ("squad", "coqa", "needles", "updates"):
        with pytest.raises(UnknownNameError):
            get_source(name, TOKENIZER)
