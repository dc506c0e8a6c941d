"""Conversations in every format, facts told in them, lists, and rows that are cut anew."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_sources import TOKENIZER, check_rows, fetched, scored, texts

from ccm.data import get_source
from ccm.data.conversation import SPLITS
from ccm.data.documents import _handbook, _jargon, _manuals, plain_roff
from ccm.data.formats import FORMATS, Bare, Said, Style, draw_style, read_formats, write
from ccm.data.lists import HELD_OUT, SUBJECTS
from ccm.data.other_talks import _errands, _everyday, _films
from ccm.data.rows import ConversationRow
from ccm.data.telling import KINDS, kinds_of, plant_told, swapped
from ccm.errors import ConfigError, UnknownNameError
from ccm.training.config import TrainConfig
from ccm.training.targets import NONE, RECALL, TEXT, Row, marked, recut

SAID = [Said(("user", "assistant")[k % 2], f"words {k}, and more of them") for k in range(8)]


def recalled(row: ConversationRow) -> list[str]:
    return [TOKENIZER.decode(row.segments[i][start:stop]).strip() for i, start, stop in row.recall]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    def chat(number: int) -> str:
        said = [
            {"role": ("user", "assistant")[k % 2], "content": f"talk {number}, message {k}\nand on"}
            for k in range(12)
        ]
        return json.dumps({"messages": said})

    (tmp_path / "x.jsonl").write_text("\n".join(chat(n) for n in range(60)))
    return tmp_path


@pytest.mark.parametrize("name", FORMATS)
def test_the_words_are_scored_and_nothing_else(name: str) -> None:
    for seed in range(40):
        style = draw_style({name: 1.0}, TOKENIZER, random.Random(seed))
        turns, recall = write(SAID, style)
        opening = turns[: len(turns) - len(SAID)]
        assert not recall and all(turn.content == (0, 0) for turn in opening)
        for one, turn in zip(SAID, turns[len(opening) :], strict=True):
            start, stop = turn.content
            words = TOKENIZER.decode(turn.ids[start:stop])
            bare = TOKENIZER.decode(turn.ids).startswith(one.text)  # its first token has nothing before it
            assert words.strip().startswith(one.text[bare:7])
            assert one.text not in TOKENIZER.decode(turn.ids[:start])
            assert one.text in TOKENIZER.decode(turn.ids) and start < stop


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_to_be_recalled_is_found_in_every_format(name: str) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        style = draw_style({name: 1.0}, TOKENIZER, rng)
        values = ["Miso", "K7-49", "Brackenford", "48213"]
        said = list(SAID)
        for k, value in enumerate(values):
            before, behind = ("It is ", ".") if k else ("", rng.choice(("", ", I think.")))
            text = f"{before}{value}{behind}"
            said.append(Said("assistant", text, (len(before), len(before) + len(value))))
        turns, recall = write(said, style)
        found = [TOKENIZER.decode(turns[i].ids[a:b]).strip() for i, a, b in recall]
        bare = TOKENIZER.decode(turns[recall[0][0]].ids).startswith("Miso")  # nothing stands before its "M"
        assert found == [values[0][bare:], *values[1:]]


def test_formats_differ_in_the_way_they_should() -> None:
    bare, _ = write(SAID, Bare(TOKENIZER))
    plain, _ = write(SAID, Style(TOKENIZER))
    assert [turn.ids for turn in bare[1:]] == [turn.ids for turn in plain[1:]]
    names, _ = write(SAID, draw_style({"names": 1.0}, TOKENIZER, random.Random(3)))
    script, _ = write(SAID, draw_style({"script": 1.0}, TOKENIZER, random.Random(3)))
    for turns in (names, script):
        assert "im_start" not in "".join(TOKENIZER.decode(turn.ids) for turn in turns)
    own, _ = write(
        [Said("system", "Be kind."), *SAID], draw_style({"roles": 1.0}, TOKENIZER, random.Random(0))
    )
    assert TOKENIZER.decode(own[0].ids).strip() == "Be kind."


def test_a_long_turn_is_cut_but_not_its_end() -> None:
    long = [Said("user", "word " * 400), *SAID]
    turns, _ = write(long, draw_style({"names": 1.0}, TOKENIZER, random.Random(1)), max_turn_tokens=32)
    cut = turns[-len(long)]
    assert cut.content[1] - cut.content[0] == 32 and cut.ids[-1] == turns[-1].ids[-1]


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_rows_of_a_conversation_source_in_every_format(logs: Path, name: str | None) -> None:
    source = get_source("jsonl", TOKENIZER, path=logs, turns=[4, 8], formats=name, facts=0.5, echoes=0.3)
    rows = check_rows(source)
    assert any(row.recall for row in rows)
    for row in source.held_out("test", 3):
        assert not row.recall and sum("message" in text for text in texts(row)) == 4
        assert all("and on" in text for text in scored(row) if text)


def test_without_formats_rows_are_as_ever(logs: Path) -> None:
    old = get_source("jsonl", TOKENIZER, path=logs, turns=[4, 8], facts=0.5, echoes=0.3)
    row = old.draw(random.Random(5))
    assert row == get_source(
        "jsonl", TOKENIZER, path=logs, turns=[4, 8], facts=0.5, echoes=0.3, formats=None
    ).draw(random.Random(5))
    plain = [get_source("jsonl", TOKENIZER, path=logs, turns=8, formats=f) for f in (None, "template")]
    assert plain[0].held_out("test", 9) == plain[1].held_out("test", 9)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("poem", UnknownNameError),
        (["names", "poem"], UnknownNameError),
        ({"names": -1}, ConfigError),
        ({"names": True}, ConfigError),
        ({"names": 0}, ConfigError),
        ([], ConfigError),
        (3, ConfigError),
        ([3], ConfigError),
    ],
)
def test_formats_that_are_none(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"format"):
        read_formats("formats", value)
    assert read_formats("formats", ["names", "lines"]) == {"names": 1.0, "lines": 1.0}


# ---------------------------------------------------------------------- told facts


def test_told_facts_are_told_before_they_are_asked_for() -> None:
    distances = set()
    for seed in range(60):
        said = plant_told(SAID, random.Random(seed), 4, changed=0.4, people=seed % 2 == 0)
        assert all(a.role != b.role or a.recall[1] or b.recall[1] for a, b in pairwise(said))
        asked = [(k, one.text[one.recall[0] : one.recall[1]]) for k, one in enumerate(said) if one.recall[1]]
        assert len(asked) == 4
        for k, value in asked:
            told = [i for i in range(k) if value in said[i].text]
            assert told, (value, said)
            distances.add(k - told[0])
    assert min(distances) <= 3 and max(distances) >= 8


def test_the_newest_value_counts() -> None:
    changed = 0
    for seed in range(40):
        said = plant_told([], random.Random(seed), 1, changed=0.7)
        value = next(one.text[one.recall[0] : one.recall[1]] for one in said if one.recall[1])
        told = [one.text for one in said if one.role == "user"]
        before = told[0] if value not in told[0] else ""
        changed += bool(before)
    assert changed > 5


def test_kinds_of_facts_are_held_out_and_values_hardly_repeat() -> None:
    parts = [{kind.name for kind in kinds_of(split)} for split in SPLITS]
    assert sum(map(len, parts)) == len(KINDS) == len(set.union(*parts)) and min(map(len, parts)) >= 8
    rng = random.Random(0)
    for name in ("name", "town", "dog"):
        (kind,) = (kind for kind in KINDS if kind.name == name)
        assert len({kind.value(rng) for _ in range(400)}) > 150
    for kind in KINDS:
        assert all(text.count("{}") == 1 for text in kind.statements)
        assert all("{}" not in question and answer.count("{}") == 1 for question, answer in kind.questions)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("What is my dog called?", "What is your dog called?"),
        ("Your dog is called {}", "My dog is called {}"),
        ("What am I allergic to?", "What are you allergic to?"),
        ("You are allergic to {}", "I am allergic to {}"),
        ("Where do I live?", "Where do you live?"),
    ],
)
def test_the_other_one_says_it(text: str, other: str) -> None:
    assert swapped(text) == other


def test_told_rows() -> None:
    source = fetched(lambda: get_source("told", TOKENIZER, turns=[8, 16], formats=["template", "names"]))
    rows = fetched(lambda: check_rows(source, 20))
    for row in [*rows, *source.held_out("test", 5)]:
        assert row.recall and all(recalled(row))


# ---------------------------------------------------------------------- lists


@pytest.mark.parametrize("kind", SUBJECTS)
def test_lists(kind: str) -> None:
    source = get_source("lists", TOKENIZER, kinds=[kind], formats=["template", "roles"], entries=3)
    for row in check_rows(source, 10):
        assert row.recall
        for (segment, _, _), value in zip(row.recall, recalled(row), strict=True):
            assert value and any(value.lower() in text.lower() for text in texts(row)[:segment])


def test_whole_subjects_of_lists_are_held_out() -> None:
    source = get_source("lists", TOKENIZER)
    assert not set(source.kinds) & set(HELD_OUT)  # type: ignore[attr-defined]
    assert any(
        "gate" in text or "departs" in text for row in source.held_out("test", 8) for text in texts(row)
    )
    with pytest.raises(UnknownNameError, match="unknown kind 'stars'"):
        get_source("lists", TOKENIZER, kinds=["stars"])


# ---------------------------------------------------------------------- other sources


def test_scenes_of_films_follow_what_is_known_of_the_speakers() -> None:
    text = "You are late. I know. Is it bad? Yes. ----- In the preceding conversation, "
    text += 'were the sentences "{}" and "{}" '
    pairs = [("You are late.", "I know.", 0), ("Yes.", "x", 1)]
    examples = [
        {"input": text.format(a, b), "target_scores": {"same": same, "different": 1 - same}}
        for a, b, same in pairs
    ]
    ((_, talk),) = _films(examples)
    said = [turn.text for turn in talk.turns]
    assert said[0] == "You are late." and "Yes." in said  # somebody else answers a question


def test_dialogs_of_tasks() -> None:
    example = {
        "input": 'The assistant signals. The conversation so far has been for following: user: "Hi. A house?". '
        'response: "Which town?". user: "Rome.". ',
        "target": "I found 3.",
        "comment": "x",
    }
    ((_, talk),) = _errands([example])
    assert [turn.text for turn in talk.turns] == ["Hi. A house?", "Which town?", "Rome.", "I found 3."]
    example = {
        "input": "Which phrase best fits the <MASK> span? Context:\nA: How long?\nB: <MASK>, I think.\nA: Fine.",
        "target_scores": {"two weeks": 0, "two hours ": 1},
    }
    ((_, talk),) = _everyday([example, example])
    assert [turn.text for turn in talk.turns] == ["How long?", "two hours, I think.", "Fine."]


def test_manual_pages_without_markup() -> None:
    page = '.TH x 3\n.SH NAME\nx \\- does it\n.\\" no\n.PP\nSee\n.BR open (2)\n'
    page += "for\n.I more .\n.EX\nint \\fBx\\fP;\n.EE\n"
    assert plain_roff(page) == "NAME\n\nx - does it\n\nSee open(2) for more .\nint x;"


def test_documents_of_packages(tmp_path: Path) -> None:
    files = {
        "usr/share/doc/jargon-text/jargon.txt.gz": b"Contents\n   :foo: n.\n\n   A word.\n\n   :bar: v.\n   Do.\n",
        "usr/share/man/man3/open.3.gz": b".SH NAME\nopen\n",
        "usr/share/man/man3/link.3.gz": b".so man3/open.3\n",
        "usr/share/doc/debian-handbook/html/en-US/a.html": b"<style>x</style><p>One &amp; two</p><p>Next</p>",
        "usr/share/doc/debian-handbook/html/en-US/b.html": b"<p>Next</p><p>Three</p>",
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [text for _, text, _ in _jargon(tmp_path)] == [":foo: n.\n\nA word.", ":bar: v.\nDo."]
    assert [text for _, text, _ in _manuals(tmp_path)] == ["open.3\n\nNAME\n\nopen"]
    assert [text for _, text, _ in _handbook(tmp_path)] == ["One & two\n\nNext", "Three"]


OTHERS: dict[str, dict[str, Any]] = {
    "film-dialogs": {"turns": 6},
    "errands": {"turns": 6},
    "time-dial": {"turns": 6},
    "documents": {"kinds": ["how-to"]},
    "code": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_other_sources(name: str) -> None:
    source = fetched(lambda: get_source(name, TOKENIZER, **OTHERS[name]))
    fetched(lambda: check_rows(source, 8))


def test_kinds_of_documents() -> None:
    with pytest.raises(UnknownNameError, match="unknown kind 'poems'"):
        get_source("documents", TOKENIZER, kinds=["poems"])
    with pytest.raises(ConfigError, match="kinds is"):
        get_source("documents", TOKENIZER, kinds=[])


def test_rows_of_several_lengths(tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"{n}x{k}" for k in range(2000)))
    source = get_source("text", TOKENIZER, path=tmp_path, segment_tokens=[8, 32], row_tokens=[64, 256])
    lengths = {row.tokens for row in check_rows(source, 40)}
    assert min(lengths) <= 64 and 200 < max(lengths) <= 256
    assert all(row.tokens <= 64 for row in source.held_out("test", 9))


# ---------------------------------------------------------------------- recut


def random_row(rng: random.Random) -> Row:
    lengths = [rng.randrange(1, 90) for _ in range(rng.randrange(1, 12))]
    ids = [tuple(rng.randrange(1000) for _ in range(length)) for length in lengths]
    roles = [(NONE, *(rng.choice((NONE, TEXT, TEXT, RECALL)) for _ in segment[1:])) for segment in ids]
    return Row(tuple(ids), tuple(roles))


def test_recut_keeps_tokens_and_roles() -> None:
    lengths = set()
    for seed in range(300):
        rng = random.Random(seed)
        row = random_row(rng)
        new = recut(row, rng)
        assert sum(new.segments, ()) == sum(row.segments, ())
        assert [len(ids) for ids in new.segments] == [len(roles) for roles in new.roles]
        old, at = sum(row.roles, ()), 0
        for roles in new.roles:
            assert roles[0] == NONE and roles[1:] == old[at + 1 : at + len(roles)]
            at += len(roles)
        if any(old):
            assert any(new.roles[-1])  # what is foreseen last is there
        assert len({len(ids) for ids in new.segments[:-1]}) <= 1
        lengths.add(len(new.segments[0]))
        assert recut(row, random.Random(seed)) == recut(row, random.Random(seed))
    assert len(lengths) > 30 and min(lengths) >= 2 and max(lengths) <= 256


def test_recut_of_a_conversation(logs: Path) -> None:
    row = marked(get_source("jsonl", TOKENIZER, path=logs, turns=8).draw(random.Random(0)))
    new = recut(row, random.Random(0), 16, 16)
    assert {len(ids) for ids in new.segments[:-1]} == {16} and len(new.segments) != len(row.segments)
    with pytest.raises(ConfigError, match=r"recut: got 2, expected a share"):
        TrainConfig(recut=2)
