"""A program on a terminal of its own: what is typed there, and what stands on its screen."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence

import pyte


class Terminal:
    """A program on a pseudo-terminal.

    Args:
        command: what is run.
        size: columns and rows.
        environment: beside that of this process.

    Attributes:
        shown: everything that it wrote, in pieces with the seconds since its start.
    """

    def __init__(
        self,
        command: Sequence[str],
        size: tuple[int, int] = (80, 24),
        environment: Mapping[str, str] | None = None,
    ):
        self.screen = pyte.HistoryScreen(*size, history=5000)
        self._stream = pyte.Stream(self.screen)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.shown: list[tuple[float, str]] = []
        self.start = time.monotonic()
        self.status: int | None = None
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "xterm-256color", **(environment or {})})
            os.execvp(command[0], list(command))
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        os.set_blocking(self.file, False)

    @property
    def text(self) -> str:
        """Everything that was written, without what moves the cursor."""
        above = [
            "".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    @property
    def line(self) -> str:
        """The line that the cursor stands on."""
        return str(self.screen.display[self.screen.cursor.y])

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what the program writes meanwhile; False once it has ended."""
        ready, _, _ = select.select([self.file], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self.file, 1 << 16)
        except OSError:
            data = b""
        if not data:
            return False
        text = self._decode(data)
        self.shown.append((time.monotonic() - self.start, text))
        self._stream.feed(text)
        if "\x1b[6n" in text:  # where is the cursor?
            os.write(self.file, f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R".encode())
        return True

    def until(self, found: str | Callable[[str], bool], seconds: float = 300) -> float:
        """Wait for a text on the screen, or above it; returns the seconds since the start."""
        check = found if callable(found) else (lambda text: found in text)
        end = time.monotonic() + seconds
        while not check(self.text):
            assert time.monotonic() < end, f"{found!r} did not come:\n{self.text}"
            assert self.read(), f"{found!r} did not come before the end:\n{self.text}"
        return time.monotonic() - self.start

    def type(self, text: str) -> None:
        """Send keys; what the program does not take in at once follows as it reads."""
        data = text.encode()
        while data:
            try:
                data = data[os.write(self.file, data[:1024]) :]
            except BlockingIOError:
                self.read()

    def paste(self, text: str) -> None:
        """As a terminal sends a paste: marked if the program has asked for that, line ends as Enter."""
        marked = self.marks_pastes
        keys = text.replace("\n", "\r")
        self.type(f"\x1b[200~{keys}\x1b[201~" if marked else keys)

    @property
    def marks_pastes(self) -> bool:
        written = "".join(text for _, text in self.shown)
        return written.rfind("\x1b[?2004h") > written.rfind("\x1b[?2004l")

    def end(self, seconds: float = 60) -> int:
        """Wait for the program to end; its exit code."""
        end = time.monotonic() + seconds
        while self.read() and time.monotonic() < end:
            pass
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        os.close(self.file)
        return self.status

    def kill(self) -> None:
        """End it, if it still runs."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.file)
            self.status = -9
