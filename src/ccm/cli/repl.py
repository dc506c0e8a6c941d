"""``ccm chat``: an interactive conversation that shows its memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..chat.messages import Thought
from ..errors import CCMError, ConfigError, UnknownNameError
from ..methods.accounting import reach_in_words
from ..session import Session

#: Cool enough for a model of 135 M parameters to stay on its subject, and a penalty against loops.
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 128,
}

HELP = {
    "/save FILE": "write the session to a file",
    "/load FILE": "go on from a file",
    "/fork [NAME]": "copy the session; what one is told, the other does not know",
    "/switch [NAME]": "go to another session, or list them",
    "/memory": "what the memory holds",
    "/reset": "forget everything",
    "/help": "this list",
    "/quit": "leave (also Ctrl-D)",
}


class Repl:
    """Reads lines from stdin, answers, and shows the memory after each answer.

    Args:
        session: where the conversation is.
        begin: makes a fresh session, for ``/reset``.
        console: where everything is shown.
    """

    def __init__(self, session: Session, begin: Callable[[], Session], console: Console):
        self.sessions = {"main": session}
        self.current = "main"
        self.begin, self.console = begin, console

    @property
    def session(self) -> Session:
        """The session that is talked to."""
        return self.sessions[self.current]

    def run(self) -> None:
        """Until /quit or the end of input. An error is one line, and the conversation goes on."""
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() its history
            self._say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                line = self._read().strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\nstopped: this turn is forgotten; /quit leaves")
            except CCMError as error:
                self._say(f"error: {' '.join(str(error).split())}", style="red")

    def _read(self) -> str:
        return input(f"{self.current}> " if sys.stdin.isatty() else "")

    def _say(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _answer(self, text: str) -> None:
        def show(piece: str) -> None:
            style = "dim italic" if isinstance(piece, Thought) else None
            self.console.print(piece, end="", style=style, markup=False, highlight=False, soft_wrap=True)

        self.session.generate(text, streamer=show, **SAMPLING)
        self.console.print()
        self._say(self._meter())

    def _meter(self) -> str:
        stats = self.session.stats()
        full, held = stats["full_context_nbytes"], stats["nbytes"]
        if not held:
            return f"[nothing is kept · full context {decimal(full)}]"
        parts = [f"{stats[name]} {name}" for name in ("sink", "slots", "window") if stats[name]]
        return (
            f"[{' + '.join(parts)}: {decimal(held)} · {stats['tokens_folded']} tokens folded · "
            f"{reach_in_words(stats)} · "
            f"full context {decimal(full)}, {full / held:.1f}×]"
        )

    # ------------------------------------------------------------------ commands

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "save": self._save,
            "load": self._load,
            "fork": self._fork,
            "switch": self._switch,
            "memory": self._memory,
            "reset": self._reset,
            "help": self._help,
        }
        if name not in commands:
            raise UnknownNameError("command", f"/{name}", [f"/{known}" for known in (*commands, "quit")])
        commands[name](argument.strip())

    def _save(self, file: str) -> None:
        self.session.save(_wanted(file, "/save FILE"))
        self._say(f"saved to {file}")

    def _load(self, file: str) -> None:
        old = self.session
        self.sessions[self.current] = Session.load(_wanted(file, "/load FILE"), old.method, old.tokenizer)
        self._say(f"loaded {file}, {self.session.turns} turns")

    def _fork(self, name: str) -> None:
        name = name or f"fork-{len(self.sessions)}"
        if name in self.sessions:
            raise ConfigError(f"there is a session {name!r} already: give another name, or /switch {name}")
        self.sessions[name] = self.session.fork()
        self._say(f"copied to {name}; /switch {name} goes there")

    def _switch(self, name: str) -> None:
        if name:
            if name not in self.sessions:
                raise UnknownNameError("session", name, list(self.sessions))
            self.current = name
        for key, session in self.sessions.items():
            self._say(f"{'*' if key == self.current else ' '} {key}, {session.turns} turns")

    def _memory(self, _: str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 1))
        for key, value in self.session.stats().items():
            table.add_row(key.replace("_", " ").replace("nbytes", "bytes"), f"{value:,}")
        self.console.print(table)

    def _reset(self, _: str) -> None:
        self.sessions[self.current] = self.begin()
        self._say("everything is forgotten")

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 1))
        for command, text in HELP.items():
            table.add_row(command.replace("[", "\\["), text)
        self.console.print(table)


def _wanted(argument: str, usage: str) -> str:
    if not argument:
        raise ConfigError(f"a file name is missing: {usage}")
    return argument
