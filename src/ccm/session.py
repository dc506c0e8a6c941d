"""The online loop: a conversation that goes on and on in a memory that does not grow with it.

    memory = [sink | slots | recent window]

Turns arrive, raw; when the recent window overflows, its oldest segment is folded into slots and let go of. What is
answered is read raw, and folding waits until the answer is there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .chat import closing, ends, header, render
from .compressor import Compressor
from .errors import ConfigError, MemoryFileError
from .memory import Memory

log = logging.getLogger(__name__)

#: The budget for chats: the newest turns raw, the first tokens as attention sink, slots for all the rest.
CHAT = {"sink": 4, "window": 64}
#: Longest segment folded at once, in tokens.
LONGEST = 128


@dataclass(frozen=True)
class Budget:
    """What one conversation may keep.

    Attributes:
        slots: slots per segment (the first k of the adapter's n).
        sink: first raw tokens that stay.
        window: newest raw tokens that stay.
        segment: longest segment folded at once; longer turns are cut into several.
    """

    slots: int
    sink: int
    window: int
    segment: int

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("sink", 0), ("window", 0), ("segment", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"budget {name}: got {getattr(self, name)}, expected at least {least}")

    def sizes(self, answered: bool = False) -> dict[str, int]:
        """For :meth:`ccm.Compressor.compress`. A segment that is answered next stays raw beside the window: what it
        pushes out is folded behind the answer, so that nobody waits for that."""
        room = self.segment if answered else 0
        return {"slots": self.slots, "sink": self.sink, "window": self.window + room}


def segment_for(window: int) -> int:
    """Longest segment by default: a long turn must not push the whole window out at once."""
    return min(LONGEST, max(16, window // 2)) if window else LONGEST


class Session:
    """One conversation with a compressed memory.

    Args:
        compressor: holds the model and the adapter; shared by any number of sessions, on any number of threads.
        tokenizer: of the model.
        slots, sink, window: the budget; by default the adapter's own. :data:`CHAT` is a good one for chats.
        segment: longest segment folded at once; by default half the window, or 128 tokens without one.

    Example:
        >>> session = ccm.Session(compressor, tokenizer)
        >>> session.append("My cat is called Miso.", role="user")
        >>> session.generate("What is my cat called?", max_new_tokens=20)
    """

    def __init__(
        self,
        compressor: Compressor,
        tokenizer: Any,
        *,
        slots: int | None = None,
        sink: int | None = None,
        window: int | None = None,
        segment: int | None = None,
    ):
        config = compressor.config
        window = config.window if window is None else window
        segment = segment_for(window) if segment is None else segment
        self.compressor, self.tokenizer = compressor, tokenizer
        self.budget = Budget(
            config.slots if slots is None else slots,
            config.sink if sink is None else sink,
            window,
            segment,
        )
        if self.budget.slots > config.slots:
            raise ConfigError(f"budget slots: got {self.budget.slots}, the adapter has {config.slots}")
        compressor.know(tokenizer)
        self.memory: Memory = compressor.empty()
        self.turns = 0

    # ------------------------------------------------------------------ the loop

    def append(self, text: str, role: str = "user") -> None:
        """Take in a turn without answering.

        Raises:
            ConfigError: empty text, or a role that the chat template does not know. The session is unchanged.
        """
        self._take_in(render(self.tokenizer, role, text).ids)

    def generate(
        self,
        text: str | None = None,
        *,
        role: str = "user",
        streamer: Callable[[str], None] | Any | None = None,
        **generate_kwargs: Any,
    ) -> str:
        """Append ``text`` if there is any, answer as the assistant, and remember the answer.

        Args:
            text: what is said before the answer.
            role: who says it.
            streamer: a function that is called with each new piece of text, or a transformers streamer.
            generate_kwargs: everything that transformers' ``generate`` takes.

        Returns:
            the answer.

        Raises:
            ConfigError: empty text, or an answer that cannot fit the model's context. The session is unchanged.
        """
        before = self.memory, self.turns
        try:
            if text is not None:
                self._take_in(render(self.tokenizer, role, text).ids, answered=True)
            head = header(self.tokenizer, "assistant")
            options = {"max_new_tokens": 256, **self._stopping(), **generate_kwargs}
            if callable(streamer) and not hasattr(streamer, "put"):
                streamer = _CallbackStreamer(self.tokenizer, streamer)
            out = self.compressor.generate(
                [head], self.memory, streamer=streamer, **{**options, "return_dict_in_generate": False}
            )
            tail = closing(self.tokenizer, "assistant")
            stops = ends(self.tokenizer)
            reply = [token for token in out[0, len(head) :].tolist() if token not in stops]
            if not reply:
                reply = self.tokenizer.encode(" ", add_special_tokens=False)
            self._take_in((*head, *reply, *tail))
        except BaseException:  # also Ctrl-C while streaming: the turn happens as a whole or not at all
            self.memory, self.turns = before
            raise
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip()

    def _take_in(self, ids: tuple[int, ...], answered: bool = False) -> None:
        budget, memory = self.budget, self.memory
        for start in range(0, len(ids), budget.segment):
            last = start + budget.segment >= len(ids)
            part = torch.tensor([ids[start : start + budget.segment]])
            memory = self.compressor.compress(part, memory, **budget.sizes(answered and last))
        if memory.dropped > self.memory.dropped:
            log.warning(
                "the memory is full: %d tokens of the oldest text were dropped, not folded (%d in all); "
                "use rule 'mean', or 'bounded' with overflow='merge', to keep a trace of them",
                memory.dropped - self.memory.dropped,
                memory.dropped,
            )
        self.memory = memory
        self.turns += 1

    def _stopping(self) -> dict[str, Any]:
        return {"eos_token_id": sorted(ends(self.tokenizer)), "pad_token_id": self.tokenizer.pad_token_id}

    # ------------------------------------------------------------------ accounting

    def stats(self) -> dict[str, int]:
        """What is held, what it stands for, and what full context would hold. Bytes are measured."""
        return {"turns": self.turns, **counters(self.memory, self.compressor.kv_bytes_per_token())}

    # ------------------------------------------------------------------ copies and files

    def fork(self) -> Session:
        """An independent copy: what one is told, the other does not know."""
        twin = Session(self.compressor, self.tokenizer, **asdict(self.budget))
        twin.memory, twin.turns = self.memory, self.turns
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self.memory, self.turns = self.compressor.empty(), 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to one safetensors file, atomically.

        Raises:
            StorageError: it cannot be written; an older file is intact.
        """
        state = {"budget": asdict(self.budget), "turns": self.turns}
        self.memory.save(path, {"session": json.dumps(state)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], compressor: Compressor, tokenizer: Any) -> Session:
        """Continue a saved session exactly where it was.

        Raises:
            MemoryFileError: missing, damaged, or a memory without a session.
            MismatchError: made by another model or adapter.
        """
        memory, metadata = Memory.load(path)
        compressor.check(memory, 1)
        try:
            state = json.loads(metadata["session"])
            session = cls(compressor, tokenizer, **state["budget"])
            session.turns = state["turns"]
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryFileError(f"{path} holds a memory but no session ({error})") from error
        device = compressor.model.device
        rows = [
            replace(row, sink=row.sink.to(device), slots=row.slots.to(device), window=row.window.to(device))
            for row in memory.rows
        ]
        session.memory = replace(memory, rows=tuple(rows))
        return session


def counters(memory: Memory, bytes_per_token: int) -> dict[str, int]:
    """What the memory of one conversation holds and stands for, and what full context would hold."""
    row = memory.rows[0]
    seen = row.tokens + row.window.length
    return {
        "sink": row.sink.length,
        "slots": row.slots.length,
        "window": row.window.length,
        "tokens_seen": seen,
        "tokens_folded": row.tokens,
        "tokens_dropped": row.dropped,
        "nbytes": memory.nbytes,
        "full_context_nbytes": seen * bytes_per_token,
    }


class _CallbackStreamer:
    """Feeds a function with new text as soon as it decodes to whole characters."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]):
        self.tokenizer, self.emit = tokenizer, emit
        self.ids: list[int] = []
        self.sent = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # generate() sends the prompt first
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.emit(text[self.sent :])
            self.sent = len(text)

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if len(text) > self.sent:
            self.emit(text[self.sent :])
