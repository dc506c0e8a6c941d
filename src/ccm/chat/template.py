"""The chat template of a model: dialogues as text, and that text as token ids.

What a speaker or a tool says is always encoded literally: control tokens come from the template alone. Those that
were said are broken before the template sees them, and mended, as the letters that they are made of, behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

from ..errors import ConfigError
from .messages import Message, ToolCall

Tools = tuple[dict[str, Any], ...]

#: Put into control tokens that a speaker wrote, so that they are none; taken out again when they are encoded. It is a
#: noncharacter of Unicode: no text has it.
_BREAK = "\ufdd0"
#: Halves of characters, from bytes that are not UTF-8 or from JSON that was cut; no tokenizer takes them.
_HALF = re.compile("[\ud800-\udfff]")
#: Contents of the stand-ins. No template treats such texts in a special way.
QUESTION, ANSWER, MORE = "Stand-in question 1.", "Stand-in answer 2.", "Stand-in text 3."
CALL = ToolCall("stand_in", '{"of": "call"}', "call00000")
#: How models mark their thoughts: begin, end.
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|channel>thought", "<channel|>"),
)
#: Where calls of tools begin in an answer.
CALLS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_THOUGHT_MARKS = frozenset(mark for pair in THOUGHTS for mark in pair)
#: Speakers of a model without a template, and what stands behind their turns.
_SPEAKERS, _TURN_END = ("system", "user", "assistant", "tool"), "\n"


_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": CALL.name,
        "description": "Stand-in.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
    },
}


class Template:
    """The chat template of a tokenizer; without one, lines of the form "role: text".

    Use :func:`template_of`, which keeps one for each tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        source = getattr(tokenizer, "chat_template", None) or ""
        self.source = "\n".join(source.values()) if isinstance(source, dict) else str(source)
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        named = [text for text, special in added.items() if special or text in self.source]
        named += [str(token) for token in tokenizer.all_special_tokens]
        self.controls = sorted({text for text in named if text.strip()}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self.controls)) or "(?!)")

    # ------------------------------------------------------------------ a whole dialogue

    def ids(self, messages: Sequence[Message], tools: Tools = (), generation: bool = False) -> list[int]:
        """Token ids of a whole dialogue.

        Raises:
            ConfigError: the template refuses it; says why.
        """
        return self.encode(self.text(messages, tools, generation))

    def text(self, messages: Sequence[Message], tools: Tools = (), generation: bool = False) -> str:
        """What the template writes, with a break in every control token that was said and not written by it."""
        if not self.source:
            return self._lines(messages, generation)
        try:
            guarded = [self._guarded(message) for message in messages]
            return self._rendered(guarded, self._guard(list(tools)), generation)
        except Exception as error:  # templates are programs and refuse what they like
            roles = ", ".join(
                message.role for message in messages if message.content not in (QUESTION, ANSWER)
            )
            raise ConfigError(
                f"the model's chat template refuses a dialogue of {roles}: {_first_line(error)}"
            ) from error

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], generation: bool) -> str:
        render = self.tokenizer.apply_chat_template
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation}
        try:
            return str(render(messages, tools=tools or None, **options))
        except (
            TypeError
        ):  # some templates go through the tools without asking, or add texts to arguments of calls
            for call in (call for message in messages for call in message.get("tool_calls", ())):
                if not isinstance(call["function"]["arguments"], str):
                    call["function"]["arguments"] = json.dumps(
                        call["function"]["arguments"], ensure_ascii=False
                    )
            return str(render(messages, tools=tools, **options))

    def _lines(self, messages: Sequence[Message], generation: bool) -> str:
        """A base model's dialogue: BOS if its tokenizer sets one, and a line for every turn."""
        start = self.tokenizer.decode(self._bos) if self._bos else ""
        said = (f"{m.role}: {self.broken(m.content)}{_TURN_END}" for m in messages)
        return start + "".join(said) + ("assistant: " if generation else "")

    @cached_property
    def _bos(self) -> list[int]:
        """Token ids that the tokenizer puts before every text."""
        encode = self.tokenizer.encode
        with_bos, without = encode("a"), encode("a", add_special_tokens=False)
        return with_bos[: with_bos.index(without[0])] if without and without[0] in with_bos else []

    # ------------------------------------------------------------------ text and token ids

    def broken(self, text: str, allowed: frozenset[str] = frozenset()) -> str:
        """The text with control tokens broken by one character, but for those that are ``allowed``."""

        def cut(found: re.Match[str]) -> str:
            token = found.group()
            return token if token in allowed else token[0] + _BREAK + token[1:]

        return self._control.sub(cut, _HALF.sub("\ufffd", text))

    def _guarded(self, message: Message) -> dict[str, Any]:
        """The message as the template reads it, its control tokens broken; marks of thoughts are an answer's own."""
        allowed = _THOUGHT_MARKS if message.role == "assistant" else frozenset()
        said = {key: value for key, value in message.as_dict().items() if key != "role"}
        return {"role": message.role, **self._guard(said, allowed)}

    def _guard(self, value: Any, allowed: frozenset[str] = frozenset()) -> Any:
        """The same with every text in it broken."""
        if isinstance(value, str):
            return self.broken(value, allowed)
        if isinstance(value, dict):
            return {self.broken(str(key)): self._guard(item, allowed) for key, item in value.items()}
        return [self._guard(item, allowed) for item in value] if isinstance(value, list) else value

    def encode(self, text: str) -> list[int]:
        """Token ids of what a template wrote; broken control tokens become the letters that they are made of."""
        # without a word on long texts, which are folded in segments
        encode: Callable[..., list[int]] = partial(self.tokenizer.encode, verbose=False)
        if _BREAK not in text:
            return list(encode(text, add_special_tokens=False))
        ids: list[int] = []
        written = ""
        at = 0
        for found in [*self._control.finditer(text), None]:
            said = text[at : found.start() if found else len(text)]
            if _BREAK in said:
                ids += encode(written, add_special_tokens=False) if written else []
                ids, written = ids + self._literal(said.replace(_BREAK, "")), ""
            else:
                written += said
            if found:
                written, at = written + found.group(), found.end()
        return ids + (list(encode(written, add_special_tokens=False)) if written else [])

    def _literal(self, text: str) -> list[int]:
        """Token ids of a text without any control token, as they are in the middle of a dialogue."""
        if self._plain is None:  # a tokenizer in Python: letter by letter where a control token would be
            parts = self._control.sub(lambda found: found.group()[0] + _BREAK + found.group()[1:], text)
            return [
                t
                for part in parts.split(_BREAK)
                for t in self.tokenizer.encode(part, add_special_tokens=False)
            ]
        before = self._plain.encode("\n", add_special_tokens=False).ids
        both = self._plain.encode("\n" + text, add_special_tokens=False).ids
        if both[: len(before)] == before:
            return list(both[len(before) :])
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> Any | None:
        """A copy of the tokenizer that knows no control tokens; None for tokenizers written in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        state = json.loads(backend.to_str())
        added = [token for token in state["added_tokens"] if token["content"] not in self.controls]
        plain = type(backend).from_str(json.dumps({**state, "added_tokens": added}))
        plain.encode_special_tokens = True
        return plain

    def part(self, text: str, start: int, stop: int | None = None) -> list[int]:
        """Token ids of ``text[start:stop]`` as they are in the whole text."""
        whole, before = self.encode(text[:stop]), self.encode(text[:start]) if start else []
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.encode(text[start:stop])

    def common(self, a: str, b: str) -> int:
        """Characters that both begin with; a control token is one."""
        at = 0
        while at < min(len(a), len(b)):
            one, other = self._control.match(a, at), self._control.match(b, at)
            x, y = one.group() if one else a[at], other.group() if other else b[at]
            if x != y:
                break
            at += len(x)
        return at

    # ------------------------------------------------------------------ what it knows

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes what tools there are."""
        try:
            return CALL.name in self.text([Message("user", QUESTION)], (_TOOL,))
        except ConfigError:
            return False

    @cached_property
    def moves_tools(self) -> bool:
        """Whether it writes the tools beside the newest messages, and not at the head."""
        asked, said = Message("user", QUESTION), Message("assistant", ANSWER)
        try:
            text = self.text([asked, said, Message("user", MORE)], (_TOOL,))
        except ConfigError:
            return False
        return CALL.name in text[text.index(ANSWER) :] if ANSWER in text else False

    @cached_property
    def _exchange(self) -> str:
        """An exchange with a call and its result; nothing if it is refused."""
        result = Message("tool", MORE, tool_call_id=CALL.id, name=CALL.name)
        try:
            return self.text([*self._calling(CALL), result, Message("assistant", ANSWER)])
        except ConfigError:
            return ""

    def _calling(self, *calls: ToolCall) -> list[Message]:
        return [Message("user", QUESTION), Message("assistant", "", tool_calls=calls)]

    @cached_property
    def _knows_several(self) -> bool:
        """Whether it writes two calls at once."""
        try:
            return self.text(self._calling(CALL, replace(CALL, id="call00001"))).count(CALL.name) > 1
        except ConfigError:
            return False

    @property
    def knows_calls(self) -> bool:
        """Whether it writes the calls of an assistant."""
        return CALL.name in self._exchange

    @property
    def knows_results(self) -> bool:
        """Whether it writes what tools answer."""
        return MORE in self._exchange

    def fitted(self, message: Message) -> Message:
        """The message in a form that the template has, else as a text that says what it is."""
        if message.role == "developer" and "developer" not in self.source:
            message = replace(message, role="system")
        if message.role == "tool" and not self.knows_results:
            whose = f" {message.name}" if message.name else ""
            return Message("user", f"Result of the tool{whose}:\n{message.content}")
        fits = self.knows_calls and (len(message.tool_calls) < 2 or self._knows_several)
        if message.tool_calls and not fits:
            calls = [as_text(call) for call in message.tool_calls]
            return replace(message, content="\n".join([message.content, *calls]).strip(), tool_calls=())
        return message

    # ------------------------------------------------------------------ where answers end

    @cached_property
    def ends(self) -> tuple[frozenset[int], tuple[str, ...]]:
        """Token ids, and texts, that end an answer in this template."""
        ending = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        tokens = {token for token in ending if token is not None}
        texts = set()
        if not self.source:
            return frozenset(tokens), tuple(f"\n{role}:" for role in _SPEAKERS)
        special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        for behind in self._behind_answers():
            found = next((f.group() for f in self._control.finditer(behind) if f.group() in special), "")
            if found:
                tokens.update(self.encode(found))
            elif line := behind.strip():
                texts.add(line.partition("\n")[0].strip())
        return frozenset(tokens - self._shown), tuple(sorted(texts))

    def _behind_answers(self) -> list[str]:
        """What the template writes behind an answer: at the end, before another message, behind a call."""
        asked, said = Message("user", QUESTION), Message("assistant", ANSWER)
        called = replace(said, tool_calls=(CALL,))
        result = Message("tool", MORE, tool_call_id=CALL.id, name=CALL.name)
        found = []
        for dialogue in ([asked, said], [asked, said, Message("user", MORE)], [asked, called, result]):
            for tools in ((), (_TOOL,)):
                try:
                    text = self.text(dialogue, tools)
                except ConfigError:
                    continue
                last = '"call"' if dialogue[1] is called else ANSWER
                if last in text:
                    behind = text[text.rindex(last) + len(last) :]
                    found.append(behind.partition(MORE)[0])
        return found

    @cached_property
    def thoughts(self) -> tuple[str, str] | None:
        """The marks around thoughts, if the template has some."""
        return next((pair for pair in THOUGHTS if all(mark in self.source for mark in pair)), None)

    @cached_property
    def _shown(self) -> frozenset[int]:
        """Control tokens that an answer's text keeps: marks of thoughts and calls."""
        marks = [*(self.thoughts or ()), *(mark for mark in CALLS if mark in self.source)]
        tokens = [token for mark in marks for token in self._control.findall(mark)]
        return frozenset(token for text in tokens for token in self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens but marks of thoughts and calls."""
        parts, start = [], 0
        for at, token in enumerate(ids):
            if token in self._shown:
                parts += [self.tokenizer.decode(list(ids[start:at]), skip_special_tokens=True)]
                parts += [self.tokenizer.decode([token])]
                start = at + 1
        rest = self.tokenizer.decode(list(ids[start:]), skip_special_tokens=True)
        return "".join([*parts, rest]) if parts else rest


def template_of(tokenizer: Any) -> Template:
    """The template of a tokenizer; made once, and anew when its chat template is changed."""
    source = getattr(tokenizer, "chat_template", None)
    return _template(tokenizer, source if isinstance(source, str) else json.dumps(source))


@lru_cache(maxsize=32)
def _template(tokenizer: Any, source: str) -> Template:
    return Template(tokenizer)


def answer_ends(tokenizer: Any, model: Any = None) -> tuple[frozenset[int], tuple[str, ...]]:
    """Token ids, and texts, that end an answer: of the template, and those of the model's generation settings."""
    tokens, texts = template_of(tokenizer).ends
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tokens | set(eos if isinstance(eos, list) else [] if eos is None else [eos]), texts


def tools_as_text(tools: Sequence[dict[str, Any]]) -> str:
    """What tools there are, for templates that have no form for them."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    form = '<tool_call>{"name": …, "arguments": {…}}</tool_call>'
    return f"Tools that can be called, one a line:\n{listed}\nTo call one, answer with {form} alone."


def as_text(call: ToolCall) -> str:
    """A call, for templates that have no form for it."""
    return f'<tool_call>{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}</tool_call>'


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
