"""Learned slots, and beside them the old words that the newest text asks for, read anew.

Slots say what was told about what, and words say it exactly. The slots are also the index: the segment that a
question is about is the one to whose slots its last tokens attend, in 69 of 72 questions about told facts. Words cost
nothing while nobody asks for them, because their ids alone are kept. What is read is bounded: so many words for every
segment that has slots (docs/decisions.md, measured).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...core.memory import KV, Memory, Row
from ...core.onward import Turn
from ...core.reader import Ids
from ...core.window import overflow
from ..base import Segment, register, texts
from ..inside import attended
from ..parts import Part, behind
from ..recall.retrieve_text import bm25
from .base import Hybrid

#: Newest tokens whose words are looked for, those of them whose attention counts, and the longest piece of old text.
ASKED, ATTENDING, PIECE = 24, 8, 16


@register("slots-and-words")
@dataclass(frozen=True, kw_only=True)
class SlotsAndWords(Hybrid):
    """Few slots, and old words asked for.

    CCM's slots (Kim et al., ICLR 2024, arXiv 2312.03414) are the index, and all old text stays as token ids. A row's
    slots are [learned | words]. Its notes are the number of words, and for every token so far 2 id, or 2 id + 1 where
    a segment begins.

    Attributes:
        words: tokens of old text that are read for every segment that has slots.
    """

    asks: ClassVar[tuple[str, ...]] = ("adapter", "words")
    adapter: str = "ccm-chat"
    slots: int | None = 2
    words: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(words=0)

    @staticmethod
    def _reads(row: Row) -> bool:
        return not row.notes or (len(row.notes) > 1 and row.notes[0] <= row.slots.length)

    # ------------------------------------------------------------------ write

    def folded(self, memory: Memory, segment: Segment) -> Memory:
        self.reader.check_room(memory, segment.ids.shape[1], self.behind)
        after = super().folded(_learned(memory), segment)
        return self._noted(memory, after, [[text] for text in segment.texts])

    def taken_in(self, memory: Memory, turns: Sequence[Turn]) -> Memory:
        for row, turn in zip(memory.rows, turns, strict=True):  # behind the words, though they are not folded
            text = sum(map(len, turn.segments))
            self.reader.check_room(replace(memory, rows=(row,)), text, self.behind * len(turn.segments))
        after = super().taken_in(_learned(memory), turns)
        return self._noted(memory, after, [turn.segments for turn in turns])

    def _noted(self, before: Memory, after: Memory, segments: Sequence[Sequence[Sequence[int]]]) -> Memory:
        """The memory with its notes and words; itself if a fold has done it already."""
        new = [[2 * token + (i == 0) for ids in own for i, token in enumerate(ids)] for own in segments]
        said = [(*row.notes[1:], *notes) for row, notes in zip(before.rows, new, strict=True)]
        if all(row.notes[1:] == notes for row, notes in zip(after.rows, said, strict=True)):
            return after
        rows = [replace(row, notes=(0, *notes)) for row, notes in zip(after.rows, said, strict=True)]
        return replace(after, rows=tuple(self.reading(row) for row in rows))

    # ------------------------------------------------------------------ read

    def recall(self, memory: Memory, ids: Ids | None = None) -> Memory:
        if ids is None:
            return memory
        rows = zip(_learned(memory).rows, texts(ids), strict=True)
        return replace(memory, rows=tuple(self.reading(row, prompt) for row, prompt in rows))

    def reading(self, row: Row, prompt: Sequence[int] = ()) -> Row:
        """A row of slots alone with the words that the newest text asks for, read behind its sink."""
        said = row.notes[1:]
        old = said[: max(0, len(said) - row.window.length)]
        most = min(self.reader.rule.size(row.steps, self.words), len(old))
        if not most:
            return row
        asked = [*(note // 2 for note in said[-ASKED:]), *prompt][-ASKED:]
        words = self._chosen(old, asked, self._attended(row, asked), most)
        nothing = row.slots.slice(0, 0)
        sink = replace(row, slots=nothing, window=nothing)
        (kv,) = self.reader.read([words], Memory((sink,), self.fingerprint()))
        return replace(row, slots=KV.cat((row.slots, kv.to(torch.float32))), notes=(most, *said))

    def _attended(self, row: Row, asked: Sequence[int]) -> list[float]:
        """The attention that the newest tokens pay to the slots of each segment, oldest first."""
        memory = Memory((replace(row, window=row.window.slice(0, 0)),), self.fingerprint())
        found = attended(self.reader, memory, asked, min(ATTENDING, len(asked))).sum(0)
        slots = found[row.sink.length : row.sink.length + row.slots.length]
        return [float(block.sum()) for block in slots.split(self.slots or 1)]

    def _chosen(
        self, old: Sequence[int], asked: Sequence[int], attention: Sequence[float], most: int
    ) -> list[int]:
        """So many tokens of the old text, in its order."""
        ids = [note // 2 for note in old]
        words = self._words([*ids, *asked])
        pieces = self._pieces(old)
        wanted = set(words[len(ids) :])
        told = bm25([Counter(words[i] for i in places) for _, places in pieces], sorted(wanted))
        blocks = len(attention)
        seen = [attention[max(0, blocks + segment)] for segment, _ in pieces]  # the oldest may share a block
        score = [a / (max(seen) or 1) + b / (max(told) or 1) for a, b in zip(seen, told, strict=True)]
        chosen: list[int] = []
        for p in sorted(range(len(pieces)), key=lambda p: (round(score[p], 3), p), reverse=True):
            # of what does not fit whole the newest text has some words itself, and its end says most
            places = sorted(pieces[p][1], key=lambda i: (words[i] in wanted, -i))
            chosen += places[: most - len(chosen)]
        rest = sorted(set(range(len(ids))) - set(chosen), reverse=True)
        return [ids[i] for i in sorted([*chosen, *rest[: most - len(chosen)]])]

    def _pieces(self, old: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Stretches of the old text without control tokens: segment, counted back from the end, and places."""
        control = {2 * token for token in self.tokenizer.all_special_ids} if self.tokenizer else set()
        segment = -sum(note % 2 for note in old) - 1
        pieces: list[tuple[int, list[int]]] = []
        fresh = True
        for place, note in enumerate(old):
            segment += note % 2
            fresh = fresh or bool(note % 2)
            if note - note % 2 in control:
                fresh = True
            elif fresh or len(pieces[-1][1]) == PIECE:
                pieces.append((segment, [place]))
                fresh = False
            else:
                pieces[-1][1].append(place)
        return pieces

    def _words(self, ids: Sequence[int]) -> list[str]:
        """Tokens as words that are alike wherever they stand."""
        if self.tokenizer is None:
            return list(map(str, ids))
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return [str(token).lstrip("Ġ▁ ").lower() for token in tokens]

    def _between(self, row: Row, found: list[Part], lengths: Sequence[int]) -> list[Part]:
        learned = _alone(row)
        found = super()._between(learned, found, lengths)
        return behind(found, "slots", "retold", row.slots.length - learned.slots.length, (0, row.tokens))

    # ------------------------------------------------------------------ sizes

    def size(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        sink, slots, window = super().size(lengths)
        folds = overflow(lengths, self.window)
        return sink, slots + min(self.reader.rule.size(folds, self.words), sum(lengths[:folds])), window

    def noted(self, row: Row, tokens: int) -> Row:
        learned = self.reader.rule.size(row.steps, self.slots or 0)
        each = -(-tokens // (row.steps + len(row.segments)))
        said = [int(n % each == 0) for n in range(tokens)]  # one token again and again
        return replace(row, notes=(row.slots.length - learned, *said))

    @property
    def _room(self) -> int:
        return self._beside(0) // ((self.slots or 1) + self.words)

    @property
    def limit(self) -> int | None:
        rule, slots = self.reader.rule, super().limit
        return None if slots is None else slots + rule.size((rule.blocks or 0) + 1, self.words)


def _learned(memory: Memory) -> Memory:
    """The memory without words."""
    return replace(memory, rows=tuple(map(_alone, memory.rows)))


def _alone(row: Row) -> Row:
    words = row.notes[0] if row.notes else 0
    if not words:
        return row
    return replace(row, slots=row.slots.slice(0, row.slots.length - words), notes=(0, *row.notes[1:]))
