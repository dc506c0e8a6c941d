"""``ccm chat``: an interactive conversation that shows its memory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.status import Status
from rich.table import Table

from ..errors import CCMError, ConfigError, UnknownNameError
from ..files.kind import digest_of
from . import screen
from .flow import Flow
from .prompt import Editor, Lines

if TYPE_CHECKING:
    from ..chat.messages import Message
    from ..comparison import Comparison
    from ..methods import Method
    from ..session import Session

#: Longest answer, in tokens: small models go on and on.
MAX_TOKENS = 128
#: Exchanges that can be taken back.
UNDO = 4
#: Tokens from which on a message is read with progress.
LONG = 512

HELP = {
    "/retry": "answer the last message anew",
    "/undo": f"take the last exchange back, up to {UNDO} times",
    "/compare [QUESTION]": "answer from the memory, full context and nothing, side by side",
    "/memory": "what the memory holds, and which turns it stands for",
    "/history [N]": "the last turns",
    "/set [NAME VALUE]": "temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed",
    "/pin [TEXT]": "keep a text in front of everything, word for word and for good",
    "/system [TEXT]": "say how the model is to answer, from here on",
    "/save FILE": "write the session to a file",
    "/load FILE": "go on from a file",
    "/fork [NAME]": "copy the session; what one is told, the other does not know",
    "/switch [NAME]": "go to another session, or list them",
    "/reset": "forget everything",
    "/help": "this list",
    "/exit": "leave (also /quit and Ctrl-D)",
}
COMMANDS = [usage.split()[0] for usage in HELP] + ["/quit"]
_WHOLE = ("top_k", "max_tokens", "seed")


@dataclass
class Opened:
    """What there is once the model is loaded.

    Attributes:
        method: bound to the model.
        begin: makes a fresh session.
        session: that the conversation begins with.
        files: as of :class:`Talk`.
    """

    method: Method
    begin: Callable[[], Session]
    session: Session
    files: dict[Path, str]


@dataclass
class Talk:
    """One conversation.

    Attributes:
        session: as it is now.
        said: its messages, whole; None where nobody knows them, in one from a file.
        before: sessions from before the newest exchanges.
        files: digests of the files that it was read from or written to, as it knows them.
    """

    session: Session
    said: list[Message] | None = field(default_factory=list)
    before: list[tuple[Session, list[Message] | None]] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)
    comparison: Comparison | None = None


class Stop:
    """Ctrl-C ends an answer that has begun, and what is written stays. Before that it takes the message back."""

    def __init__(self) -> None:
        self.begun = self.pressed = False

    def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        """For transformers' ``generate``: whether the answer ends here."""
        return ids.new_full((len(ids),), int(self.pressed)).bool()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While an answer is written."""
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, number: int, frame: Any) -> None:
        if self.pressed or not self.begun:
            raise KeyboardInterrupt
        self.pressed = True


class Repl:
    """Reads messages, answers, and shows the memory after each answer.

    Args:
        opening: the conversation, as soon as the model is loaded.
        console: where everything is shown.
        chosen: how answers are written, where it is not as the model's own settings say.
        compare: whether every answer stands beside those from full context and from nothing.
        typed: whether somebody types, on a terminal that can move its cursor.
    """

    def __init__(
        self,
        opening: Future[Opened],
        console: Console,
        chosen: Mapping[str, float | None] | None = None,
        compare: bool = False,
        typed: bool = False,
    ):
        self.opening, self.console, self.compare = opening, console, compare
        self.chosen: dict[str, float | None] = {"max_tokens": MAX_TOKENS, **(chosen or {})}
        self.input: Lines | Editor = Editor(COMMANDS, self._toolbar) if typed else Lines()
        self.talks: dict[str, Talk] = {}
        self.current = "main"
        self._line = ""
        if isinstance(self.input, Editor):
            opening.add_done_callback(self._opened)

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Until /exit or the end of input. An error is one line, and the conversation goes on.

        Raises:
            CCMError: the model or the memory cannot be opened.
        """
        if isinstance(self.input, Lines) or self.opening.done():
            self._open()
        with self.input.open():
            while True:
                try:  # around the loop: Ctrl-C may come between two messages as well
                    while self._next():
                        pass
                    return
                except KeyboardInterrupt:
                    self._say("Ctrl-D leaves")

    def _next(self) -> bool:
        """One message or command; False at the end."""
        try:
            text = self.input.ask(self.current).strip()
        except EOFError:
            return False
        self._open()
        if text in ("/exit", "/quit"):
            return False
        try:
            if text.startswith("/") and "\n" not in text:
                self._command(text)
            elif text:
                self._answer(text)
        except KeyboardInterrupt:
            self._say("\nstopped: this turn is forgotten; /exit leaves")
        except CCMError as error:
            self._say(f"error: {' '.join(str(error).split())}", style="red")
        return True

    def _open(self) -> None:
        """Wait for the model."""
        if self.talks:
            return
        if not self.opening.done():
            with self._spinner("loading the model"):
                self.opening.exception()
        opened = self.opening.result()
        said: list[Message] | None = None if opened.session.turns else []
        self.talks["main"] = Talk(opened.session, said, files=opened.files)
        if opened.session.dialogue.opening and opened.session.turns == 1:  # --system
            self.talks["main"].said = list(opened.session.dialogue.opening)
        elif opened.session.turns:
            self._last_turns()
        self._seed()

    def _opened(self, opening: Future[Opened]) -> None:
        """On the thread that loads, while somebody may be typing."""
        if error := opening.exception():
            self.input.fail(error)  # type: ignore[union-attr]

    @property
    def talk(self) -> Talk:
        """The conversation that goes on."""
        return self.talks[self.current]

    @property
    def session(self) -> Session:
        """The session that is talked to."""
        return self.talk.session

    def _say(self, text: str, style: str = "dim") -> None:
        wide = not self.console.is_terminal
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=wide)

    def _spinner(self, text: str) -> Status:
        return self.console.status(f"[dim]{text}[/dim]", spinner="dots")

    def _toolbar(self) -> str:
        if not self.opening.done():
            return "loading the model; you can type already"
        if self.opening.exception():
            return ""
        opened = self.opening.result()
        session = self.talk.session if self.talks else opened.session
        stats = session.stats()
        cells = "".join(text for _, text in screen.bar(stats, screen.limit(session), 24))
        most = screen.most(session)
        return f"{cells} {decimal(stats['nbytes'])}{f' of at most {most}' if most else ''} · {opened.method.title}"

    # ------------------------------------------------------------------ answers

    def _answer(self, text: str | None) -> None:
        """Answer a message; None is the last one, which is there already."""
        from ..chat.messages import Message

        talk, stop = self.talk, Stop()
        before = talk.session.fork(), None if talk.said is None else list(talk.said)
        if self.compare and text is not None:
            self._side_by_side(text)
        answer = self._generate(text, stop)
        talk.before = [*talk.before, before][-UNDO:]
        if talk.said is not None:
            talk.said += [Message("user", text or ""), Message("assistant", answer)]
        self._say(self._meter())

    def _generate(self, text: str | None, stop: Stop) -> str:
        """The answer, as it is written."""
        from ..chat.messages import Thought

        flow, status = Flow(self.console), self._spinner("reading")

        def read(done: int, count: int) -> None:
            if count >= LONG:
                status.update(f"[dim]reading {count:,} tokens, {done / count:.0%}[/dim]")
            if done == count:
                status.update("[dim]thinking[/dim]")

        def show(piece: str) -> None:
            if not stop.begun:
                status.stop()
                stop.begun = True
            flow.add(piece, "dim italic" if isinstance(piece, Thought) else "")

        with stop.heard():
            try:
                with status:
                    answer = self.session.generate(
                        text, streamer=show, on_read=read, stopping_criteria=[stop], **self._kwargs()
                    )
            finally:
                flow.end()
        last = self.session.last
        if stop.pressed:
            self._say("… stopped; what is written stays (/undo takes it back)", style="yellow")
        elif last is not None and last.cut:
            limit = self.chosen["max_tokens"]
            self._say(f"… cut at {limit:g} tokens (/set max_tokens {2 * (limit or 0):g})", style="yellow")
        return answer

    def _kwargs(self) -> dict[str, Any]:
        """Of ``Session.generate``."""
        drawn = {name: value for name, value in self.chosen.items() if name not in ("max_tokens", "seed")}
        return {**drawn, "max_new_tokens": int(self.chosen["max_tokens"] or MAX_TOKENS)}

    def _side_by_side(self, question: str) -> None:
        from ..comparison import WAYS, Comparison

        talk = self.talk
        if talk.said is None:
            raise ConfigError(
                "a saved session keeps the beginning of each turn only, so there is no full context to compare with: "
                "compare in a session that began here"
            )
        if talk.comparison is None:
            talk.comparison = Comparison(talk.session)
        talk.comparison.session = talk.session
        with self._spinner("answering three ways"):
            seed = self.chosen.get("seed")
            answers = talk.comparison.ask(
                question, talk.said, seed=None if seed is None else int(seed), **self._kwargs()
            )
        self.console.print(screen.side_by_side(answers, WAYS))

    def _meter(self) -> str:
        from ..methods.accounting import entries_in_words, reach_in_words

        stats = self.session.stats()
        full, held = stats["full_context_nbytes"], stats["nbytes"]
        if not held:
            return f"[nothing is kept · full context {decimal(full)}]"
        return (
            f"[{entries_in_words(stats)}: {decimal(held)} · {stats['tokens_folded']} tokens folded · "
            f"{reach_in_words(stats)} · "
            f"full context {decimal(full)}, {full / held:.1f}×]"
        )

    # ------------------------------------------------------------------ commands

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if f"/{name}" not in COMMANDS:
            raise UnknownNameError("command", f"/{name}", COMMANDS)
        getattr(self, f"_{name}")(argument.strip())

    def _retry(self, _: str) -> None:
        session, said = self._taken_back()
        question = self.talk.said[len(said or [])].content if self.talk.said is not None else None
        if question is None:
            raise ConfigError("the last message is not known any more: say it again")
        self.talk.session, self.talk.said = session, said
        self.talk.before.pop()
        self._answer(question)

    def _undo(self, _: str) -> None:
        self.talk.session, self.talk.said = self._taken_back()
        self.talk.before.pop()
        self._say(f"taken back: {self.session.turns} turns are left")

    def _taken_back(self) -> tuple[Session, list[Message] | None]:
        if not self.talk.before:
            raise ConfigError(f"there is nothing to take back: the last {UNDO} exchanges of this run can be")
        session, said = self.talk.before[-1]
        session = session.fork()
        session.pin_as(self.session)  # what is pinned since then stays
        return session, said

    def _compare(self, question: str) -> None:
        if not question:
            users = [message.content for message in self.talk.said or () if message.role == "user"]
            if self.talk.said is not None and not users:
                raise ConfigError("nothing was asked yet: /compare QUESTION")
            question = users[-1] if users else ""
        self._side_by_side(question)

    def _set(self, argument: str) -> None:
        from ..models.generation import own_drawing

        own = asdict(own_drawing(self.session.method.reader.model)) | {"max_tokens": MAX_TOKENS, "seed": None}
        if argument:
            name, _, value = argument.replace("=", " ").partition(" ")
            if name not in own:
                raise UnknownNameError("setting", name, list(own))
            self.chosen[name] = _number(name, value.strip())
            if name == "seed":
                self._seed()
        self.console.print(screen.settings(self.chosen, own))

    def _seed(self) -> None:
        if (seed := self.chosen.get("seed")) is not None:
            import torch

            torch.manual_seed(int(seed))

    def _pin(self, text: str) -> None:
        if text:
            self.session.pin(text)
        self._say("\n".join(self.session.pins) or "nothing is pinned; /pin TEXT pins a text")

    def _system(self, text: str) -> None:
        from ..chat.messages import Message

        if text:
            message = Message("system", text)
            self.session.append(message)
            if self.talk.said is not None:
                self.talk.said.append(message)
        told = [turn.text for turn in self.session.said if turn.role == "system"]
        self._say("\n".join(str(line) for line in told) or "no system text; /system TEXT gives one")

    def _history(self, count: str) -> None:
        self._last_turns(int(_number("history", count)) if count else 10)

    def _last_turns(self, count: int = 4) -> None:
        known = self.session.said
        shown = known[max(0, len(known) - count) :]
        self.console.print(screen.turns(shown, self.session.turns - len(shown)))

    def _memory(self, _: str) -> None:
        from .memory import inside_table

        session = self.session
        stats, inside = session.stats(), session.inside()
        self._say(screen.budget(session))
        self.console.print(
            screen.memory_bar(stats, screen.limit(session), min(60, self.console.width)), highlight=False
        )
        if inside.parts:
            self.console.print(inside_table(inside))
        self._say(self._meter())

    def _save(self, file: str) -> None:
        path = Path(_wanted(file, "/save FILE"))
        if digest_of(path) not in ("", self.talk.files.get(path.resolve())):
            raise ConfigError(
                f"{file} holds turns that this session does not know, so it is left as it is: give another name, "
                f"delete it, or go on from it with /load {file}"
            )
        self.session.save(path)
        self.talk.files[path.resolve()] = digest_of(path)
        self._say(f"saved to {file}")

    def _load(self, file: str) -> None:
        from ..session import Session

        old, path = self.session, Path(_wanted(file, "/load FILE"))
        digest = digest_of(path)
        loaded = Session.load(path, old.method, old.tokenizer)
        self.talks[self.current] = Talk(loaded, None, files={path.resolve(): digest})
        self._last_turns()
        self._say(f"loaded {file}, {self.session.turns} turns")

    def _fork(self, name: str) -> None:
        name = name or f"fork-{len(self.talks)}"
        if name in self.talks:
            raise ConfigError(f"there is a session {name!r} already: give another name, or /switch {name}")
        said = None if self.talk.said is None else list(self.talk.said)
        self.talks[name] = Talk(self.session.fork(), said, list(self.talk.before), dict(self.talk.files))
        self._say(f"copied to {name}; /switch {name} goes there")

    def _switch(self, name: str) -> None:
        if name:
            if name not in self.talks:
                raise UnknownNameError("session", name, list(self.talks))
            self.current = name
        for key, talk in self.talks.items():
            self._say(f"{'*' if key == self.current else ' '} {key}, {talk.session.turns} turns")

    def _reset(self, _: str) -> None:
        session = self.opening.result().begin()
        self.talks[self.current] = Talk(session, list(session.dialogue.opening))
        self._say("everything is forgotten")

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 1))
        for command, text in HELP.items():
            table.add_row(command.replace("[", "\\["), text)
        self.console.print(table)
        self._say("Enter sends, Alt-Enter begins a new line, a paste is one message.")


def _wanted(argument: str, usage: str) -> str:
    if not argument:
        raise ConfigError(f"a file name is missing: {usage}")
    return argument


def _number(name: str, text: str) -> float:
    """A setting as it was typed.

    Raises:
        ConfigError: no number, or one that is too small.
    """
    try:
        value: float = int(text) if name in (*_WHOLE, "history") else float(text)
    except ValueError as error:
        raise ConfigError(f"{name}: got {text!r}, expected a number, as in /set temperature 0.7") from error
    if value < (1 if name in ("max_tokens", "history") else 0):
        raise ConfigError(f"{name}: got {text}, expected a larger number")
    return value
