"""Finished segments are folded into slots by a trained adapter: CCM, and what its baselines share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel

from ..core.compressor import Compressor
from ..core.folding import counted
from ..core.memory import Memory, Row
from ..core.onward import Turn
from ..core.reader import Reader
from ..core.window import overflow
from ..errors import ConfigError, MismatchError
from .base import Method, Segment, register
from .parts import Part, behind

#: Tokens of several segments that are taken in together: from here on a pass is no cheaper for a token.
TOGETHER = 256

_T = TypeVar("_T", bound="Trained")


@dataclass(frozen=True, kw_only=True)
class Trained(Method):
    """An adapter of one kind behind the protocol. An option that is None is the adapter's own.

    Attributes:
        made_by: the compressor that the adapter is for; others are refused.
        adapter: a shipped adapter's name, a folder or a hub id; empty is the one of the method's name.
        slots: slots per segment, the first k of the adapter's n; None is all of them.
    """

    made_by: ClassVar[type[Compressor]] = Compressor
    whole: ClassVar[bool] = True
    asks: ClassVar[tuple[str, ...]] = ("adapter",)
    made: ClassVar[str] = "folded"
    adapter: str = ""
    slots: int | None = None
    sink: int = None  # type: ignore[assignment]  # a number once it is bound
    window: int = None  # type: ignore[assignment]
    reader: Compressor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(slots=1)
        if self.made_by.kind != "ccm" and (self.sink or self.window):
            raise ConfigError(
                f"method {self.name}: got sink={self.sink}, window={self.window}, expected 0: it has slots only"
            )

    def bind(self: _T, model: PreTrainedModel | Reader, tokenizer: Any = None) -> _T:
        """The adapter on a model, loaded once; or a compressor that has it already.

        Raises:
            ConfigError: there is no such adapter, or it has fewer slots.
            MismatchError: it is of another kind, or was trained for another model.
        """
        compressor = model if isinstance(model, Compressor) else self._load(model)
        config = compressor.config
        if config.kind != self.made_by.kind:
            raise ConfigError(
                f"method {self.name}: got a compressor of kind {config.kind!r}, expected {self.made_by.kind!r}"
            )
        if self.slots is not None and self.slots > config.slots:
            raise ConfigError(
                f"method {self.name}: slots is {self.slots}, the adapter has {config.slots} per segment"
            )
        own = {n: getattr(config, n) for n in ("slots", "sink", "window") if getattr(self, n) is None}
        if tokenizer is not None:
            compressor.cautions.know(tokenizer)
        return replace(self, **own)._on(compressor, tokenizer)

    def _load(self, model: PreTrainedModel | Reader) -> Compressor:
        base = model.model if isinstance(model, Reader) else model
        return shared_compressor(base, self.adapter or self.name, self.made_by, **self._changes())

    def _changes(self) -> dict[str, Any]:
        """Settings of the adapter that are other than its own."""
        return {}

    @property
    def behind(self) -> int:
        return self.slots or 0  # COMP tokens

    def fingerprint(self) -> str:
        return self.reader.fingerprint()

    def check(self, memory: Memory, batch: int | None = None) -> None:
        self.reader.check(memory, batch)

    def admit(self, memory: Memory) -> Memory:
        memory = super().admit(memory)
        return replace(memory, rows=tuple(counted(row, self.reader.rule) for row in memory.rows))

    def check_plain(self, engine: str) -> None:
        super().check_plain(engine)
        if self.reader.base_parameters:
            raise ConfigError(
                f"the adapter tunes the base model itself: merge it, and serve that model in {engine}"
            )

    def size(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        folds = overflow(lengths, self.window)
        sink = min(self.sink, lengths[0]) if folds else 0
        return sink, self.reader.rule.size(folds, self.slots or 0), sum(lengths[folds:])

    def means(self, steps: int) -> int:
        return self.reader.rule.means(steps, self.slots or 0)

    @property
    def limit(self) -> int | None:
        rule = self.reader.rule
        if rule.blocks is None:
            return None
        return self.sink + rule.size(rule.blocks + 1, self.slots or 0) + self.window

    @property
    def title(self) -> str:
        return Path(self.adapter or self.name).name

    @property
    def text(self) -> str:
        if not self.adapter:
            return super().text
        return self.adapter + replace(self, adapter="").text.removeprefix(self.name)

    def sizes(self) -> dict[str, int]:
        return {"slots": self.slots or 0, **super().sizes()}

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        # what has slots only folds a question at once
        window = segment.window if self.made_by.kind == "ccm" else 0
        sizes = {"slots": self.slots, "sink": self.sink, "window": window}
        return self.reader.compress(segment.ids, memory, segment.mask, **sizes)

    def taken_in(self, memory: Memory, turns: Sequence[Turn]) -> Memory:
        if not self._together or _folds_once(memory, turns):
            return super().taken_in(memory, turns)
        return self.reader.take_in(memory, turns, slots=self.slots, sink=self.sink)

    @property
    def _together(self) -> bool:
        """Whether several segments can be taken in with one pass."""
        return self.made_by.kind == "ccm" and self.reader.parallel and not self.reader.devices

    def portion(self, held: int, segments: Sequence[Sequence[int]]) -> int:
        if not self._together:
            return 1
        count = tokens = 0
        for ids in segments:
            tokens += len(ids)
            room = self.reader.context - held - (count + 1) * self.behind
            if count and tokens > min(TOGETHER, room):
                break
            count += 1
        return count

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        """A block of slots for every segment that has its own, behind one for those that share theirs."""
        merged = row.merged_segments
        known = tuple(lengths[: row.steps])
        own = row.recent or (() if merged else known)  # a rule without an end keeps no counts
        start = row.dropped + row.merged
        blocks = len(own) + bool(merged)
        if not blocks or row.slots.length % blocks or start + sum(own) != row.tokens:
            return behind(found, "slots", self.made, row.slots.length, (0, row.tokens))
        each = row.slots.length // blocks
        if merged:
            found = behind(found, "slots", "merged", each, (row.dropped, start))
        for length in own:
            found = behind(found, "slots", self.made, each, (start, start + length))
            start += length
        return found

    def apart(self, row: Row) -> int:
        """Raw tokens, and those of the segments that have slots of their own in a full memory."""
        rule = self.reader.rule
        segments = self._room if rule.blocks is None else min(self._room, rule.apart(rule.blocks + 1))
        each = row.tokens / row.steps if row.steps else self.longest
        return round(segments * each) + self.window

    @property
    def _room(self) -> int:
        """Segments whose slots fit the model's context beside all else."""
        return self._beside(0) // (self.slots or 1)

    def _beside(self, entries: int) -> int:
        """Positions of the context that are left for slots beside so many other entries."""
        return max(0, self.reader.context - self.sink - self.window - self.longest - entries)

    def losses(self, before: Row, after: Row) -> str:
        if after.dropped > before.dropped:
            return (
                f"the memory is full: {after.dropped - before.dropped} tokens of the oldest text were dropped, not "
                f"folded ({after.dropped} in all); use rule 'mean', or 'bounded' with overflow='merge', to keep a "
                "trace of them"
            )
        # a rule that merges all there is, by design, says nothing
        if after.merged and not before.merged and (self.reader.rule.blocks or 0) > 1:
            return (
                f"the memory is full: what is older than the newest {after.reach} tokens is merged from here on, and "
                "facts in it blur; a rule with more blocks reaches further (rule_options)"
            )
        return ""


