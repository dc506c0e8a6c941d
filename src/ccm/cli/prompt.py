"""What people type. On a terminal with line editing, pastes and completion; elsewhere line by line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

#: A paste of more characters is shown by its size.
LONG = 1000
#: What makes a terminal mark the begin and the end of a paste.
_MARK_PASTES, _PLAIN_PASTES = "\x1b[?2004h", "\x1b[?2004l"


def is_interactive() -> bool:
    """Whether somebody types, on a terminal that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def is_typed() -> bool:
    """Whether somebody types, on a terminal of any kind."""
    return sys.stdin.isatty()


class Lines:
    """Input line by line: each is one message. For pipes and for terminals that cannot do more."""

    def ask(self, name: str) -> str:
        """The next message. Raises EOFError at the end."""
        return input(f"{name}> " if is_typed() else "")

    @contextmanager
    def open(self) -> Iterator[None]:
        """While the conversation goes on."""
        yield


class Editor:
    """Input with keys: Enter sends, Alt-Enter begins a new line, a paste is one message whatever it holds.

    Args:
        commands: that Tab completes.
        toolbar: what the last line of the screen says, asked for again and again.
    """

    def __init__(self, commands: Sequence[str], toolbar: Callable[[], str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys
        from prompt_toolkit.styles import Style

        self._pastes: dict[str, str] = {}
        keys = KeyBindings()
        keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add("c-j")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add(Keys.BracketedPaste)(
            lambda event: event.current_buffer.insert_text(self._pasted(event.data))
        )
        self._session: Any = PromptSession(
            multiline=True,
            key_bindings=keys,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            bottom_toolbar=toolbar,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
            refresh_interval=0.25,
            prompt_continuation="  ",
        )

    def ask(self, name: str) -> str:
        """The next message. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        from prompt_toolkit.patch_stdout import patch_stdout

        try:
            with patch_stdout(raw=True):
                text = str(self._session.prompt([("bold ansicyan", f"{name}> ")]))
        finally:
            sys.stdout.write(_MARK_PASTES)  # also what is pasted while an answer is written
            sys.stdout.flush()
        for shown, whole in self._pastes.items():
            text = text.replace(shown, whole)
        self._pastes.clear()
        return text

    def fail(self, error: BaseException) -> None:
        """End the question that is on the screen with an error; from any thread."""
        app = self._session.app
        if app.is_running and app.loop is not None:
            with suppress(Exception):  # it has just been answered: the next step meets the error
                app.loop.call_soon_threadsafe(lambda: app.exit(exception=error))

    @contextmanager
    def open(self) -> Iterator[None]:
        """While the conversation goes on. What is typed or pasted while nobody is asked waits, whole and unseen.

        A terminal that edits lines itself keeps 4,095 bytes of a line and drops the rest.
        """
        import termios

        file = sys.stdin.fileno()
        before = termios.tcgetattr(file)
        raw = termios.tcgetattr(file)
        raw[0] &= ~termios.ICRNL  # as the editor reads it: Enter is not the end of a pasted line
        raw[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(file, termios.TCSANOW, raw)
        try:
            yield
        finally:
            termios.tcsetattr(file, termios.TCSANOW, before)
            sys.stdout.write(_PLAIN_PASTES)
            sys.stdout.flush()

    def _pasted(self, text: str) -> str:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if len(text) <= LONG:
            return text
        count = len(self._pastes) + 1
        shown = f"[paste {count}: {len(text.split()):,} words]"
        self._pastes[shown] = text
        return shown
