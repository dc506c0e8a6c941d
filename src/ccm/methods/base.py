"""What every context memory has in common, and the registry.

A *method* says how a conversation is kept. It is a small dataclass of options, bound to a model, without a state::

    method = get_method("snapkv", tokens=64).bind(model, tokenizer)
    memory = method.empty()
    memory = method.fold(memory, [segment])       # write: Mem(t) from Mem(t-1) and a segment
    method.recall(memory)                         # read: what a prompt attends to

The memory of one conversation is a row [sink | slots | window]. New text is read behind it and joins the window raw.
What no longer fits the window leaves it, and :meth:`Method.keep` says what it becomes. Sink, window, counters,
batches and files are the same for all.

To add a method, write one file with a dataclass under :func:`register` that has :meth:`Method.keep`. In this folder
it has a name everywhere, also in the tests; from elsewhere ``--memory ./mine.py`` takes it (docs/extending.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.memory import KV, Memory, Row
from ..core.onward import Turn
from ..core.reader import Ids, Reader
from ..core.segments import left_padded
from ..core.window import joined, without
from ..errors import ConfigError, MemoryFileError, UnsupportedModelError
from ..files.fingerprint import mismatch, model_fingerprint
from .parts import RAW, Part, behind, pinned

#: Longest segment folded at once, in tokens.
LONGEST = 128

METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound="type[Method]")
_Self = TypeVar("_Self", bound="Method")


@dataclass(frozen=True)
class Segment:
    """One segment of each of B conversations, as :meth:`Method.folded` gets it.

    Attributes:
        ids, mask: (B, T) token ids, and false on padding at either side.
        window: raw tokens that may stay; more than the method's own when the segment is answered next.
        read: what is known of it, as of :meth:`Method.fold`.
    """

    ids: Tensor
    mask: Tensor
    window: int
    read: Sequence[KV | None] = ()

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of every row, without padding."""
        return texts(self.ids, self.mask)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to keep conversations. Options are the fields of the subclass.

    Attributes:
        sink: first raw tokens that stay for ever.
        window: newest raw tokens that stay.
        segment: longest segment folded at once; None is half the window, or 128 tokens without one.
        reader: the model, once the method is bound.
        tokenizer: of the model, for methods that look at text.
    """

    name: ClassVar[str] = ""
    #: Newest queries of the text read last that :meth:`keep` wants; -1: of all of it.
    queries: ClassVar[int] = 0
    #: Whether whole segments leave the window; else just the tokens that no longer fit.
    whole: ClassVar[bool] = False
    #: Whether engines can serve it that know nothing but keys and values in front of a prompt.
    plain: ClassVar[bool] = True
    #: The option that is the most entries between sink and window; "" if they grow with the text.
    most: ClassVar[str] = ""
    #: What it needs beside keys, values and queries: "adapter", "gradient", "words", "writing"
    #: (:data:`ccm.methods.catalogue.ASKS`). With "words" the ids of new text join the row's notes.
    asks: ClassVar[tuple[str, ...]] = ()
    #: A package that it needs and that comes with no extra.
    package: ClassVar[str] = ""
    #: What slots are of the text between sink and window (:attr:`ccm.methods.parts.Part.how`).
    made: ClassVar[str] = "kept"

    sink: int = 0
    window: int = 0
    segment: int | None = None
    reader: Reader = field(init=False, repr=False, compare=False)
    tokenizer: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._at_least(sink=0, window=0, segment=1)

    def _at_least(self, **least: int) -> None:
        """Raises ConfigError for an option that is too small or no whole number; None is the default."""
        for option, smallest in least.items():
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < smallest):
                raise ConfigError(
                    f"method {self.name}: {option} is {value!r}, expected a whole number of at least {smallest}"
                )

    # ------------------------------------------------------------------ on a model

    def bind(self: _Self, model: PreTrainedModel | Reader, tokenizer: Any = None) -> _Self:
        """The method on a model, for any number of conversations and threads.

        Args:
            model: of a supported family, or a reader that has it already.
            tokenizer: of the model, for methods that look at text.

        Raises:
            UnsupportedModelError: the model's family cannot carry a memory.
            ConfigError: an option that does not fit the model.
        """
        return self._on(model if isinstance(model, Reader) else Reader(model), tokenizer)

    def _on(self: _Self, reader: Reader, tokenizer: Any) -> _Self:
        if self.queries and reader.two_sided:
            raise UnsupportedModelError(
                f"method {self.name} goes by what tokens ask of what was read, and the decoder of an encoder-decoder "
                "has asked nothing yet: expected one that does not, such as streaming-llm or keydiff, or an adapter"
            )
        bound = copy.copy(self)
        object.__setattr__(bound, "reader", reader)
        object.__setattr__(bound, "tokenizer", tokenizer)
        return bound

    def resized(self: _Self, **options: Any) -> _Self:
        """The same method, on the same model, with some options changed."""
        return replace(self, **options).bind(self.reader, self.tokenizer)

    def open(self, model: PreTrainedModel, tokenizer: Any = None) -> Run:
        """Begin one conversation; raises as :meth:`bind`."""
        return Run(self.bind(model, tokenizer))

    @property
    def longest(self) -> int:
        """Tokens of the longest segment folded at once: a long turn must not push the whole window out."""
        if self.segment is not None:
            return self.segment
        return min(LONGEST, max(16, self.window // 2)) if self.window else LONGEST

    @property
    def behind(self) -> int:
        """Positions that a fold takes behind its text."""
        return 0

    def fingerprint(self) -> str:
        """What a memory carries so that no other model, adapter or method reads it."""
        return f"{model_fingerprint(self.reader.model)}-{self.name}"

    def check(self, memory: Memory, batch: int | None = None) -> None:
        """Raises MismatchError unless this model and method made the memory, ConfigError on a wrong batch size."""
        if memory.fingerprint != self.fingerprint():
            raise mismatch(memory.fingerprint, self.fingerprint())
        self.reader.check(memory, batch)

    def admit(self, memory: Memory) -> Memory:
        """The memory of one conversation from a file or a store, as this method has it.

        Raises:
            MismatchError: another model or method made it.
            MemoryFileError: it says that this one did, and is not of its shape.
        """
        self.check(memory, 1)
        (row,) = memory.rows
        expected = self.reader.kv_shape()
        for name in ("sink", "slots", "window"):
            layers, heads, _, size = getattr(row, name).keys.shape
            if (layers, heads, size) != expected:
                raise MemoryFileError(f"the memory's {name} is {(layers, heads, size)}, expected {expected}")
        model = self.reader.model
        return replace(memory, fingerprint=self.fingerprint()).to(model.device, model.dtype)

    def check_plain(self, engine: str) -> None:
        """Raises ConfigError if an engine that knows nothing but keys and values cannot serve the method."""
        if not self.plain:
            raise ConfigError(
                f"{engine} cannot serve method {self.name}: it reads more than keys and values in front of a prompt; "
                "leave the engine out, or take another method"
            )

    def of_entries(self: _Self, entries: int) -> _Self:
        """The same method with at most so many entries, for a comparison at equal bytes.

        Raises:
            ConfigError: it has no window of tokens that could be resized.
        """
        raise ConfigError(
            f"method {self.name} cannot be given the size of another method: expected one with a window, such as "
            "streaming-llm"
        )

    def sized(self, entries: int) -> dict[str, int]:
        """Options with which a prompt reads at most so many entries, window and slots in the default's proportion.

        Raises:
            ConfigError: what is read grows with the text.
        """
        if not self.most:
            raise ConfigError(
                f"method {self.name} grows with the text: it cannot be given a number of entries"
            )
        rest, own = max(0, entries - self.sink), getattr(self, self.most)
        between = round(rest * own / max(1, own + self.window))
        return {"sink": min(self.sink, entries), self.most: between, "window": rest - between}

    @property
    def title(self) -> str:
        """A short name, as clients of a server see it."""
        return self.name

    @property
    def text(self) -> str:
        """The method as it is written (``methods.spec``): its name, and the options that differ from its defaults."""
        pairs = []
        for name, default in self.defaults().items():
            if (value := getattr(self, name)) != default:
                inner = value.items() if isinstance(value, dict) else ()
                pairs += [f"{name}.{k}={v}" for k, v in inner] or [f"{name}={value}"]
        return self.name + (":" + ",".join(pairs) if pairs else "")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The options, and what they are where nobody says."""
        return {
            entry.name: entry.default_factory() if callable(entry.default_factory) else entry.default
            for entry in fields(cls)
            if entry.init
        }

    def sizes(self) -> dict[str, int]:
        """What one conversation may keep, by option."""
        numbers = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        return {**{name: n for name, n in numbers.items() if type(n) is int}, "segment": self.longest}

    # ------------------------------------------------------------------ write

    def empty(self, batch: int = 1) -> Memory:
        """The memory of ``batch`` conversations before anything was said."""
        return replace(self.reader.empty(batch), fingerprint=self.fingerprint())

    @final
    @torch.no_grad()
    def fold(
        self,
        memory: Memory,
        ids: Ids,
        mask: Tensor | None = None,
        *,
        answered: bool = False,
        read: Sequence[KV | None] = (),
    ) -> Memory:
        """Take in one segment per row: Mem(t) from Mem(t-1) and c(t). A method says how by :meth:`folded`.

        Args:
            memory: of B conversations.
            ids: (B, T) token ids.
            mask: (B, T), 0 on padding at either side.
            answered: the segment is answered next. It stays raw beside the window, and what it pushes out is folded
                behind the answer, so that nobody waits for that.
            read: of each row the position-free keys and values (L, H, t, D) of the first t tokens, as they are read
                behind ``recall(memory)``, or None. A method may read them again.

        Raises:
            ConfigError: an empty segment, or one that does not fit the model's context beside the memory.
            MismatchError: the memory was made by another model or method.
        """
        window = self.window + (self.longest if answered else 0)
        segment = Segment(*self.reader.tokens(ids, mask), window, read)
        self.check(memory, len(segment.ids))
        return self.folded(memory, segment)

    @final
    @torch.no_grad()
    def take_in(
        self,
        memory: Memory,
        segments: Sequence[Sequence[Sequence[int]]],
        *,
        answered: Sequence[bool] = (),
        read: Sequence[KV | None] = (),
    ) -> Memory:
        """Take in several segments per row, as :meth:`fold` does one by one.

        Args:
            memory: of B conversations.
            segments: of each row, token ids; at least one segment.
            answered: of each row, whether its last segment is answered next.
            read: of each row (L, H, t, D), what is known of its first segment, as of :meth:`fold`.

        Raises: as :meth:`fold`.
        """
        self.check(memory, len(segments))
        turns = []
        for r, own in enumerate(segments):
            last = self.window + (self.longest if answered and answered[r] else 0)
            turns.append(Turn(own, [*[self.window] * (len(own) - 1), last], read[r] if read else None))
        return self.taken_in(memory, turns)

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        """The memory behind one segment per row: new text joins the window, and what no longer fits leaves it."""
        held = self.recall(memory)
        found = (
            self.reader.watch(segment.ids, held, segment.mask, self.queries)
            if self.queries
            else [(text, None) for text in self._texts(held, segment)]
        )
        told = map(self.heard, memory.rows, segment.texts)
        rows = [joined(row, text, text.length) for row, (text, _) in zip(told, found, strict=True)]
        return replace(memory, rows=self.settled(rows, [asked for _, asked in found], segment.window))

    def taken_in(self, memory: Memory, turns: Sequence[Turn]) -> Memory:
        """The memory behind several segments per row: :meth:`folded` one by one, if a method has no shorter way."""
        rows = list(memory.rows)
        for k in range(max(len(turn.segments) for turn in turns)):
            going = [r for r, turn in enumerate(turns) if k < len(turn.segments)]
            for window in sorted({turns[r].windows[k] for r in going}):
                some = [r for r in going if turns[r].windows[k] == window]
                text = left_padded([turns[r].segments[k] for r in some], self.reader.model.device)
                read = [turns[r].read for r in some] if k == 0 else ()
                before = replace(memory, rows=tuple(rows[r] for r in some))
                after = self.folded(before, Segment(*self.reader.tokens(*text), window, read))
                for r, row in zip(some, after.rows, strict=True):
                    rows[r] = row
        return replace(memory, rows=tuple(rows))

    def heard(self, row: Row, ids: Sequence[int]) -> Row:
        """The row before new text joins it: with the ids in its notes, if the method asks for words."""
        return replace(row, notes=(*row.notes, *ids)) if "words" in self.asks else row

    def _texts(self, held: Memory, segment: Segment) -> list[KV]:
        """Position-free keys and values (L, H, T, D) of the text of every row; what is known is not read again."""
        if not any(segment.read):
            return self.reader.read(segment.ids, held, segment.mask)
        known = [
            row.window.slice(0, 0) if kv is None else kv
            for row, kv in zip(held.rows, segment.read, strict=True)
        ]
        rests = [text[kv.length :] for text, kv in zip(segment.texts, known, strict=True)]
        if left := [r for r, rest in enumerate(rests) if rest]:
            rows = (held.rows[r] for r in left)
            behind = (
                replace(row, window=KV.cat([row.window, known[r]])) for r, row in zip(left, rows, strict=True)
            )
            rest, shown = left_padded([rests[r] for r in left], self.reader.model.device)
            new = self.reader.read(rest, replace(held, rows=tuple(behind)), shown)
            for r, kv in zip(left, new, strict=True):
                known[r] = KV.cat([known[r], kv])
        return known

    def portion(self, held: int, segments: Sequence[Sequence[int]]) -> int:
        """How many of the first segments :meth:`take_in` takes in with one call of the model.

        Args:
            held: positions of the memory.
            segments: what is to be taken in.
        """
        return 1

    def settled(self, rows: Sequence[Row], queries: Sequence[Tensor | None], window: int) -> tuple[Row, ...]:
        """The rows when all that does not fit a window of so many tokens has left it.

        Args:
            rows: of B conversations.
            queries: of each row (L, Hq, w, D), as :meth:`keep` gets them.
            window: raw tokens that may stay.
        """
        rows = list(rows)
        while full := [r for r, row in enumerate(rows) if row.window.length > window]:
            counts = [self._leaving(rows[r], window) for r in full]
            leaving = [rows[r].window.slice(0, count) for r, count in zip(full, counts, strict=True)]
            # the first tokens of all are the sink; the method gets what stands behind them
            sinks = [self._sinking(rows[r], kv) for r, kv in zip(full, leaving, strict=True)]
            behind = [kv.slice(sink) for kv, sink in zip(leaving, sinks, strict=True)]
            left = [self._left(rows[r], kv, sink) for r, kv, sink in zip(full, leaving, sinks, strict=True)]
            kept = self.kept(left, behind, [queries[r] for r in full])
            for r, row, slots in zip(full, left, kept, strict=True):
                rows[r] = self._counted(replace(row, slots=slots.to(torch.float32)))
        return tuple(rows)

    def _leaving(self, row: Row, window: int) -> int:
        """Tokens of a full window that leave it next."""
        return row.segments[0] if self.whole else row.window.length - window

    def _sinking(self, row: Row, leaving: KV) -> int:
        """Tokens of what leaves that the sink still takes."""
        return min(max(0, self.sink - row.sunk), leaving.length)

    @staticmethod
    def _left(row: Row, leaving: KV, sink: int) -> Row:
        """The row without what leaves its window, but for the first tokens, which join the sink."""
        segments = without(row.segments, leaving.length)
        folded = len(row.segments) - len(segments)
        return replace(
            row,
            sink=KV.cat((row.sink, leaving.slice(0, sink))) if sink else row.sink,
            window=row.window.slice(leaving.length),
            segments=segments,
            steps=row.steps + folded,
            tokens=row.tokens + leaving.length,
        )

    @staticmethod
    def _counted(row: Row) -> Row:
        """The row with what is merged: the tokens before its window that have no slot of their own."""
        whole = row.tokens <= row.sunk + row.slots.length
        merged = 0 if whole else row.tokens - row.slots.length
        return replace(row, merged=merged, merged_segments=row.steps if merged else 0)

    def kept(self, rows: Sequence[Row], leaving: Sequence[KV], queries: Sequence[Tensor | None]) -> list[KV]:
        """The new slots of every row, (L, H, n, D) each; a method that works on a batch at once overrides this.

        Args:
            rows, leaving, queries: of each conversation what :meth:`keep` gets.
        """
        return [
            self.keep(row, kv, asked) if kv.length else row.slots
            for row, kv, asked in zip(rows, leaving, queries, strict=True)
        ]

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        """All new slots of a conversation, (L, H, n, D), from the old ones and from what leaves the window.

        Args:
            row: without what leaves; its sink and window stand beside the slots.
            leaving: (L, H, T, D), position-free, without tokens of the sink.
            queries: (L, Hq, w, D), position-free, of the newest text; None unless :attr:`queries` asks for them.
        """
        raise NotImplementedError

    @torch.no_grad()
    def pin(self, memory: Memory, ids: Sequence[int]) -> Memory:
        """Keep a text in front of everything, raw and for good, whatever becomes of the rest.

        It is read behind what is pinned already, and behind nothing else. What is there already stays as it was read.

        Args:
            memory: of B conversations.
            ids: token ids of the text.

        Raises:
            ConfigError: no text, or one that does not fit the model's context beside the memory at its largest.
            MismatchError: the memory was made by another model or method.
        """
        self.check(memory)
        if not ids:
            raise ConfigError("got an empty text to pin; give at least one token")
        held = max(row.length - row.pinned for row in self.recall(memory).rows)
        most, pinned = max(held, self.limit or 0), max(row.pinned for row in memory.rows)
        segment = 2 * self.longest + self.behind  # one that is answered stays beside the window
        room = self.reader.context - pinned - most - segment - 1
        if len(ids) > room:
            raise ConfigError(
                f"a pin of {len(ids)} tokens does not fit, {max(0, room)} would: the model's context of "
                f"{self.reader.context} also holds {pinned} pinned ones, the memory ({most}) and the newest text "
                f"({segment}); pin less, or take a smaller memory"
            )
        bare = Memory(tuple(row.bare for row in memory.rows), self.reader.fingerprint())
        read = self.reader.read([list(ids)] * len(memory), bare)
        pairs = zip(memory.rows, read, strict=True)
        return replace(memory, rows=tuple(row.with_pins(KV.cat((row.pins, kv))) for row, kv in pairs))

    # ------------------------------------------------------------------ read

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        """What a prompt reads of the memory: all of it, unless a method chooses.

        Args:
            memory: of B conversations.
            ids: (B, T) of the prompt, if it is known.
        """
        return memory

    def parts(self, row: Row, lengths: Sequence[int] = ()) -> list[Part]:
        """What the entries of a row stand for, as it is read (:meth:`recall`). The method need not be bound.

        Args:
            row: of one conversation.
            lengths: tokens of each segment since the beginning, if they are known.
        """
        found = behind(pinned(row), "sink", RAW, row.sunk, (0, row.sunk))
        found = self._between(row, found, lengths)
        return behind(found, "window", RAW, row.window.length, (row.tokens, row.seen))

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        """The parts up to the sink, and what the slots stand for: here, all of them for all that left the window."""
        return behind(found, "slots", self.made, row.slots.length, (row.sunk, row.tokens))

    # ------------------------------------------------------------------ sizes

    def size(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        """Entries in sink, slots and window after segments of these lengths, folded one by one.

        Raises:
            ConfigError: the method does not say how its slots grow.
        """
        sink = slots = folds = 0
        window: tuple[int, ...] = ()
        for length in lengths:
            window = (*window, length)
            while (over := sum(window) - self.window) > 0:
                gone = window[0] if self.whole else over
                taken = min(max(0, self.sink - sink), gone)
                left = without(window, gone)
                folds += len(window) - len(left)
                slots = self.grown(slots, gone - taken, folds) if gone > taken else slots
                sink, window = sink + taken, left
        return sink, slots, sum(window)

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        """Slots after so many tokens more have left the window, ``folds`` segments in all."""
        if not self.most:
            raise ConfigError(
                f"method {self.name} does not say how many slots it keeps: give it a method 'grown'"
            )
        return min(slots + leaving, getattr(self, self.most))

    def noted(self, row: Row, tokens: int) -> Row:
        """A row of these sizes with made-up entries, such as ``ccm plan`` times, and the notes of a real one.

        Args:
            row: of as many entries as :meth:`size` says, and as many steps.
            tokens: that it would have seen.
        """
        return row

    def means(self, steps: int) -> int:
        """How many of the first slots are running means after so many folds, and rest in all bits (fp32)."""
        return 0

    @property
    def limit(self) -> int | None:
        """Most entries that one conversation holds, however long it is; None: they grow with it."""
        return self.sink + getattr(self, self.most) + self.window if self.most else None

    def apart(self, row: Row) -> int:
        """Tokens that are still told apart once the memory is full: those that have an entry beside the sink."""
        context = self.reader.context
        return context if self.limit is None else min(self.limit - self.sink, context)

    def width(self, channels: int) -> int | None:
        """Bytes of a slot's key, or of its value, in one layer and head, if they are codes; None: they are fp32."""
        return None

    def losses(self, before: Row, after: Row) -> str:
        """What a turn has lost that people should know; empty if there is nothing."""
        return ""


def register(*names: str) -> Callable[[_M], _M]:
    """Class decorator: make a method known under its name, and further names for the same thing.

    Raises:
        ConfigError: another module has a method of that name, the class does not say what it keeps, or it overrides
            what no method may.
    """

    def put(method: _M) -> _M:
        for name in names:
            if (other := METHODS.get(name, method).__module__) != method.__module__:
                raise ConfigError(f"a method {name!r} is registered already, by {other}: take another name")
        if method.fold is not Method.fold or method.take_in is not Method.take_in:
            raise ConfigError(
                f"method {names[0]!r} has a 'fold' or 'take_in' of its own: give it a 'folded' or 'taken_in' in its "
                "place, which gets what these have checked"
            )
        if all(
            getattr(method, hook) is getattr(Method, hook) for hook in ("folded", "settled", "kept", "keep")
        ):
            raise ConfigError(
                f"method {names[0]!r} does not say what becomes of text that leaves its window: give it a 'keep'"
            )
        method.name = names[0]
        METHODS.update(dict.fromkeys(names, method))
        return method

    return put


class Run:
    """One conversation under one method. What is kept is a :class:`~ccm.Memory`, so copies are free.

    Attributes:
        method: bound to a model.
        held: what is kept.
    """

    def __init__(self, method: Method):
        self.method, self.held = method, method.empty()

    @property
    def reader(self) -> Reader:
        """The model that reads."""
        return self.method.reader

    @property
    def memory(self) -> Memory:
        """What live tokens attend to."""
        return self.recall()

    def recall(self, ids: Ids | None = None) -> Memory:
        """What a prompt attends to."""
        return self.method.recall(self.held, ids)

    def append(self, ids: Sequence[int]) -> None:
        """Take in one finished segment of token ids.

        Raises:
            ConfigError: an empty segment, or one that does not fit the model's context beside what is kept.
        """
        if len(ids) == 0:
            raise ConfigError("got an empty segment; give at least one token")
        self.held = self.method.fold(self.held, [list(ids)])

    def logits(self, ids: Sequence[int], begin: int = 1) -> Tensor:
        """Logits (T, V) of live tokens that read what the run holds; the run does not change.

        Args:
            ids: token ids.
            begin: how many of them an encoder-decoder reads; it writes the others, so a method that chooses by the
                prompt does not know them.
        """
        return self.reader.logits([list(ids)], self.recall([list(ids[:begin])]), begin=begin)[0]

    def resize(self, entries: int) -> None:
        """Keep at most so many entries from now on.

        Raises:
            ConfigError: the method has no window of tokens that could be resized.
        """
        self.method = self.method.of_entries(entries)
        rows = self.method.settled(self.held.rows, [None] * len(self.held), self.method.window)
        self.held = replace(self.held, rows=rows)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that live tokens attend to: those of the tensors held, in the model's type.

        ``memory.nbytes`` may be more: slots rest in float32, whatever the model's type is. Slots in codes count as
        these.
        """
        layers, heads, channels = self.reader.kv_shape()
        of_type = self.reader.model.dtype.itemsize
        of_slot = self.method.width(channels) or channels * of_type
        total = 0
        for row in self.memory.rows:
            raw = row.sink.length + row.window.length
            total += 2 * layers * heads * (raw * channels * of_type + row.slots.length * of_slot)
        return total

    def fork(self) -> Run:
        """An independent copy."""
        return copy.copy(self)


def segments_of(ids: Sequence[int], longest: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of a turn as segments of at most so many."""
    return tuple(tuple(ids[start : start + longest]) for start in range(0, len(ids), longest))


def texts(ids: Ids, mask: Tensor | None = None) -> list[list[int]]:
    """The token ids of every row, without padding."""
    rows = torch.as_tensor(ids)
    kept = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()
    return [row[real].tolist() for row, real in zip(rows, kept, strict=True)]