@dataclass(frozen=True, kw_only=True)
class Compressed(Trained):
    """CCM's compressor.

    Attributes:
        sink: first raw tokens that stay.
        window: newest raw tokens that stay.
        rule: how blocks enter the memory: a name of ``core.rule``.
        rule_options: of that rule, such as the number of blocks of "bounded".
    """

    rule: str | None = None
    rule_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule_options and not self.rule:
            given = ", ".join(self.rule_options)
            raise ConfigError(
                f"method {self.name}: got rule_options.{given} without a rule: name it too (rule=bounded)"
            )

    def check(self, memory: Memory, batch: int | None = None) -> None:
        super().check(memory, batch)
        if not all(map(self._reads, memory.rows)):
            raise MismatchError(
                "the memory was made by another method with the same adapter (slots-and-words and the like keep "
                f"more than its slots), this is {self.name}: open it with that one (--memory), or start a new memory"
            )

    @staticmethod
    def _reads(row: Row) -> bool:
        """Whether a row is of this method or of the adapter alone, as its notes tell."""
        return not row.notes

    def _changes(self) -> dict[str, Any]:
        return {"rule": self.rule, "rule_options": self.rule_options} if self.rule else {}


@dataclass(frozen=True, kw_only=True)
class CCM(Compressed):
    """CCM with an adapter that is loaded already."""

    name: ClassVar[str] = "ccm"


@register("ccm-concat")
@dataclass(frozen=True, kw_only=True)
class CCMConcat(Compressed):
    """CCM-concat: n slots for each segment (Kim et al., ICLR 2024, arXiv 2312.03414)."""


@register("ccm-merge")
@dataclass(frozen=True, kw_only=True)
class CCMMerge(Compressed):
    """CCM-merge: n slots in all (Kim et al., ICLR 2024, arXiv 2312.03414)."""


def _folds_once(memory: Memory, turns: Sequence[Turn]) -> bool:
    """Whether the recursion, too, takes one pass: a segment each, which is folded at once or pushes nothing out."""
    if len({turn.windows[-1] for turn in turns}) > 1:
        return False
    if any(len(turn.segments) > 1 or turn.read for turn in turns):
        return False
    pairs = [
        (row, turn.windows[0], len(turn.segments[0])) for row, turn in zip(memory.rows, turns, strict=True)
    ]
    folded = [overflow([*row.segments, length], window) > 0 for row, window, length in pairs]
    return not any(folded) or (all(folded) and not any(row.segments for row in memory.rows))


def shared_compressor(
    model: PreTrainedModel, adapter: str, made_by: type[Compressor] = Compressor, **changes: Any
) -> Compressor:
    """The compressor of a model and an adapter, loaded once and kept with the model."""
    known = model.__dict__.setdefault("_ccm_compressors", {})
    key = adapter, json.dumps(changes, sort_keys=True)
    if key not in known:
        known[key] = made_by.from_pretrained(model, adapter, **changes)
    return known[key]


def as_method(memory: Method | Compressor, tokenizer: Any = None, **options: Any) -> Method:
    """A bound method with some options changed; a compressor is one of CCM."""
    if isinstance(memory, Compressor):
        return CCM(adapter=memory.source, **options).bind(memory, tokenizer)
    return memory.resized(**options) if options else memory
