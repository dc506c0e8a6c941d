"""``ccm chat`` on a terminal: a real pseudo-terminal, a tiny model, and what then stands on the screen."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from terminal import Terminal
from tiny import tiny_model, tiny_tokenizer

from ccm.cli.repl import Repl

PASTED = [f"Line {number} of a paste." for number in range(1, 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(model: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_it(*options: str, **environment: str) -> Terminal:
        where = ["--model", str(model), "--memory", "streaming-llm:sink=2,window=120", "--max-tokens", "8"]
        command = [sys.executable, "-m", "ccm", "chat", *where, *options]
        terminal = Terminal(command, (90, 40), {"OMP_NUM_THREADS": "1", **environment})
        opened.append(terminal)
        return terminal

    yield open_it
    for terminal in opened:
        terminal.kill()


def answers(count: int) -> Callable[[str], bool]:
    return lambda text: text.count("tokens folded") >= count


def test_a_conversation_on_a_terminal(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    """Every way to type, in one run: it takes seconds to start."""
    screen = chat("--seed", "3")
    screen.until("/help lists the commands")
    screen.until("main>")
    screen.until("loading the model")  # the question is there before the model is
    screen.type("Hello there.\r")  # typed ahead
    screen.until(answers(1))
    assert "… cut at 8 tokens" in screen.text
    screen.until("of at most 46.8 kB")  # the toolbar says what the memory may hold

    assert screen.marks_pastes
    screen.paste("\n".join(PASTED))
    screen.until(PASTED[-1])
    screen.type("\r")
    screen.until(answers(2))
    screen.type("/history\r")
    screen.until(lambda text: " 4  assistant" in text)  # six pasted lines are one message

    screen.type("/undo\r")
    screen.until("taken back: 2 turns are left")
    screen.type("/retry\r")
    screen.until(answers(3))
    screen.type("/set temperature 0\r")
    screen.until("yours")
    screen.type("/set warmth 0\r")
    screen.until("unknown setting 'warmth'")
    screen.type("/memory\r")
    screen.until("turn 1, user")
    screen.type("/compare What did I say?\r")
    screen.until("no keys and values")
    assert "the memory" in screen.text and "full context" in screen.text
    screen.type(f"/save {tmp_path}/a.ccm\r")
    screen.until("saved to")
    screen.type(f"/load {tmp_path}/a.ccm\r")
    screen.until("loaded")
    screen.type("/compare Who?\r")
    screen.until("keeps the beginning of each turn only")
    screen.until(lambda text: screen.line.startswith("main>"))
    screen.type("\x03")
    screen.until(lambda text: text.count("Ctrl-D leaves") == 2)  # once in the banner
    screen.type("\x04")
    assert screen.end() == 0


def test_control_c_between_two_messages_ends_nothing() -> None:
    """It was seen: pressed just behind an answer, it ended the program with code 130."""
    ready: Future[Any] = Future()
    ready.set_result(SimpleNamespace())
    said = StringIO()
    repl = Repl(ready, Console(file=said))
    presses = iter([None, KeyboardInterrupt, None])

    def open_it() -> None:
        if press := next(presses):
            raise press

    repl._open = open_it  # type: ignore[method-assign]
    repl.input = SimpleNamespace(  # type: ignore[assignment]
        open=nullcontext, ask=lambda name, keys=iter(["/help", "/exit"]): next(keys)
    )
    repl.run()
    assert "Ctrl-D leaves" in said.getvalue()
    assert next(presses, "all came") == "all came"


def test_a_long_paste_during_an_answer_is_whole(chat: Callable[..., Terminal]) -> None:
    """3,000 words; a terminal that edits lines itself keeps the first 4,095 bytes of a line."""
    screen = chat("--max-tokens", "400")
    screen.until("main>")
    screen.type("Go on.\r")
    screen.until("{")  # what this model begins with
    words = " ".join(f"word{number}" for number in range(3000))
    screen.paste(words)
    screen.until("[paste 1: 3,000 words]")
    screen.type("\r")
    screen.until("reading")
    screen.until(answers(2))
    screen.type("/history 2\r")
    screen.until("word0 word1")
    folded = screen.text.split(" tokens folded")[-2].split()[-1]
    assert int(folded) > 9000, "all of it was read: of a word that no token stands for, every letter"
    screen.type("\x04")
    assert screen.end() == 0


def test_control_c_keeps_what_was_said(chat: Callable[..., Terminal]) -> None:
    screen = chat("--max-tokens", "3000")
    screen.until("main>")
    screen.type("Go on.\r")
    screen.until("{")  # what this model begins with
    os.kill(screen.pid, signal.SIGINT)
    screen.until("stopped; what is written stays")
    screen.type("/switch\r")
    screen.until("main, 2 turns")
    screen.type("/exit\r")
    assert screen.end() == 0


def test_a_bad_model_ends_it(chat: Callable[..., Terminal]) -> None:
    screen = chat("--model", "no/such/model")
    assert screen.end() == 2
    assert "no model 'no/such/model'" in " ".join(screen.text.split())


def test_a_terminal_that_can_do_nothing(chat: Callable[..., Terminal]) -> None:
    screen = chat(TERM="dumb")
    screen.until("main>")
    screen.type("Hello there.\r")
    screen.until(answers(1))
    screen.type("\x04")
    assert screen.end() == 0
    written = "".join(text for _, text in screen.shown)
    assert "\x1b[?2004h" not in written and "\x1b[" not in written.replace("\x1b[0m", "")
