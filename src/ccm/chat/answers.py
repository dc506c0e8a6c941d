"""What a model wrote, taken apart: its thoughts, what it says, and the calls of tools that it asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .messages import Message, Thought, ToolCall
from .template import CALLS, Template

_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """An answer, whole.

    Attributes:
        content: what it says, without the blanks around it.
        reasoning: its thoughts.
        tool_calls: that it asks for.
        cut: whether it breaks off: the limit of new tokens, or a stop of the caller, has ended it.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    cut: bool = False

    def message(self) -> Message:
        """As the message of an assistant."""
        return Message("assistant", self.content, self.reasoning, self.tool_calls)


class AnswerReader:
    """Takes an answer apart as it comes in.

    Args:
        template: of the model.
        head: token ids that the answer is written behind; they may have opened its thoughts.
        tools: whether calls are looked for.
    """

    def __init__(self, template: Template, head: tuple[int, ...] = (), tools: bool = False):
        self.marks = template.thoughts
        written = template.tokenizer.decode(list(head))
        begin, end = self.marks or ("", "")
        self._thinking = self.marks is not None and written.rfind(begin) > written.rfind(end)
        self._tools = tools
        self._text = ""
        self._thoughts: list[str] = []
        self._said: list[str] = []
        self._shown = 0  # characters of what is said that were given out, where calls are looked for

    def feed(self, piece: str) -> Iterator[str]:
        """What the next piece of text brings: thoughts as :class:`Thought`, and what is said."""
        self._text += piece
        yield from self._advance(final=False)

    def end(self) -> Iterator[str]:
        """What was held back; of calls that are none, all of it."""
        yield from self._advance(final=True)
        said = "".join(self._said)
        if self._tools and not _calls(said)[1] and said[self._shown :]:
            yield said[self._shown :]
            self._shown = len(said)

    @property
    def answer(self) -> Answer:
        """All of it, after :meth:`end`."""
        said, thoughts = "".join(self._said), "".join(self._thoughts).strip()
        if self._tools:
            said, calls = _calls(said)
            return Answer(said.strip(), thoughts, calls)
        return Answer(said.strip(), thoughts)

    def _advance(self, final: bool) -> Iterator[str]:
        while True:
            mark = self.marks[self._thinking] if self.marks else None
            at = self._text.find(mark) if mark else -1
            if at < 0:
                keep = 0 if final or not mark else _begun(self._text, mark)
                yield from self._give(self._text[: len(self._text) - keep])
                self._text = self._text[len(self._text) - keep :]
                return
            yield from self._give(self._text[:at])
            self._text = self._text[at + len(str(mark)) :]
            self._thinking = not self._thinking

    def _give(self, text: str) -> Iterator[str]:
        if self._thinking:
            if not self._thoughts:
                text = text.lstrip()
            if text:
                self._thoughts.append(text)
                yield Thought(text)
            return
        if not self._said:
            text = text.lstrip()
        if not text:
            return
        self._said.append(text)
        if not self._tools:
            yield text
            return
        # with tools, text is held back from where a call may begin
        whole = "".join(self._said)
        if shown := whole[self._shown : _call_at(whole)]:
            yield shown
            self._shown += len(shown)


def read_answer(template: Template, head: tuple[int, ...], text: str, tools: bool = False) -> Answer:
    """An answer that is complete, taken apart."""
    reader = AnswerReader(template, head, tools)
    for _ in reader.feed(text):
        pass
    for _ in reader.end():
        pass
    return reader.answer


def _begun(text: str, mark: str) -> int:
    """How many characters at the end may be the begin of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _call_at(text: str) -> int:
    """Where the first call begins, or may begin; the length of the text if none does."""
    if text.startswith("{"):
        return 0
    found = [at for mark in CALLS if (at := text.find(mark)) >= 0]
    return min(found) if found else len(text) - max(_begun(text, mark) for mark in CALLS)


def _calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """What is said before the calls, and the calls; a text without any, or with damaged ones, stays as it is."""
    at = _call_at(text)
    said, asked = text[:at], text[at:].strip()
    try:
        if asked.startswith("<tool_call>"):
            parts = [part.partition("</tool_call>")[0] for part in asked.split("<tool_call>")[1:]]
            calls = [_call(part.strip()) for part in parts]
        elif asked.startswith("[TOOL_CALLS]"):
            calls = [call for part in asked.split("[TOOL_CALLS]")[1:] for call in _bracketed(part.strip())]
        elif asked.startswith(("<|python_tag|>", "{")):
            calls = [_of(json.loads(part)) for part in asked.removeprefix("<|python_tag|>").split(";\n")]
        else:
            return text, ()
    except (ValueError, KeyError, TypeError, AttributeError):
        return text, ()
    return said, tuple(calls)


def _call(text: str) -> ToolCall:
    """One call: JSON, or a name with marked arguments."""
    if text.startswith("{"):
        return _of(json.loads(text))
    if text.startswith("<function="):
        name, _, rest = text.removeprefix("<function=").partition(">")
        return ToolCall(name.strip(), _arguments(_PARAMETER.findall(rest)))
    name = text.partition("<arg_key>")[0].strip()
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} is no name of a function")
    return ToolCall(name, _arguments(_ARGUMENT.findall(text)))


def _bracketed(text: str) -> list[ToolCall]:
    """What stands behind [TOOL_CALLS]: a list of calls, or a name, [ARGS] and an object."""
    if text.startswith("["):
        return [_of(call) for call in json.loads(text)]
    name, _, arguments = text.partition("[ARGS]")
    return [ToolCall(name.partition("[CALL_ID]")[0].strip(), _json(json.loads(arguments)))]


def _of(call: dict[str, Any]) -> ToolCall:
    arguments = call["arguments"] if "arguments" in call else call["parameters"]
    if not isinstance(call["name"], str):
        raise ValueError("the name of a call is no text")
    text = arguments if isinstance(arguments, str) else _json(arguments)
    return ToolCall(call["name"], text, str(call.get("id") or ""))


def _arguments(pairs: list[tuple[str, str]]) -> str:
    """Marked arguments as an object; what is JSON is read as such."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return _json({key.strip(): value(text) for key, text in pairs})


def _json(value: Any) -> str:
    """As text that can be sent: halves of characters, which JSON may spell, are none."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
