"""The parts of ``ccm chat``: words that come in pieces, Ctrl-C, the bar, the settings; and answers three ways."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import scramble, tiny_model, tiny_tokenizer

from ccm import cli
from ccm.chat.messages import Message
from ccm.cli.flow import Flow
from ccm.cli.prompt import LONG, Editor
from ccm.cli.repl import Stop, _number
from ccm.cli.screen import bar
from ccm.comparison import WAYS, Comparison
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import ConfigError
from ccm.session import Session

TOKENIZER = tiny_tokenizer()


# ---------------------------------------------------------------------- words


def flowing(*pieces: str, width: int = 20, terminal: bool = True) -> str:
    out = io.StringIO()
    flow = Flow(Console(file=out, width=width, force_terminal=terminal, color_system=None))
    for piece in pieces:
        flow.add(piece)
    flow.end()
    return out.getvalue()


def test_an_answer_is_wrapped_at_words_however_it_comes() -> None:
    text = "The quick brown fox jumps over the lazy dog.\n\n    and a line of its own"
    whole = flowing(text)
    assert whole == "The quick brown fox\njumps over the lazy\ndog.\n\n    and a line of\nits own\n"
    assert flowing(*text) == whole, "letter by letter"
    assert flowing("Hel", "lo wor", "ld") == "Hello world\n"
    assert flowing(text, terminal=False) == text + "\n", "a file gets it as it is"


def test_wide_letters_count_twice() -> None:
    assert flowing("日本語 日本語 日本語 日本語", width=14) == "日本語 日本語\n日本語 日本語\n"


# ---------------------------------------------------------------------- keys


def test_control_c_ends_an_answer_that_has_begun_and_takes_back_one_that_has_not() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    with stop.heard():
        assert not stop(ids, None).any()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.begun = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(ids, None).all() and stop(ids, None).dtype == torch.bool
        with pytest.raises(KeyboardInterrupt):  # somebody is in a hurry
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_long_paste_is_shown_by_its_size_and_sent_whole() -> None:
    class Still(Editor):
        def __init__(self) -> None:
            self._pastes = {}

    editor = Still()
    assert editor._pasted("a\r\nb\rc") == "a\nb\nc"
    text = "word " * LONG
    shown = editor._pasted(text)
    assert shown == "[paste 1: 1,000 words]" and editor._pasted("x" * (LONG + 1)) == "[paste 2: 1 words]"
    assert editor._pastes[shown] == text, "not a letter is lost"


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("held", "limit", "cells"),
    [
        ((0, 0, 0, 0), 100, "░" * 20),
        ((0, 4, 40, 36), 80, "█" * 20),
        ((0, 1, 0, 9), 100, "██" + "░" * 18),
        ((0, 0, 0, 50), None, "█" * 20),
        ((20, 0, 0, 5), 100, "█" * 5 + "░" * 15),
    ],
)
def test_the_bar_is_as_long_as_what_is_held(held: tuple[int, ...], limit: int | None, cells: str) -> None:
    parts = bar(dict(zip(("pinned", "sink", "slots", "window"), held, strict=True)), limit, 20)
    assert "".join(text for _, text in parts) == cells
    for (_, text), count in zip(parts, held, strict=False):
        assert bool(text) == bool(count), "what there is is seen, however little"


def test_settings_are_numbers() -> None:
    assert _number("temperature", "0.5") == 0.5 and _number("seed", "0") == 0
    for name, text in (("temperature", "warm"), ("top_k", "2.5"), ("temperature", "-1"), ("max_tokens", "0")):
        with pytest.raises(ConfigError, match=name):
            _number(name, text)


# ---------------------------------------------------------------------- three answers


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    return scramble(Compressor(model, CompressorConfig(slots=2)))


def test_a_question_is_answered_three_ways(compressor: Compressor) -> None:
    said = [Message("user", "My dog is called Biscuit."), Message("assistant", "What a name!")]
    session, whole = Session(compressor, TOKENIZER), Session.open(compressor.model, TOKENIZER, "full")
    for message in said:
        session.append(message)
        whole.append(message)
    before = session.memory
    comparison, heard = Comparison(session), []
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
    answers = comparison.ask("And my cat?", said, on_answer=lambda way, answer: heard.append(way), **options)
    assert list(answers) == heard == list(WAYS)
    assert session.memory is before and session.turns == 2, "the session stays as it is"
    nothing = Session.open(compressor.model, TOKENIZER, "none")
    expected = (s.generate("And my cat?", **options) for s in (session.fork(), whole.fork(), nothing))
    assert [answer.text for answer in answers.values()] == list(expected)
    sizes = {way: answer.kv_bytes for way, answer in answers.items()}
    assert 0 == sizes["none"] < sizes["memory"] < sizes["full"] == whole.stats()["nbytes"]
    # a turn is taken back: the full context forgets it, too
    shorter = comparison.ask("And my cat?", said[:1], ways=["full"], **options)["full"]
    assert shorter.kv_bytes < sizes["full"]


def test_reading_is_reported(compressor: Compressor) -> None:
    session, heard = Session(compressor, TOKENIZER, segment=16), []
    session.generate("A long message. " * 50, max_new_tokens=2, on_read=lambda *read: heard.append(read))
    assert len(heard) > 2 and [done for done, _ in heard] == sorted({done for done, _ in heard})
    assert len({count for _, count in heard}) == 1 and heard[-1][0] == heard[-1][1]


# ---------------------------------------------------------------------- through a pipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def piped(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *options: str
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    where = ["--model", str(model), "--memory", "streaming-llm:window=64", "--max-tokens", "4"]
    assert cli.main(["chat", *where, *options]) == 0
    return capsys.readouterr().out


def test_a_pipe_gets_the_answers_and_no_more(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = piped(
        model, monkeypatch, capsys, "Hello there.\n/set seed 5\n/retry\n/undo\n/undo\n", "--seed", "1"
    )
    assert "\x1b" not in shown and "/help lists" not in shown
    assert shown.count("… cut at 4 tokens") == 2
    assert "taken back: 0 turns are left" in shown and "there is nothing to take back" in shown


def test_every_answer_beside_the_others(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = piped(model, monkeypatch, capsys, "Hello there.\nAnd you?\n", "--compare", "--temperature", "0")
    assert shown.count("full context\n") + shown.count("full context ") >= 2 and "no keys and values" in shown


def test_a_system_text_later_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = piped(model, monkeypatch, capsys, "/system\n/system Be brief.\nHello.\n/history\n/history x\n")
    assert "no system text" in shown and "Be brief." in shown.split("no system text")[1]
    assert "1  system" in shown and "history: got 'x'" in shown


def test_a_pin_is_shown_and_is_not_taken_back(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "/pin\nHello.\n/pin Be brief.\n/memory\n/undo\n/memory\n/pin   \n/reset\n/pin\n"
    shown = piped(model, monkeypatch, capsys, typed)
    assert shown.count("nothing is pinned") == 2, "at the beginning, and after /reset"
    before, after = shown.split("taken back: 0 turns are left")
    for part in (before, after):
        assert " pinned" in part and "■ pinned 0–" in part and "Be brief." in part
    assert "■ window" in before and "■ window" not in after
