"""The messages of a request as segments: what the engine takes in, and what becomes of the answer."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..chat.answers import Answer, read_answer
from ..chat.dialogue import Dialogue, Dialogues, Step
from ..chat.messages import Message
from ..chat.template import tools_as_text
from ..core.memory import Memory
from ..errors import ConfigError
from .engine import Kept, segments_of
from .records import Records, State

Ids = tuple[int, ...]

#: More characters per token than any text has; a longer one is refused before it is tokenized, which takes seconds.
CHARACTERS = 16


class Rendering:
    """Messages behind a memory.

    Args:
        dialogues: of the model's template.
        dialogue: how far it has come in ``memory``.
        memory: of the conversation before them.
        longest: segment, in tokens.
        messages: in order.
        answer: whether an answer is asked for behind the last one.
        tools: that may be called; the dialogue's own stay where there are none.

    Attributes:
        segments: token ids that are taken in.
        lengths: tokens of each message, with what the template adds to it.
        head: token ids that the answer is written behind.

    Raises:
        ConfigError: the template refuses a message.
    """

    def __init__(
        self,
        dialogues: Dialogues,
        dialogue: Dialogue,
        memory: Memory,
        longest: int,
        messages: Sequence[Message],
        answer: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ):
        self.dialogues, self.memory, self.longest = dialogues, memory, longest
        self._ids: list[str] = []  # of calls
        self.head: Ids = ()
        self.lengths: list[int] = []
        self._settled: list[Ids] = []
        self._open: list[Ids] = []
        self._back = not dialogue.open  # what was open before this request cannot be written anew
        messages = list(messages)
        if tools and tuple(tools) != dialogue.tools:
            if dialogue.last and not dialogues.template.moves_tools and messages:
                told = f"{tools_as_text(tools)}\n\n{messages[0].content}"  # the head was folded long ago
                messages[0] = replace(messages[0], content=told)
            dialogue = replace(dialogue, tools=tuple(tools))
        self.dialogue = dialogue
        for index, message in enumerate(messages):
            self._add(message, answer and index == len(messages) - 1)
        if answer and not messages:  # the last message known has no answer yet
            step = dialogues.answer(dialogue)
            self.dialogue, self.head = step.dialogue, step.head
            self._open.append(step.ids)

    @property
    def tools(self) -> bool:
        """Whether the dialogue has tools."""
        return bool(self.dialogue.tools)

    @property
    def segments(self) -> tuple[Ids, ...]:
        """What the memory takes in, cut to the method's length."""
        return self._segments([*self._settled, *self._open])

    @property
    def tokens(self) -> int:
        """That are taken in."""
        return sum(map(len, self.segments))

    def read(self, text: str) -> Answer:
        """An answer that is complete, taken apart; its calls have ids, the same ones every time.

        What looks like a call of a function that was not offered is text.
        """
        template, names = self.dialogues.template, {_name(tool) for tool in self.dialogue.tools}
        answer = read_answer(template, self.head, text, self.tools)
        if any(call.name not in names for call in answer.tool_calls):
            answer = read_answer(template, self.head, text)
        while len(self._ids) < len(answer.tool_calls):
            self._ids.append(_call_id())
        pairs = zip(answer.tool_calls, self._ids, strict=False)
        return replace(answer, tool_calls=tuple(replace(call, id=call.id or new) for call, new in pairs))

    def check_answer(self) -> None:
        """See that an answer can be remembered, before it is written.

        Raises:
            ConfigError: the template has no place for one.
        """
        self.dialogues.check_answer(self.dialogue, self.head)

    def remember(self, message: Message) -> tuple[Kept, Dialogue]:
        """What the answer leaves in the memory, and how far the dialogue has come with it."""
        step = self._step(message)
        new = [step.final or (), step.ids]
        if not step.anew:
            return Kept(self._segments(new)), step.dialogue
        return Kept(self._segments([*self._settled, *new]), self.memory), step.dialogue

    def _step(self, message: Message, answer: bool = False) -> Step:
        return self.dialogues.add(self.dialogue, message, answer, self._back)

    def _add(self, message: Message, answer: bool) -> None:
        before = sum(map(len, [*self._settled, *self._open]))
        step = self._step(message, answer)
        if step.anew:
            self._open = []
        if step.final is not None:
            self._settled += [*self._open, step.final]
            self._open, self._back = [], True
        self._open.append(step.ids)
        self.dialogue, self.head = step.dialogue, step.head
        self.lengths.append(sum(map(len, [*self._settled, *self._open])) - before)

    def _segments(self, pieces: Sequence[Ids]) -> tuple[Ids, ...]:
        return tuple(segment for ids in pieces for segment in segments_of(ids, self.longest))


def render(
    records: Records,
    state: State,
    messages: Sequence[Message],
    answer: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> Rendering:
    """The messages as the model's template writes them behind what the conversation holds.

    Raises:
        ConfigError: the template refuses a message, or they are longer than a request may be.
    """
    limit = records.settings.input_tokens
    characters = sum(len(message.content) for message in messages)
    if characters > CHARACTERS * limit:
        raise ConfigError(
            f"the request brings {characters} characters, the limit is {limit} tokens: send it in parts"
        )
    longest = records.method.longest
    rendering = Rendering(records.dialogues, state.dialogue, state.memory, longest, messages, answer, tools)
    tokens = rendering.tokens + len(rendering.head)
    if tokens > limit:
        raise ConfigError(f"the request brings {tokens} tokens, the limit is {limit}: send it in parts")
    return rendering


def _name(tool: dict[str, Any]) -> str:
    name: str = tool.get("function", tool).get("name", "")
    return name


def _call_id() -> str:
    """An id of a call; templates of Mistral's want nine letters and digits."""
    return "call" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(5))
